"""What click, msgspec and pathlib import and a start does not use: imported when it is used.

Half of what they cost a start is modules of Python's that serve help pages, translations, schemas and dates.
While the three are imported, these have stand-ins in ``sys.modules``. Nobody else sees one: whoever imports
such a module later gets the module. Only msgspec keeps what it took for ``UUID`` and ``Decimal``: values of
these types are strange to it in this process, and hostel has none.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Imports the module of its name when it is asked for what it has not."""

    def __init__(self, name: str, **has: Any) -> None:
        super().__init__(name)
        self.__dict__.update(has)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions, while it imports
            raise AttributeError(name)
        if (
            sys.modules.get(self.__name__) is self
        ):  # asked while it stands in: some Pythons use more
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def _cleandoc(text: str) -> str:
    """Of each option's help, which is one line."""
    return str(import_module("inspect").cleandoc(text)) if "\n" in text else text.lstrip()


def _quote_from_bytes(*given: Any) -> Any:
    return import_module("urllib.parse").quote_from_bytes(*given)


class _Strange:
    """No value is one."""

    unknown = None


def _stand_ins() -> dict[str, dict[str, ModuleType | None]]:
    """By the package that imports them. None: as if there were no such module."""
    msgspec = (
        Later("textwrap"),  # JSON schemas
        Later("msgspec.inspect"),  # types taken apart
        Later("msgspec.json"),
        Later("msgspec.msgpack"),
        Later("msgspec.toml"),
        Later("msgspec.yaml"),
        Later("uuid", UUID=_Strange, SafeUUID=_Strange),
        Later("decimal", Decimal=_Strange),
    )
    pathlib = (
        Later("fnmatch"),
        Later("ntpath"),
        Later("urllib.parse", quote_from_bytes=_quote_from_bytes),
    )
    click = (
        Later("inspect", cleandoc=_cleandoc),  # help pages
        Later("platform", system=lambda: os.uname().sysname),  # uuid's
        Later(  # it has no translations, nor have we
            "gettext",
            gettext=lambda text: text,
            ngettext=lambda one, many, count: one if count == 1 else many,
        ),
    )
    packages = {"msgspec": msgspec, "pathlib": pathlib, "click": click}
    modules: dict[str, dict[str, ModuleType | None]] = {
        package: {one.__name__: one for one in ones} for package, ones in packages.items()
    }
    # What Python's own datetime is made of: the rest of it is the same once more, in Python.
    modules["msgspec"]["datetime"] = import_module("_datetime")
    # Where there are any, they come before typing's own, which have been enough since 3.11.
    modules["msgspec"]["typing_extensions"] = None
    return modules


def import_packages(*packages: str) -> None:
    """Some of click, msgspec and pathlib, once: the next call finds them."""
    stand_ins = _stand_ins()
    for package in packages:
        added = {name: one for name, one in stand_ins[package].items() if name not in sys.modules}
        sys.modules.update(added)  # type: ignore[arg-type]  # None: there is no such module
        try:
            import_module(package)
        finally:
            for name, one in added.items():
                if sys.modules.get(name) is one:
                    del sys.modules[name]
