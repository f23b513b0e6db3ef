"""What a verb takes, as data, and the short way to read a command line.

::

                          ┌─ read (here) ──────── a Line, or None: something is unusual ─┐
    Verb, its Options ────┤                                                              ▼
                          └─ clicked.command ──── click: help, errors, completion, and a Line too

A machine's start is mostly imports, and click is a fifth of them. So a line that is right, and written
plainly, is read here. Whatever else comes (``--help``, a mistake, ``-tq``) is click's to answer, as if
this were not there: this reader is never wrong, it only gives up, and it has no list of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from .say import say


class Option(msgspec.Struct, frozen=True):
    """An option of a verb. ``option`` makes one."""

    section: str
    """Its heading on the help page."""
    names: tuple[str, ...]
    name: str
    """What it is called in a ``Line``."""
    type: Callable[[str], Any] = str
    """The value of a text; any exception says that it is none."""
    choices: tuple[str, ...] = ()
    """The only texts, if there are any."""
    multiple: bool = False
    """May be repeated; the value is a tuple."""
    flag: bool = False
    """Takes no text; the value is True."""
    off: tuple[str, ...] = ()
    """Names of a flag for False."""
    bare: str = ""
    """The text of one that is named without any (``--vsock``); with ``--vsock=TEXT`` it has another."""
    default: str | bool | None = None
    """When it is not named; a text as one would write it."""
    metavar: str = ""
    help: str = ""
    completes: Literal["", "path", "kernel"] = ""
    voice: bool = False
    """Says how much hostel says: an attribute of ``say``, and not in a ``Line``."""

    def value(self, given: Sequence[str | bool]) -> Any:
        """Of all that the command line says; the last one counts."""
        if self.multiple:
            return tuple(map(self._value, given))
        return self._value(given[-1] if given else self.default)

    def _value(self, given: str | bool | None) -> Any:
        if not isinstance(given, str):
            return given
        if self.choices and given not in self.choices:
            raise ValueError(given)
        return self.type(given)


def option(section: str, *names: str, name: str = "", flag: bool = False, **rest: Any) -> Option:
    """``name``: else it is that of the first long option. A flag is False unless it says otherwise."""
    name = name or next(one for one in names if one.startswith("--"))[2:].replace("-", "_")
    default = rest.pop("default", False if flag else None)
    return Option(section, names, name, flag=flag, default=default, **rest)


class Line(msgspec.Struct, frozen=True):
    """A command line, understood."""

    values: dict[str, Any]
    """Of every option, by name; of ``command`` too, if the verb takes one."""
    named: frozenset[str]
    """The options that it names."""


class Verb(msgspec.Struct, frozen=True):
    """Its help is the docstring of what it calls. Options end at the first argument."""

    name: str
    call: Callable[[Line], int]
    options: tuple[Option, ...]
    command: str = ""
    """How the help page shows the arguments: a command of the guest's; empty: there are none."""


def read(verb: Verb, words: Sequence[str]) -> Line | None:
    """The line, or None for click to look at. Only a line has an effect: on what hostel says."""
    try:
        given, rest = _split(verb, words)
        if rest and not verb.command:
            return None
        values = {one.name: one.value(given.get(one.name, ())) for one in verb.options}
    except Exception:  # whatever it is: click meets it too, and says so in its words
        return None
    for one in verb.options:
        if one.voice:
            setattr(say, one.name, values.pop(one.name))
    if verb.command:
        values["command"] = tuple(rest)
    return Line(values, frozenset(given))


def _split(verb: Verb, words: Iterable[str]) -> tuple[Mapping[str, list[str | bool]], list[str]]:
    """What is said of each option, and the arguments."""
    options = {
        name: (one, True if one.flag else one.bare) for one in verb.options for name in one.names
    }
    options |= {name: (one, False) for one in verb.options for name in one.off}
    given: dict[str, list[str | bool]] = {}
    left = list(words)[::-1]
    while left and left[-1].startswith("-") and left[-1] != "-":
        word = left.pop()
        if word == "--":
            break
        name, equals, text = word.partition("=") if word.startswith("--") else (word, "", "")
        one, alone = options[name]
        if equals and one.flag:
            raise ValueError(word)
        value = text if equals else left.pop() if alone == "" else alone
        given.setdefault(one.name, []).append(value)
    return given, left[::-1]
