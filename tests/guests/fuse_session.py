"""A guest's kernel in front of a ``Session``, in this process: one FUSE request after another.

::

    with FuseSession(directory) as fs:
        node = fs.lookup(ROOT, b"sub")
        fs.ask(abi.MKDIR, node, abi.MKDIR_IN.pack(0o755, 0) + b"new\\0")     # OSError: the answer

It sends what it is told: that is how a hostile kernel is played.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hostel.abi import fuse as abi
from hostel.virtio.fuse import FileSystem, Session, Settings
from hostel.virtio.queue import Chain

ROOT = abi.ROOT_ID
EVERY_FLAG = 0x3FFF_FFFF


class Entry(msgspec.Struct, frozen=True):
    """A node as a LOOKUP told of it."""

    node: int
    attributes: dict[str, int]


class FuseSession:
    """``settings`` are those of ``Settings``."""

    def __init__(
        self, path: Path, *, memory: int = 1 << 29, descriptors: int = 1024, **settings: Any
    ) -> None:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.fs = FileSystem(root, Settings(**settings), memory=memory, descriptors=descriptors)
        self.session = Session(self.fs)
        self.uid = self.gid = 0
        self._unique = itertools.count(2, 2)
        self.answer = self.ask(abi.INIT, 0, self.init())

    def __enter__(self) -> FuseSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.session.close()

    @staticmethod
    def init(major: int = 7, minor: int = 36) -> bytes:
        return abi.INIT_IN.pack(major, minor, 1 << 16, EVERY_FLAG).ljust(64, b"\0")

    def header(self, opcode: int, node: int, size: int) -> bytes:
        return abi.IN_HEADER.pack(
            abi.IN_HEADER.size + size, opcode, next(self._unique), node, self.uid, self.gid, 1, 0
        )

    def ask(self, opcode: int, node: int, body: bytes = b"", room: int = 1 << 16) -> bytes:
        header = self.header(opcode, node, len(body))
        split = abi.WRITE_IN.size if opcode == abi.WRITE else len(body)
        parts = [part for part in (header, body[:split], body[split:]) if part]
        answer = self.send(parts, [abi.OUT_HEADER.size, room])
        if not answer:
            return b""
        size, error, _ = abi.OUT_HEADER.unpack_from(answer)
        assert size == len(answer)
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer[abi.OUT_HEADER.size :]

    def send(self, readable: Sequence[bytes], writable: Sequence[int]) -> bytes:
        """Buffers as they are; what came back, header and all."""
        chain = Chain(
            0,
            sum(map(len, readable)) + sum(writable),
            [memoryview(bytearray(part)) for part in readable],
            [memoryview(bytearray(size)) for size in writable],
        )
        written = self.session.serve(chain)
        return b"".join(chain.writable)[:written]

    # -- the usual ones -----------------------------------------------------------------------

    def entry(self, answer: bytes) -> Entry:
        node = abi.ENTRY_OUT.unpack_from(answer)[0]
        return Entry(node, self.attributes(abi.ENTRY_OUT.unpack_from(answer)[-1]))

    @staticmethod
    def attributes(packed: bytes) -> dict[str, int]:
        return dict(zip(abi.ATTR.offsets, abi.ATTR.unpack_from(packed), strict=True))

    def look(self, node: int, name: bytes) -> Entry:
        return self.entry(self.ask(abi.LOOKUP, node, name + b"\0"))

    def lookup(self, node: int, name: bytes) -> int:
        return self.look(node, name).node

    def walk(self, path: str) -> int:
        node = ROOT
        for name in path.strip("/").split("/"):
            node = self.lookup(node, name.encode())
        return node

    def getattr(self, node: int) -> dict[str, int]:
        answer = self.ask(abi.GETATTR, node, abi.GETATTR_IN.pack(0, 0, 0))
        return self.attributes(answer[abi.ATTR_OUT.offsets["attr"] :])

    def setattr(self, node: int, valid: int, **values: int) -> dict[str, int]:
        fields = {name: values.get(name, 0) for name in abi.SETATTR_IN.offsets} | {"valid": valid}
        answer = self.ask(abi.SETATTR, node, abi.SETATTR_IN.pack(*fields.values()))
        return self.attributes(answer[abi.ATTR_OUT.offsets["attr"] :])

    def open(self, node: int, flags: int = os.O_RDONLY, open_flags: int = 0) -> int:
        answer = self.ask(abi.OPEN, node, abi.OPEN_IN.pack(flags, open_flags))
        return int(abi.OPEN_OUT.unpack_from(answer)[0])

    def create(
        self, node: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644
    ) -> tuple[Entry, int]:
        body = abi.CREATE_IN.pack(flags | os.O_CREAT, mode, 0, 0) + name + b"\0"
        answer = self.ask(abi.CREATE, node, body)
        return self.entry(answer), abi.OPEN_OUT.unpack_from(answer, abi.ENTRY_OUT.size)[0]

    def mkdir(self, node: int, name: bytes, mode: int = 0o755) -> int:
        return self.entry(self.ask(abi.MKDIR, node, abi.MKDIR_IN.pack(mode, 0) + name + b"\0")).node

    def read(self, handle: int, size: int, offset: int = 0) -> bytes:
        return self.ask(abi.READ, ROOT, abi.READ_IN.pack(handle, offset, size, 0, 0, 0, 0))

    def write(self, handle: int, data: bytes, offset: int = 0, flags: int = 0) -> int:
        body = abi.WRITE_IN.pack(handle, offset, len(data), flags, 0, 0, 0) + data
        return int(abi.WRITE_OUT.unpack(self.ask(abi.WRITE, ROOT, body))[0])

    def release(self, handle: int) -> None:
        self.ask(abi.RELEASE, ROOT, abi.RELEASE_IN.pack(handle, 0, 0, 0))

    def content(self, path: str, size: int = 1 << 16) -> bytes:
        handle = self.open(self.walk(path))
        try:
            return self.read(handle, size)
        finally:
            self.release(handle)

    def rename(self, node: int, name: bytes, to: int, new: bytes, flags: int = 0) -> None:
        body = abi.RENAME2_IN.pack(to, flags, 0) + name + b"\0" + new + b"\0"
        self.ask(abi.RENAME2, node, body)

    def forget(self, node: int, count: int = 1) -> None:
        self.ask(abi.FORGET, node, abi.FORGET_IN.pack(count))

    def list(
        self, node: int, *, plus: bool = False, room: int = 4096
    ) -> Iterator[tuple[bytes, int]]:
        """Names, and nodes if ``plus``."""
        opened = self.ask(abi.OPENDIR, node, abi.OPEN_IN.pack(0, 0))
        handle = abi.OPEN_OUT.unpack(opened)[0]
        offset, skip = 0, abi.ENTRY_OUT.size if plus else 0
        opcode = abi.READDIRPLUS if plus else abi.READDIR
        while data := self.ask(opcode, node, abi.READ_IN.pack(handle, offset, room, 0, 0, 0, 0)):
            while data:
                _, offset, length, _ = abi.DIRENT.unpack_from(data, skip)
                start = skip + abi.DIRENT.size
                found = abi.ENTRY_OUT.unpack_from(data)[0] if plus else 0
                yield data[start : start + length], found
                data = data[-(-(start + length) // 8) * 8 :]
        self.ask(abi.RELEASEDIR, node, abi.RELEASE_IN.pack(handle, 0, 0, 0))
