"""How fast this host's time-stamp counter runs.

A guest of QEMU's TCG reads the host's counter. To learn its rate a guest's kernel holds it against the
PIT or the PM timer, and on a busy host it gives up; on ``microvm``, which has no other clock, the boot
then hangs (16 of 16 times with eight busy processes on two cores, 2 of 30 without). So we say what it is
(``tsc_early_khz``), which also saves the guest that work.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

_RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl $32, %rdx; or %rdx, %rax; ret
_SECONDS = 0.01
_TRIES = 8


def frequency_khz() -> int | None:
    """To about 0.01 %; None where we may not run code of our own (SELinux, PaX)."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(_RDTSC)
    code = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
    first = min(_sample(read) for _ in range(_TRIES))
    time.sleep(_SECONDS)
    last = min(_sample(read) for _ in range(_TRIES))
    del code
    page.close()
    return round((last[1] - first[1]) * 1e6 / (last[2] - first[2]))


def _sample(read: Callable[[], int]) -> tuple[int, int, int]:
    """How long it took, the counter, the time (ns). What took long was interrupted in the middle."""
    before = read()
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    return read() - before, before, now
