"""One ioctl, and what becomes of its failure: the border where ``OSError`` ends."""

from __future__ import annotations

import ctypes
import os
from fcntl import ioctl

from hostel.errors import KvmError

Argument = int | bytearray | ctypes.Structure | ctypes.c_uint64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


def call(fd: int, name: str, request: int, argument: Argument = 0) -> int:
    """``ioctl``; a structure or a ``bytearray`` is filled in place."""
    try:
        return ioctl(fd, request, argument)
    except OSError as error:
        raise refused(name, error) from error


def call_with_address(fd: int, name: str, request: int, address: int) -> None:
    """An ioctl whose argument is an address as a plain number: ``fcntl.ioctl`` takes a C ``int``,
    which an address above 2 GiB is not."""
    if _libc.ioctl(fd, request, address) < 0:
        number = ctypes.get_errno()
        raise refused(name, OSError(number, os.strerror(number)))


def refused(name: str, error: OSError) -> KvmError:
    return KvmError(f"{name} failed: {error.strerror}")


def errno_of(error: KvmError) -> int:
    """The number behind a failed ``call``, where a caller can mend the cause."""
    cause = error.__cause__
    return (cause.errno or 0) if isinstance(cause, OSError) else 0
