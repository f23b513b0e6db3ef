"""A guest's conversation with a file system: INIT, then requests, one after another.

::

    chain ─► Request ─► OPERATIONS[opcode](fs, request) ─► answer in the chain, bytes written
                        └ OSError: its number is the answer

A read-only file system has no table entry for what changes it: EROFS, whatever the mounts below say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from errno import EINVAL, EIO, ENOSYS, EPROTO, EROFS
from typing import Any

from hostel.abi import fuse as abi
from hostel.virtio.queue import Chain

from . import attributes, directories, files, names
from .filesystem import Answer, FileSystem
from .nodes import refuse
from .request import Request

OLDEST_MINOR = 31
"""Linux 5.4, the first with virtiofs."""
MAX_PAGES = 256
PAGE = 4096
_WANTED = (
    abi.ASYNC_READ
    | abi.ATOMIC_O_TRUNC
    | abi.EXPORT_SUPPORT
    | abi.BIG_WRITES
    | abi.AUTO_INVAL_DATA
    | abi.DO_READDIRPLUS
    | abi.READDIRPLUS_AUTO
    | abi.ASYNC_DIO
    | abi.PARALLEL_DIROPS
    | abi.MAX_PAGES
    | abi.HANDLE_KILLPRIV_V2
    | abi.SETXATTR_EXT
)

Operation = Callable[[FileSystem, Request], Answer]


class Session:
    """Serves one file system to one guest; not thread-safe."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.requests: Counter[int] = Counter()
        self._operations = _operations(fs.settings.read_only)
        self._ready = False

    def serve(self, chain: Chain) -> int:
        """Do what it asks; how many bytes of its writable buffers are new. ``FuseFault``: see there."""
        request = Request(chain)
        opcode = request.opcode
        self.requests[opcode] += 1
        try:
            answer = self._answer(request)
        except (OSError, OverflowError) as error:  # the latter: a number that no such call takes
            if opcode in (abi.FORGET, abi.BATCH_FORGET):
                return 0
            return request.answer(b"", getattr(error, "errno", EINVAL) or EIO)
        if answer is None:
            return 0
        if isinstance(answer, int):
            return request.answer_in_place(answer)
        return request.answer(answer)

    def _answer(self, request: Request) -> Answer:
        operation = self._operations.get(request.opcode)
        if self._ready and operation is not None:
            return operation(self.fs, request)
        if request.opcode == abi.INIT:
            return self._init(request)
        if request.opcode == abi.DESTROY:
            self._destroy()
            return b""
        if request.opcode == abi.INTERRUPT:
            return None
        return refuse((ENOSYS if request.opcode else EINVAL) if self._ready else EIO)

    def _init(self, request: Request) -> bytes:
        """Also where a guest has rebooted without a word: what it knew is void."""
        major, minor, readahead, flags = request.arguments(abi.INIT_IN)
        if major < abi.KERNEL_VERSION or (major == abi.KERNEL_VERSION and minor < OLDEST_MINOR):
            refuse(EPROTO)
        self._destroy()
        self._ready = major == abi.KERNEL_VERSION  # a later one asks again, in our version
        wanted = _WANTED
        if self.fs.settings.cache == "always":
            wanted |= abi.CACHE_SYMLINKS
        if self.fs.settings.cache == "none":
            wanted &= ~(abi.DO_READDIRPLUS | abi.READDIRPLUS_AUTO)
        return abi.INIT_OUT.pack(
            abi.KERNEL_VERSION,
            abi.KERNEL_MINOR_VERSION,
            readahead,
            flags & wanted,
            0,  # requests in the background: the guest's own default
            0,
            MAX_PAGES * PAGE,
            1,  # nanosecond: the grain of times
            MAX_PAGES,
            0,
            0,
            bytes(28),
        )

    def _destroy(self) -> None:
        self.fs.clear()
        self._ready = False

    def close(self) -> None:
        self.fs.close()

    def statistics(self) -> dict[str, Any]:
        return {
            "requests": self.requests.total(),
            "nodes": len(self.fs.table),
            "open_directories": self.fs.table.open_count,
            "handles": len(self.fs.handles),
        }


def _operations(read_only: bool) -> dict[int, Operation]:
    rooms = (names, attributes, files, directories)
    operations: dict[int, Operation] = {}
    for room in rooms:
        operations |= room.OPERATIONS
    for room in (names, attributes, files):
        for opcode, change in room.CHANGES.items():
            operations[opcode] = _refuse_to_write if read_only else change
    return operations


def _refuse_to_write(fs: FileSystem, request: Request) -> Answer:
    return refuse(EROFS)
