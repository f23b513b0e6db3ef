"""A guest kernel's side of a virtio-fs share, in Python: raw FUSE requests to a real virtiofsd.

::

    with FuseDriver(socket) as fs:
        node = fs.lookup(ROOT, "etc")
        fs.request(MKDIR, node, struct.pack("<II", 0o755, 0) + b"new\\0")   # FuseError(EROFS)

It sends what it is told, as a hostile kernel could. Numbers are those of linux/fuse.h.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
from pathlib import Path
from types import TracebackType

from hostel.abi import vhost_user as vu
from hostel.memory import GuestMemory
from hostel.virtio.mock import DriverQueue

LOOKUP, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK = 1, 3, 4, 5, 6, 8, 9, 10
RENAME, LINK, OPEN, READ, WRITE, SETXATTR, INIT, OPENDIR = 12, 13, 14, 15, 16, 21, 26, 27
READDIR, CREATE, FALLOCATE = 28, 35, 43
ROOT = 1
FATTR_MODE, FATTR_SIZE = 1, 8
PATIENCE = 10.0

_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_MEMORY = 4 << 20
_QUEUES = (0, 1 << 20)


class FuseError(OSError):
    """The daemon answered no."""


class FuseDriver:
    """One connection; requests one after another, as user ``uid`` of the guest."""

    def __init__(self, path: Path, *, uid: int = 0, gid: int = 0) -> None:
        self.uid, self.gid = uid, gid
        self._unique = itertools.count(2, 2)
        self._memory = GuestMemory(_MEMORY)
        self._eventfds = [os.eventfd(0) for _ in range(4)]
        self._queues = [DriverQueue(self._memory, at, 16, heap=1 << 19) for at in _QUEUES]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(os.fspath(path))
        self._handshake()
        init = struct.pack("<IIII", 7, 31, 1 << 16, 0).ljust(64, b"\0")
        self.request(INIT, 0, init)

    def __enter__(self) -> FuseDriver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._memory.close()
        for fd in self._eventfds:
            os.close(fd)

    def request(self, opcode: int, node: int, body: bytes = b"", room: int = 4096) -> bytes:
        """The answer's body; FuseError carries the daemon's errno."""
        unique = next(self._unique)
        header = _IN.pack(_IN.size + len(body), opcode, unique, node, self.uid, self.gid, 1, 0)
        queue, kick, call = self._queues[1], self._eventfds[2], self._eventfds[3]
        # the data of a write lie in a buffer of their own, as a kernel sends them
        split = 40 if opcode == WRITE else len(body)
        parts = [part for part in (header, body[:split], body[split:]) if part]
        queue.add(parts, [_OUT.size, room])
        os.eventfd_write(kick, 1)
        while not (done := queue.completed()):
            if not select.select([call], [], [], PATIENCE)[0]:
                raise TimeoutError(f"no answer to FUSE request {opcode}")
            os.eventfd_read(call)
        _, error, answered = _OUT.unpack_from(done[0].data)
        assert answered == unique
        if error:
            raise FuseError(-error, f"{opcode}: {os.strerror(-error)}")
        return done[0].data[_OUT.size :]

    def send_raw(self, readable: list[bytes], writable: list[int]) -> None:
        """Buffers as they are; no answer is waited for."""
        self._queues[1].add(readable, writable)
        os.eventfd_write(self._eventfds[2], 1)

    # -- the usual ones -----------------------------------------------------------------------

    def lookup(self, node: int, name: str) -> int:
        found: int = struct.unpack_from("<Q", self.request(LOOKUP, node, name.encode() + b"\0"))[0]
        return found

    def owner(self, path: str) -> tuple[int, int]:
        """Uid and gid, as the guest is told."""
        folder, _, name = path.rpartition("/")
        entry = self.request(LOOKUP, self.walk(folder) if folder else ROOT, name.encode() + b"\0")
        uid, gid = struct.unpack_from("<II", entry, 40 + 68)
        return uid, gid

    def walk(self, path: str) -> int:
        node = ROOT
        for name in path.strip("/").split("/"):
            node = self.lookup(node, name)
        return node

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        handle: int = struct.unpack_from(
            "<Q", self.request(OPEN, node, struct.pack("<II", flags, 0))
        )[0]
        return handle

    def read(self, path: str, size: int = 4096) -> bytes:
        node = self.walk(path)
        body = struct.pack("<QQIIQII", self.open(node), 0, size, 0, 0, 0, 0)
        return self.request(READ, node, body, size)

    def write(self, node: int, handle: int, data: bytes) -> None:
        body = struct.pack("<QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        self.request(WRITE, node, body + data)

    def set_attributes(self, node: int, valid: int, *, size: int = 0, mode: int = 0) -> None:
        body = struct.pack(
            "<IIQQQQQQIIIIIIII", valid, 0, 0, size, *(0,) * 4, *(0,) * 3, mode, *(0,) * 4
        )
        self.request(SETATTR, node, body)

    def names(self, node: int = ROOT) -> set[str]:
        (handle,) = struct.unpack_from("<Q", self.request(OPENDIR, node, bytes(8)))
        body = struct.pack("<QQIIQII", handle, 0, 1 << 16, 0, 0, 0, 0)
        data, found = self.request(READDIR, node, body, 1 << 16), set()
        while data:
            _, _, length, _ = struct.unpack_from("<QQII", data)
            found.add(data[24 : 24 + length].decode())
            data = data[-(-(24 + length) // 8) * 8 :]
        return found - {".", ".."}

    def refusal(self, opcode: int, node: int, body: bytes = b"") -> str:
        """The name of the error that a request is answered with; empty if it was granted."""
        try:
            self.request(opcode, node, body)
        except FuseError as error:
            return errno.errorcode[error.errno or 0]
        return ""

    # -- vhost-user ---------------------------------------------------------------------------

    def _handshake(self) -> None:
        self._send(vu.GET_FEATURES, b"")
        self._answer()
        self._send(vu.SET_FEATURES, vu.U64.pack(1 << 32))
        self._send(vu.SET_OWNER, b"")
        (region,) = self._memory.regions
        table = vu.MEMORY_HEADER.pack(1, 0)
        table += vu.MEMORY_REGION.pack(region.gpa, region.size, region.hva, region.offset)
        self._send(vu.SET_MEM_TABLE, table, self._memory.fd)
        for index, queue in enumerate(self._queues):
            addresses = (self._memory.hva(at) for at in (queue.desc, queue.used, queue.avail))
            self._send(vu.SET_VRING_NUM, vu.VRING_STATE.pack(index, queue.size))
            self._send(vu.SET_VRING_BASE, vu.VRING_STATE.pack(index, 0))
            self._send(vu.SET_VRING_ADDR, vu.VRING_ADDR.pack(index, 0, *addresses, 0))
            self._send(vu.SET_VRING_CALL, vu.U64.pack(index), self._eventfds[2 * index + 1])
            self._send(vu.SET_VRING_KICK, vu.U64.pack(index), self._eventfds[2 * index])

    def _send(self, request: int, payload: bytes, *fds: int) -> None:
        message = vu.HEADER.pack(request, vu.VERSION, len(payload)) + payload
        socket.send_fds(self._socket, [message], fds)

    def _answer(self) -> bytes:
        header = self._socket.recv(vu.HEADER.size, socket.MSG_WAITALL)
        return self._socket.recv(vu.HEADER.unpack(header)[2], socket.MSG_WAITALL)
