"""``python -m hostel.soft.mini``: the mini guests; with a name and parameters, where its image is.

::

    $ hostel boot --kernel "$(python -m hostel.soft.mini churn pages=64)"
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from hostel.errors import HostelError, SpecError

from . import guest, image, names


def main(arguments: list[str]) -> int:
    try:
        for line in _said(arguments):
            print(line)
    except HostelError as error:
        print(f"hostel: {error}", file=sys.stderr)
        return 1
    return 0


def _said(arguments: list[str]) -> Iterable[str]:
    if not arguments:
        return map(_row, names())
    return [str(image(arguments[0], **dict(map(_parameter, arguments[1:]))))]


def _row(name: str) -> str:
    one = guest(name)
    parameters = " ".join(f"{key}={value}" for key, value in one.parameters.items())
    return f"{name:10} {one.exercises}{f'  ({parameters})' if parameters else ''}"


def _parameter(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    try:
        return name, int(value, 0)
    except ValueError:
        raise SpecError(f"{text!r} is no parameter", cure="write NAME=NUMBER") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
