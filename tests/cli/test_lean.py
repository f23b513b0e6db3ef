"""Stand-ins for modules that click and msgspec import: unseen by others, and the real thing when used."""

from __future__ import annotations

import inspect
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import hostel
from hostel.cli.lean import Later, import_packages

PACKAGES = ("msgspec", "pathlib", "click")
LEAN = f"""
from hostel.cli.lean import import_packages
def lean():
    import_packages{PACKAGES}
"""


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LEAN + program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.stderr == ""
    return done.stdout


def test_a_stand_in_is_the_module_when_it_is_used() -> None:
    later = Later("textwrap", dedent="ours")
    assert later.dedent == "ours"
    assert later.indent is textwrap.indent
    for missing in ("no_such_name", "__path__"):
        with pytest.raises(AttributeError):
            getattr(later, missing)


def test_a_stand_in_gives_way_when_it_is_used_while_it_stands_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pathlib of Python 3.12 uses fnmatch as it is imported."""
    later = Later("textwrap")
    monkeypatch.setitem(sys.modules, "textwrap", later)
    dedent = later.dedent
    assert sys.modules["textwrap"] is not later
    assert dedent is sys.modules["textwrap"].dedent


def pythons() -> list[Path]:
    """Other Pythons of this host that are new enough: Debian's, pyenv's."""
    homes = (Path("/usr/bin"), *Path.home().glob(".pyenv/versions/3.*/bin"))
    return [python for home in homes for python in home.glob("python3.1[1-9]")]


@pytest.mark.parametrize("python", pythons(), ids=str)
def test_pathlib_is_whole_on_every_python(python: Path) -> None:
    """Each has a pathlib of its own. (Neither click nor msgspec is installed for it.)"""
    program = LEAN.replace(str(PACKAGES), "('pathlib')")
    program += "lean()\nfrom pathlib import Path\n"
    program += "print(*Path('/usr').glob('b?n'), Path('a b').absolute().as_uri()[-5:])"
    source = Path(hostel.__file__).parents[1]
    done = subprocess.run(
        [python, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(source)},
    )
    assert (done.stdout, done.stderr) == ("/usr/bin a%20b\n", "")


def test_nobody_else_sees_one() -> None:
    names = [
        *(
            "inspect",
            "textwrap",
            "platform",
            "gettext",
            "urllib.parse",
            "uuid",
            "decimal",
            "ntpath",
        ),
        *("fnmatch", "msgspec.json", "msgspec.toml", "datetime"),
    ]
    program = f"lean()\nimport sys, {', '.join(names)}\n"
    program += f"print(*[type(sys.modules[name]).__name__ for name in {names}])"
    assert python(program).split() == ["module"] * len(names)


def test_what_may_not_be_there_is_seen_by_the_next_one_who_asks() -> None:
    pytest.importorskip("typing_extensions")
    program = """
lean()
import sys
assert "typing_extensions" not in sys.modules
import typing_extensions, msgspec, typing
class Box(msgspec.Struct):
    size: typing.Annotated[int, msgspec.Meta(gt=0)]
print(typing_extensions.__file__ is not None, msgspec.inspect.type_info(Box).fields[0].type.gt)
"""
    assert python(program).split() == ["True", "0"]


def test_modules_that_are_there_stay() -> None:
    import_packages(*PACKAGES)
    assert sys.modules["inspect"] is inspect
    assert sys.modules["platform"] is platform


def test_click_and_msgspec_work_with_them() -> None:
    program = """
lean()
import click, msgspec, pathlib, uuid
@click.command()
@click.option("--name", help="  One line.")
@click.option("--long", help='''Two
    lines.''')
def command(name, long):
    '''What it does,
    in two lines.'''
command.main(["--help"], standalone_mode=False)
try:
    command.main(["--nam", "x"], standalone_mode=False)
except click.NoSuchOption as error:
    print(error.format_message())
print(msgspec.json.schema(dict[str, int])["type"], uuid.uuid4().version, msgspec.json.decode(b"[1]"))
print(pathlib.Path("/a b").as_uri(), pathlib.PurePath("a.py").match("*.PY"), pathlib.PureWindowsPath("C:/a"))
import datetime
print(msgspec.json.decode(b'"2026-01-02"', type=datetime.date), msgspec.toml.decode(b"a = 1"))
"""
    plain = python(program.replace("lean()\n", ""))
    assert "One line." in plain
    assert python(program) == plain


def test_the_two_types_that_msgspec_does_not_know_then() -> None:
    program = """
lean()
import decimal, msgspec, uuid
for value in (decimal.Decimal(1), uuid.UUID(int=1)):
    try:
        msgspec.json.encode(value)
    except TypeError as error:
        print("strange")
"""
    assert python(program).split() == ["strange"] * 2
