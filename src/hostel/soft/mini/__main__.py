"""``python -m hostel.soft.mini``: the mini guests; with a name and parameters, where its image is.

::

    $ hostel boot --kernel "$(python -m hostel.soft.mini churn pages=64)"
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from hostel.errors import HostelError, SpecError

from . import guest, image, names

_USAGE = """\
Usage: python -m hostel.soft.mini [NAME [PARAMETER=NUMBER ...]]
Without NAME: the mini guests, and their parameters. With it: where the guest's image is, built if need be."""
_NUMBER = re.compile("-?(0|[1-9][0-9]{0,18}|0x[0-9a-fA-F]{1,16})")


def main(arguments: list[str]) -> int:
    try:
        for line in _said(arguments):
            print(line)
    except HostelError as error:
        print(f"hostel: {error}", file=sys.stderr)
        return 1
    return 0


def _said(arguments: list[str]) -> Iterable[str]:
    if {"-h", "--help"} & set(arguments):
        return [_USAGE]
    if not arguments:
        return map(_row, names())
    return [str(image(arguments[0], **_parameters(arguments[1:])))]


def _row(name: str) -> str:
    one = guest(name)
    parameters = " ".join(f"{key}={value}" for key, value in one.parameters.items())
    return f"{name:10} {one.exercises}{f'  ({parameters})' if parameters else ''}"


def _parameters(texts: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in map(_parameter, texts):
        if name in found:
            raise SpecError(f"parameter {name!r} is given twice", cure="give it once")
        found[name] = value
    return found


def _parameter(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not _NUMBER.fullmatch(value):
        raise SpecError(f"{text!r} is no parameter", cure="write NAME=NUMBER")
    return name, int(value, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
