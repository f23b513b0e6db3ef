"""Who else has a disk open: locks that QEMU's programs keep too.

::

    byte 100 + n   held by who uses permission n       byte 200 + n   by who lets nobody else use it
                   0 read, 1 write                                    1 write, 3 resize

All are shared locks of an open file description (fcntl(2), F_OFD_SETLK), so any number may hold one;
to ask whether anyone does is to ask whether an exclusive one could be had (QEMU block/file-posix.c,
RAW_LOCK_PERM_BASE). They go with the descriptor, however its process ends.
"""

from __future__ import annotations

import fcntl
import struct

_USED, _DENIED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")  # struct flock


def lock(fd: int, *, write: bool) -> bool:
    """Take the disk for reading, or for writing alone. ``False``: somebody has it."""
    uses = (_READ, _WRITE) if write else (_READ,)
    denies = (_WRITE, _RESIZE)
    for byte in (*(_USED + one for one in uses), *(_DENIED + one for one in denies)):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _record(fcntl.F_RDLCK, byte))
    asked = (*(_DENIED + one for one in uses), *(_USED + one for one in denies))
    return not any(_held(fd, byte) for byte in asked)


def _held(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _record(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _record(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, 0, byte, 1, 0)
