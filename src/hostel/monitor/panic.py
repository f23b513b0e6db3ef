"""A kernel panic, read off the console: Linux has no other way to say it to every monitor.

::

    Kernel panic - not syncing: why      then a reset (``panic=-1``): the monitor asks ``message``
    ---[ end Kernel panic - …  ]---      it stays like this for ever: ``halted`` is called

Anybody in the guest may print these words. Before a reset they change only how the ending is called.
The second line ends the machine, so it has to be the last thing on the console for a while.
"""

from __future__ import annotations

from collections.abc import Callable

from hostel.console import Console

PANIC = b"Kernel panic - not syncing"
HALTED = b"---[ end " + PANIC
QUIET_SECONDS = 2.0
_LONGEST_LINE = 1024


class PanicWatch:
    """Subscribes to ``console``; ``later(seconds, callback)`` is the event loop's."""

    def __init__(
        self,
        console: Console,
        later: Callable[[float, Callable[[], None]], None],
        halted: Callable[[], None],
    ) -> None:
        self._console = console
        self._later = later
        self._halted = halted
        self._line = b""
        self.message = ""
        """The panic's own line, since the last power-on."""
        self.cancel = console.subscribe(self._feed)

    def power_on(self) -> None:
        self.message = ""
        self._line = b""

    def _feed(self, data: bytes) -> None:
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[-_LONGEST_LINE:]
        for line in lines:
            if PANIC in line:
                self._found(line)

    def _found(self, line: bytes) -> None:
        if HALTED in line:
            total = self._console.total
            self._later(QUIET_SECONDS, lambda: self._check_quiet(total))
        elif not self.message:
            text = line[line.index(PANIC) :].decode("utf-8", "replace")
            self.message = "".join(c for c in text if c.isprintable())

    def _check_quiet(self, total: int) -> None:
        if self.message and self._console.total == total:
            self._halted()
