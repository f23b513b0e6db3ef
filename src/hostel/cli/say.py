"""What hostel itself says: always on standard error, because standard output is the guest's.

::

    error     always             hostel: message; cost; cure    and the guest's last console lines
    note      not with -q        hostel: message
    detail    with --verbose     hostel: message
    progress  on a terminal, not with -q: one line that is replaced, and gone at the end

Text that comes from a guest or a file name is printed without its control characters: it could drive
the terminal. A standard error that is closed or full is no reason to fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from hostel.errors import HostelError

_CONTROL = r"[\x00-\x1f\x7f-\x9f]+"

RED, YELLOW, GREEN, BOLD, DIM = "31", "33", "32", "1", "2"


def plain(text: str) -> str:
    """One line without control characters."""
    return re.sub(_CONTROL, " ", text).strip()


def colored(stream: TextIO) -> bool:
    """Whether to colour what goes to ``stream`` (https://no-color.org: any non-empty value says no)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, stream: TextIO) -> str:
    """``text`` in a colour where the stream shows colours."""
    return f"\x1b[{code}m{text}\x1b[0m" if colored(stream) else text


class Say:
    """The voice of one command."""

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.debug = False
        self._progress = False

    def error(self, error: HostelError) -> None:
        """The one line, what the guest's console said last, and the log if there is one."""
        self._line(str(error), RED)
        for line in error.console.splitlines():
            self._write(paint(f"  | {plain(line)}", DIM, sys.stderr) + "\n")
        if error.log and Path(error.log).exists():
            self._line(f"log: {error.log}")

    def fail(self, message: str) -> None:
        """An error that is only a line."""
        self._line(message, RED)

    def note(self, message: str) -> None:
        """What the user should know."""
        if not self.quiet:
            self._line(message)

    def detail(self, message: str) -> None:
        """What an asking user wants to know."""
        if self.verbose or self.debug:
            self._line(message)

    def progress(self, message: str) -> None:
        """What goes on now; an empty message removes the line."""
        if self.quiet or not _terminal(sys.stderr) or not (message or self._progress):
            return
        self._write("\r\x1b[K" + plain(message))
        self._progress = bool(message)

    def _line(self, message: str, color: str = "") -> None:
        self.progress("")
        name = paint("hostel:", color, sys.stderr) if color else "hostel:"
        self._write(f"{name} {plain(message)}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text.encode(errors="replace").decode())
            sys.stderr.flush()


def _terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


say = Say()
"""One process is one command, so there is one voice."""
