"""How fast this host's time-stamp counter runs, which an emulated processor hands to its kernel as its own.

A kernel learns that rate by holding the counter against the PIT or the HPET. Both are emulated: on a busy
host it once got it wrong, and all time in there ran some five times too fast, as ``tsc=reliable`` forbids to
doubt it. So the kernel is told (``tsc_early_khz``). ``hostel.qemu.tsc`` does the same for its guests: what
tests hostel does not use it.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl $32, %rdx; or %rdx, %rax; ret
SECONDS = 0.05
TRIES = 8


def frequency_khz() -> int | None:
    """None where we may not run code of our own."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(RDTSC)
    code = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
    _, counter, now = min(_sample(read) for _ in range(TRIES))
    time.sleep(SECONDS)
    _, later, then = min(_sample(read) for _ in range(TRIES))
    del code
    page.close()
    return round((later - counter) * 1e6 / (then - now))


def _sample(read: Callable[[], int]) -> tuple[int, int, int]:
    """How long it took, the counter, the time (ns). What took long was interrupted in the middle."""
    before = read()
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    return read() - before, before, now
