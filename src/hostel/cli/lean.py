"""What click, msgspec and pathlib import and a start does not use: imported when it is used.

They are half of what is done before a machine begins, and half of that is modules of Python's that serve
help pages, translations and schemas. While the three are imported, these have stand-ins in ``sys.modules``.
Nobody else sees one: whoever imports such a module later gets the module.
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
        return getattr(import_module(self.__name__), name)


def _cleandoc(text: str) -> str:
    """Of each option's help, which is one line."""
    return str(import_module("inspect").cleandoc(text)) if "\n" in text else text.lstrip()


def _quote_from_bytes(*given: Any) -> Any:
    return import_module("urllib.parse").quote_from_bytes(*given)


def import_packages() -> None:
    """click, msgspec and pathlib, once: the next call finds them."""
    stand_ins = (
        Later("inspect", cleandoc=_cleandoc),  # click: help pages
        Later("textwrap"),  # msgspec: JSON schemas
        Later("msgspec.inspect"),  # msgspec: types taken apart
        Later("platform", system=lambda: os.uname().sysname),  # uuid, which both import
        Later(  # click: it has no translations, nor have we
            "gettext",
            gettext=lambda text: text,
            ngettext=lambda one, many, count: one if count == 1 else many,
        ),
        Later("urllib.parse", quote_from_bytes=_quote_from_bytes),  # pathlib: URIs
    )
    modules: dict[str, ModuleType | None] = {one.__name__: one for one in stand_ins}
    # msgspec: where there are any, they come before typing's own, which have been enough since 3.11
    modules["typing_extensions"] = None
    added = {name: one for name, one in modules.items() if name not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]  # None: there is no such module
    try:
        for package in ("msgspec", "click", "pathlib"):
            import_module(package)
    finally:
        for name, one in added.items():
            if sys.modules.get(name) is one:
                del sys.modules[name]
