"""The bytes of an image: a file, or memory that looks like one. Every read is checked against its size.

An image is input. Whoever parses one reads through a ``Source``, so that an offset or a length in the
image that leads past its end is an ``ImageError`` that says so, and nothing else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from hostel.errors import HostError, ImageError
from hostel.memory import GuestMemory


class Source:
    """An open image. A context manager; it owns its file descriptor."""

    def __init__(self, fd: int, size: int, name: str, modified: int = 0) -> None:
        self.fd = fd
        self.size = size
        self.name = name
        """What the caller called it, for messages."""
        self.modified = modified
        """Nanoseconds since the epoch."""

    @classmethod
    def open(cls, path: Path, what: str = "kernel") -> Source:
        """``ImageError`` unless ``path`` is a regular file that we may read and that is not empty."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise ImageError(f"there is no {what} at {path}") from None
        except PermissionError:
            raise ImageError(
                f"no permission to read the {what} {path}",
                cure=f"chmod a+r {path}, or run as its owner",
            ) from None
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot open the {what} {path}: {error}") from None
        info = os.fstat(fd)
        if problem := _not_a_file(info):
            os.close(fd)
            raise ImageError(f"{path} is {problem}, not a {what}")
        return cls(fd, info.st_size, str(path), info.st_mtime_ns)

    @classmethod
    def of_bytes(cls, data: bytes | bytearray | memoryview, name: str) -> Source:
        """A file of its own in memory, for bytes that came from no file."""
        try:
            fd = os.memfd_create("hostel-image", os.MFD_CLOEXEC)
        except OSError as error:
            raise HostError(f"no memory for {name}: {error.strerror}") from None
        source = cls(fd, len(data), name)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
        except OSError as error:
            source.close()
            raise HostError(f"no memory for {name}: {error.strerror}") from None
        return source

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size) if self._inside(offset, size) else bytearray()
        self._fill(offset, memoryview(data))
        return bytes(data)

    def head(self, size: int) -> bytes:
        """The first ``size`` bytes, or all there are."""
        return self.read(0, min(size, self.size))

    def copy(self, offset: int, size: int, memory: GuestMemory, gpa: int) -> None:
        """Into guest memory, straight from the file."""
        self._inside(offset, size)
        try:
            memory.receive(gpa, size, self.fd, offset)
        except OSError as error:
            raise ImageError(f"cannot load {self.name}: {error.strerror}") from None
        except EOFError:
            raise ImageError(f"{self.name} became shorter while it was read") from None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _inside(self, offset: int, size: int) -> bool:
        if size < 0 or offset < 0 or offset + size > self.size:
            raise ImageError(
                f"{self.name} is truncated: it has {self.size} bytes, and its headers lead to byte"
                f" {offset + size}"
            )
        return True

    def _fill(self, offset: int, view: memoryview) -> None:
        while len(view):
            try:
                count = os.preadv(self.fd, [view], offset)
            except OSError as error:
                raise ImageError(f"cannot read {self.name}: {error.strerror}") from None
            if count == 0:
                raise ImageError(f"{self.name} became shorter while it was read")
            offset += count
            view = view[count:]


def _not_a_file(info: os.stat_result) -> str:
    if stat.S_ISDIR(info.st_mode):
        return "a directory"
    if not stat.S_ISREG(info.st_mode):
        return "no regular file"
    return "" if info.st_size else "an empty file"
