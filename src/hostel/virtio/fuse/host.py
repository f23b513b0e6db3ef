"""System calls that Python has no function for, or none that takes what we have. x86-64.

Each raises OSError like those of ``os``. The number of getdents64 is that of x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

NR_GETDENTS64 = 217
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.syscall.restype = ctypes.c_long


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64)]


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def getdents(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    """Fill ``buffer`` with ``struct linux_dirent64``, from where the descriptor stands (getdents(2))."""
    return _check(_libc.syscall(NR_GETDENTS64, fd, buffer, len(buffer)))


def rename(source: int, name: bytes, target: int, new_name: bytes, flags: int) -> None:
    _check(_libc.renameat2(source, name, target, new_name, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(fd, mode, offset, length))


def set_times(directory: int, name: bytes, times: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Of access and change: seconds and nanoseconds, or UTIME_NOW, UTIME_OMIT (utimensat(2))."""
    array = (_Timespec * 2)(*(_Timespec(*pair) for pair in times))
    _check(_libc.utimensat(directory, name, array, 0))


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """What this thread makes meanwhile is theirs (setfsuid(2)); for a server that is root."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def keep_capabilities(numbers: tuple[int, ...]) -> None:
    """Only these, and those whoever we act as: the guest's kernel has checked its user's rights."""
    _check(_libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
    mask = sum(1 << number for number in numbers)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, data))
    for word in (0, 1):  # effective, permitted
        data[word] &= mask
        data[word + 3] &= mask >> 32
    _check(_libc.capset(header, data))
