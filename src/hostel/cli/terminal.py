"""The caller's terminal: its size, raw mode, and its way back.

Raw mode is entered when the guest's command is there to take every key, and left on every way out: the
context manager's ``finally`` runs for exceptions, Ctrl-C and the signals that ``signals.py`` turns
into exceptions.
"""

from __future__ import annotations

import contextlib
import os
import select
import termios
from collections.abc import Iterator, Mapping
from typing import Any

STDIN, STDOUT, STDERR = 0, 1, 2
DEFAULT_SIZE = (24, 80)


def interactive() -> bool:
    """Whether both input and output are terminals."""
    return os.isatty(STDIN) and os.isatty(STDOUT)


def size() -> tuple[int, int]:
    """Rows and columns of the terminal on standard output; a usual size where there is none."""
    for fd in (STDOUT, STDIN):
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(fd)
            if columns and rows:
                return rows, columns
    return DEFAULT_SIZE


def write_all(fd: int, data: bytes) -> None:
    """Every byte, also where somebody has made the stream non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Every key to the guest, every byte of the guest to the screen, until the block ends."""
    if not os.isatty(STDIN):
        yield
        return
    import tty

    saved = termios.tcgetattr(STDIN)
    try:
        tty.setraw(STDIN, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error, OSError):  # the terminal may be gone (SIGHUP)
            # Not TCSADRAIN: it would wait for a terminal that the user has stopped with Ctrl-S.
            termios.tcsetattr(STDIN, termios.TCSANOW, saved)


def write_json(record: Mapping[str, Any]) -> None:
    """A line of standard error for programs."""
    import json

    write_all(STDERR, json.dumps(record).encode() + b"\n")
