"""A timer for the event loop that is exact to microseconds, where the loop's own is to milliseconds.

timerfd_create(2): one file descriptor, readable when the time has come.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable

from hostel.errors import HostError

from .loop import EventLoop

_CLOEXEC, _NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
_libc = ctypes.CDLL(None, use_errno=True)
_ITIMERSPEC = struct.Struct("<4q")


class Timer:
    """Calls ``callback()`` on the loop's thread, once for each ``arm``."""

    def __init__(self, loop: EventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, _CLOEXEC | _NONBLOCK)
        if self._fd < 0:
            raise HostError(f"the host refused a timer: {os.strerror(ctypes.get_errno())}")
        loop.add(self._fd, self._expired)

    def arm(self, seconds: float) -> None:
        """From any thread. Arming again forgets the time before; 0 is now."""
        nanoseconds = max(int(seconds * 1e9), 1)  # 0 would disarm
        value = _ITIMERSPEC.pack(0, 0, *divmod(nanoseconds, 1_000_000_000))
        _libc.timerfd_settime(self._fd, 0, value, None)

    def close(self) -> None:
        self._loop.remove(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):  # armed anew meanwhile
            os.read(self._fd, 8)
            self._callback()
