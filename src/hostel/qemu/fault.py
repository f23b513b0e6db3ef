"""What QEMU tells nobody but its log: that a processor met a triple fault.

QMP calls it ``guest-reset``, as a reboot. TCG writes a line to the log of CPU resets (``-d cpu_reset``)
before it asks for the reset; beside it some 3 KB of registers at each reset of each vCPU. So the log is
a pipe: nothing of it is kept, and it cannot grow. ::

    Triple fault
    CPU Reset (CPU 0)
    EAX=00000000 …
    EIP=000efaad …        where it was: SeaBIOS, which after a guest's reset resets once more, by one

With ``-no-reboot`` no registers follow; then no firmware has run since power-on either, and it was the
guest's.

Under KVM there is no such line (KVM_EXIT_SHUTDOWN ends in the same request). What shows there is that
the guest never gets far: ``ResetLoop``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from io import FileIO

from hostel.vmm.loop import EventLoop

_LINE = b"Triple fault"
_WHERE = re.compile(_LINE + rb"\n.*?[ER]IP=([0-9a-f]+)", re.DOTALL)
_FIRMWARE = range(0xC_0000, 0x10_0000)
_CHUNK = 1 << 16
SOON = 1.0
"""Seconds. No reboot that anyone wants comes so soon, ten times in a row."""
RESETS = 10
"""Of QMP's, not the guest's: firmware may add one of its own to each."""


class FaultLog:
    """Reads the log from ``pipe``, which it owns, on the event loop."""

    def __init__(self, loop: EventLoop, pipe: FileIO, on_fault: Callable[[], None]) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._loop = loop
        self._pipe = pipe
        self._rest = b""
        self._on_fault = on_fault
        loop.add(pipe.fileno(), self._ready)

    def drain(self) -> None:
        """Take all that is there now. On the loop's thread, or when it has stopped."""
        with contextlib.suppress(BlockingIOError):
            while self._take():
                pass

    def ends_in_fault(self) -> bool:
        return _LINE in self._rest

    def close(self) -> None:
        if not self._pipe.closed:
            self._loop.remove(self._pipe.fileno())
            self._pipe.close()

    def _ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._take():
                self._loop.remove(self._pipe.fileno())

    def _take(self) -> bool:
        data = os.read(self._pipe.fileno(), _CHUNK)
        self._rest += data
        while match := _WHERE.search(self._rest):
            self._rest = self._rest[match.end() :]
            if int(match[1], 16) not in _FIRMWARE:
                self._on_fault()
        begun = self._rest.find(_LINE)
        self._rest = self._rest[begun if begun >= 0 else 1 - len(_LINE) :]
        return bool(data)


class ResetLoop:
    """Counts resets that came ``SOON`` after the one before, or after power-on."""

    def __init__(self) -> None:
        self.count = 0
        self._last = time.monotonic()

    @property
    def endless(self) -> bool:
        return self.count >= RESETS

    def reset(self) -> None:
        now = time.monotonic()
        self.count = self.count + 1 if now - self._last < SOON else 0
        self._last = now
