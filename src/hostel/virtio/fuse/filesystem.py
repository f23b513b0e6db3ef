"""A shared directory as a FUSE file system: its state, and what every operation needs.

The operations themselves are tables of functions, ``OPERATIONS`` in ``names``, ``attributes``, ``files``
and ``directories``; ``session`` calls them. One thread at a time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from errno import EBADF, EMFILE, ENFILE
from typing import Literal

import msgspec

from hostel.abi import fuse as abi

from . import host
from .nodes import Node, NodeTable, refuse
from .request import Request

BYTES_OF_AN_INODE = 768
"""What a Linux guest's kernel keeps of one, at the least: a guest of so much memory has so many."""
BYTES_OF_AN_OPEN_FILE = 16 << 10
"""Guest memory for each file that it may have open: ours to hold, and the host kernel's."""
FEW_HANDLES = 1024
FOREVER = 86400
SHORTLY = 1
_NANO = 1_000_000_000


class Settings(msgspec.Struct, frozen=True):
    read_only: bool = False
    cache: Literal["auto", "always", "none"] = "auto"
    owner: tuple[int, int] | None = None
    """Uid and gid in the guest that stand for ours."""
    xattr: bool = False
    """``user.*`` only: ACLs and capabilities of the host mean nothing in a guest."""


class Handle:
    """An open file or directory. ``buffer``, ``at`` and ``offset``: what was read of a directory."""

    __slots__ = ("at", "buffer", "fd", "offset", "writable")

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        self.writable = writable
        self.buffer = b""
        self.at = 0
        self.offset = 0


Answer = bytes | int | None
"""A body; the size of one that is in the guest's memory already; or none at all."""


class FileSystem:
    """``root``, the directory's descriptor, belongs to it. ``memory``: the guest's, in bytes."""

    def __init__(self, root: int, settings: Settings, *, memory: int, descriptors: int) -> None:
        self.settings = settings
        self.table = NodeTable(
            root, most_nodes=memory // BYTES_OF_AN_INODE, most_open=min(descriptors // 4, 4096)
        )
        self.proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.handles: dict[int, Handle] = {}
        self.validity = {"auto": SHORTLY, "always": FOREVER, "none": 0}[settings.cache]
        self._next_handle = 1
        self._most_handles = min(
            descriptors // 2, max(FEW_HANDLES, memory // BYTES_OF_AN_OPEN_FILE)
        )
        self._uid, self._gid = os.geteuid(), os.getegid()
        self.is_root = self._uid == 0

    def clear(self) -> None:
        """The guest starts anew, or went."""
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()
        self.table.clear()

    def close(self) -> None:
        self.clear()
        self.table.close()
        os.close(self.proc)

    # -- handles ------------------------------------------------------------------------------

    def handle(self, number: int) -> Handle:
        handle = self.handles.get(number)
        return handle if handle is not None else refuse(EBADF)

    def keep(self, fd: int, *, writable: bool) -> int:
        if len(self.handles) >= self._most_handles:
            os.close(fd)
            refuse(ENFILE)
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = Handle(fd, writable=writable)
        return number

    def release(self, number: int) -> None:
        handle = self.handles.pop(number, None)
        if handle is None:
            refuse(EBADF)
        os.close(handle.fd)

    def reopen(self, path_fd: int, flags: int) -> int:
        """What an O_PATH descriptor stands for: nothing can come in between."""
        return self.with_room(lambda: os.open(b"%d" % path_fd, flags, dir_fd=self.proc))

    def with_room(self, opening: Callable[[], int]) -> int:
        """Once more, with fewer directories open, where the process has no descriptor left."""
        try:
            return opening()
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE) or not self.table.make_room():
                raise
            return opening()

    # -- users --------------------------------------------------------------------------------

    def acting_as(self, request: Request) -> AbstractContextManager[None]:
        """What a guest's user makes is theirs, if we are root; else ours."""
        if not self.is_root:
            return nullcontext()
        return host.acting_as(self.host_uid(request.uid), self.host_gid(request.gid))

    def host_uid(self, uid: int) -> int:
        owner = self.settings.owner
        return self._uid if owner and uid == owner[0] else uid

    def host_gid(self, gid: int) -> int:
        owner = self.settings.owner
        return self._gid if owner and gid == owner[1] else gid

    # -- attributes ---------------------------------------------------------------------------

    def attributes(self, found: os.stat_result) -> bytes:
        uid, gid = found.st_uid, found.st_gid
        if owner := self.settings.owner:
            uid = owner[0] if uid == self._uid else uid
            gid = owner[1] if gid == self._gid else gid
        atime, atime_ns = divmod(found.st_atime_ns, _NANO)
        mtime, mtime_ns = divmod(found.st_mtime_ns, _NANO)
        ctime, ctime_ns = divmod(found.st_ctime_ns, _NANO)
        return abi.ATTR.pack(
            found.st_ino,
            found.st_size,
            found.st_blocks,
            atime & _U64,
            mtime & _U64,
            ctime & _U64,
            atime_ns,
            mtime_ns,
            ctime_ns,
            found.st_mode,
            found.st_nlink & _U32,
            uid,
            gid,
            found.st_rdev & _U32,
            found.st_blksize & _U32,
            0,
        )

    def attributes_answer(self, found: os.stat_result) -> bytes:
        return abi.ATTR_OUT.pack(self._trust(found), 0, 0, self.attributes(found))

    def entry(self, parent: Node, name: bytes, found: os.stat_result) -> bytes:
        """The guest is told of a node."""
        node = self.table.remember(parent, name, found)
        return self.entry_of(node, found)

    def entry_of(self, node: Node, found: os.stat_result) -> bytes:
        valid, trust = self.validity, self._trust(found)
        return abi.ENTRY_OUT.pack(node.id, 0, valid, trust, 0, 0, self.attributes(found))

    def _trust(self, found: os.stat_result) -> int:
        """Seconds for which attributes hold. A write takes setuid away here (HANDLE_KILLPRIV_V2), and
        the guest's kernel, which hears nothing of that, must not run the file as it was."""
        may_lose = found.st_mode & _SET_IDS and stat.S_ISREG(found.st_mode)
        return 0 if may_lose and not self.settings.read_only else self.validity


_SET_IDS = stat.S_ISUID | stat.S_ISGID
_U32, _U64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
