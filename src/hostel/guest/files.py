"""Copying files and trees into and out of a guest.

Both ways one stream carries entries (the agent's ``files.c`` has the layout): what a file is, then its
bytes. A directory comes before what is in it, and once more after it, when nothing changes it any more.

What comes *out* is the guest's word and is not trusted. A name is a chain of plain components; each is
opened below the one before without following symbolic links, so that neither ``..`` nor a link that the
guest has just sent leads out of the destination. Permission bits are kept, ownership and set-uid bits
are not. Symbolic links are copied as they are, wherever they point: nothing here follows them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hostel.errors import AgentError, HostError, UserError

from .process import Stream
from .protocol import (
    KEEP,
    KEEP_TIME,
    MAX_PAYLOAD,
    Channel,
    EntryKind,
    PackFlag,
    Reader,
    Type,
    Writer,
)

if TYPE_CHECKING:
    from .client import AgentClient

_FIXED = 32
_MAX_NAME = 4096
_MAX_GET = 1 << 30


class Entry(msgspec.Struct, frozen=True):
    """One file, directory or link. ``name`` is relative to what was copied, which itself is ``""``."""

    kind: EntryKind
    name: str = ""
    mode: int = KEEP
    uid: int = KEEP
    gid: int = KEEP
    mtime_ns: int = KEEP_TIME
    size: int = 0
    link: str = ""

    def encode(self) -> bytearray:
        writer = Writer().u32(self.kind, self.mode, self.uid, self.gid)
        return writer.i64(self.mtime_ns).u64(self.size).string(self.name).string(self.link).data


_END = Entry(EntryKind.END)


# Into the guest


def put(
    client: AgentClient, path: str, data: bytes, *, mode: int, uid: int, gid: int, mtime_ns: int
) -> None:
    """One file with this content."""
    with _unpacking(client, path) as stream:
        stream.write(Entry(EntryKind.FILE, "", mode, uid, gid, mtime_ns, len(data)).encode())
        stream.write(data)


def copy_in(client: AgentClient, source: Path, target: str) -> None:
    """A file or tree of the host to ``target`` in the guest, into it if that is a directory there.

    Modes, times, owners (by number) and symbolic links are kept; devices, pipes and sockets are left
    out. ``source`` itself is followed if it is a link.
    """
    try:
        info = source.stat()
        with _unpacking(client, target, inside=source.resolve().name) as stream:
            _send(stream, str(source), "", info)
    except OSError as error:
        raise UserError(f"{error.filename or source} cannot be copied: {error.strerror}") from None


@contextlib.contextmanager
def _unpacking(client: AgentClient, path: str, inside: str = "") -> Iterator[Stream]:
    """A stream to write entries to. If the guest ends it early, its reason is the one to report."""
    stream = client.request(Type.UNPACK, Writer().string(path).string(inside).data)
    try:
        yield stream
        stream.write(_END.encode())
        stream.close_stdin()
    except AgentError:
        stream.finished()
        raise
    except BaseException:
        stream.close_stdin()
        raise
    if stream.finished().returncode:
        raise AgentError(f"the guest did not take {path}")


def _send(stream: Stream, path: str, name: str, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        stream.write(_entry(EntryKind.SYMLINK, name, info, link=os.readlink(path)).encode())
    elif stat.S_ISDIR(info.st_mode):
        _send_directory(stream, path, name, info)
    elif stat.S_ISREG(info.st_mode):
        _send_file(stream, path, name)


def _send_directory(stream: Stream, path: str, name: str, info: os.stat_result) -> None:
    stream.write(_entry(EntryKind.DIRECTORY, name, info).encode())
    with os.scandir(path) as items:
        for item in items:
            inner = f"{name}/{item.name}" if name else item.name
            with contextlib.suppress(FileNotFoundError):  # gone since
                _send(stream, item.path, inner, item.stat(follow_symlinks=False))
    stream.write(_entry(EntryKind.LEAVE, name, info).encode())


def _send_file(stream: Stream, path: str, name: str) -> None:
    """Exactly as many bytes as announced, whatever becomes of the file meanwhile."""
    with open(path, "rb", buffering=0) as file:
        info = os.fstat(file.fileno())
        stream.write(_entry(EntryKind.FILE, name, info, size=info.st_size).encode())
        left = info.st_size
        while left:
            data = file.read(min(left, MAX_PAYLOAD)) or bytes(min(left, MAX_PAYLOAD))
            stream.write(data)
            left -= len(data)


def _entry(
    kind: EntryKind, name: str, info: os.stat_result, size: int = 0, link: str = ""
) -> Entry:
    mode = stat.S_IMODE(info.st_mode)
    return Entry(kind, name, mode, info.st_uid, info.st_gid, info.st_mtime_ns, size, link)


# Out of the guest


def get(client: AgentClient, path: str) -> bytes:
    """One file's content, up to 1 GiB."""
    incoming = _Incoming(client, path)
    entry = incoming.entry()
    if entry.kind is not EntryKind.FILE:
        incoming.abandon()
        raise AgentError(f"{path} in the guest is not a file")
    if entry.size > _MAX_GET:
        incoming.abandon()
        raise AgentError(f"{path} in the guest has {entry.size} bytes", cure="copy it to a file")
    content = b"".join(incoming.data(entry.size))
    incoming.finish()
    return content


def list_directory(client: AgentClient, path: str) -> list[Entry]:
    """What is in a directory of the guest, or the one entry of a file, sorted by name."""
    incoming = _Incoming(client, path, PackFlag.NO_DATA | PackFlag.SHALLOW)
    entries = [entry for entry in incoming if entry.kind is not EntryKind.LEAVE]
    inner = [entry for entry in entries if entry.name]
    is_directory = any(e.kind is EntryKind.DIRECTORY and not e.name for e in entries)
    return sorted(inner if is_directory else entries, key=lambda entry: entry.name)


def copy_out(client: AgentClient, source: str, target: Path) -> None:
    """A file or tree of the guest to ``target`` on the host, into it if that is a directory."""
    if target.is_dir():
        name = source.rstrip("/").rpartition("/")[2]
        if not _is_plain(name):
            raise UserError(
                f"{source!r} has no name of its own", cure=f"name the copy: {target}/NAME"
            )
        target /= name
    incoming = _Incoming(client, source)
    with _Destination(target) as destination:
        try:
            for entry in incoming:
                destination.add(entry, incoming.data(entry.size))
        except BaseException:
            incoming.abandon()
            raise


class _Incoming:
    """The entries of a PACK, and the bytes after each."""

    def __init__(self, client: AgentClient, path: str, flags: int = 0) -> None:
        self._stream = client.request(Type.PACK, Writer().u32(flags).string(path).data)
        self._rest = memoryview(b"")

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self.entry()).kind is not EntryKind.END:
            yield entry
        self.finish()

    def entry(self) -> Entry:
        fields = Reader(self._exactly(_FIXED))
        number, mode, uid, gid = (fields.u32() for _ in range(4))
        mtime, size = fields.i64(), fields.u64()
        name, link = self._string(), self._string()
        try:
            kind = EntryKind(number)
        except ValueError:
            raise AgentError("the agent sent an entry of an unknown kind") from None
        return Entry(kind, name, mode, uid, gid, mtime, size, link)

    def data(self, size: int) -> Iterator[memoryview]:
        """The next bytes, piece by piece, as they come."""
        while size:
            piece = self._piece(size)
            size -= len(piece)
            yield piece

    def finish(self) -> None:
        """After END: the guest's own verdict."""
        self._stream.finished()

    def abandon(self) -> None:
        self._stream.stop_reading(Channel.STDOUT)

    def _string(self) -> str:
        size = self._exactly(4)
        length = int.from_bytes(size, "little")
        if length >= _MAX_NAME:
            raise AgentError("the agent sent a name that is too long")
        return Reader(size + self._exactly(length + 1)).string()

    def _exactly(self, size: int) -> bytes:
        return b"".join(self.data(size))

    def _piece(self, most: int) -> memoryview:
        if not self._rest:
            taken = self._stream.take((Channel.STDOUT,))
            if taken is None:
                self._stream.finished()  # raises the guest's reason, if it gave one
                raise AgentError("the agent ended a copy too early")
            self._rest = memoryview(taken[1])
        piece, self._rest = self._rest[:most], self._rest[most:]
        return piece


class _Destination:
    """Where a copy arrives. Every path is walked from ``base`` without following links."""

    def __init__(self, target: Path) -> None:
        self._target = target
        try:
            self._base = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{target.parent} cannot be opened: {error.strerror}") from None

    def __enter__(self) -> _Destination:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._base)

    def add(self, entry: Entry, data: Iterator[memoryview]) -> None:
        parts = entry.name.split("/") if entry.name else []
        if not all(map(_is_plain, parts)):
            raise AgentError(f"the guest sent a name that leads elsewhere: {entry.name!r}")
        try:
            with self._folder([self._target.name, *parts][:-1]) as folder:
                self._make(entry, [self._target.name, *parts][-1], folder, data)
        except OSError as error:
            path = self._target.joinpath(*parts)
            raise HostError(f"{path} cannot be written: {error.strerror}") from None

    def _make(self, entry: Entry, name: str, folder: int, data: Iterator[memoryview]) -> None:
        if entry.kind is EntryKind.FILE:
            _make_file(entry, name, folder, data)
        elif entry.kind is EntryKind.DIRECTORY:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folder)
        elif entry.kind is EntryKind.LEAVE:
            _finish_directory(entry, name, folder)
        elif entry.kind is EntryKind.SYMLINK:
            _make_link(entry, name, folder)

    @contextlib.contextmanager
    def _folder(self, parts: list[str]) -> Iterator[int]:
        fd = os.dup(self._base)
        try:
            for part in parts:
                inner = os.open(part, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a pipe that lies there already must not hold us.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _is_plain(part: str) -> bool:
    return part not in ("", ".", "..") and "/" not in part


def _make_file(entry: Entry, name: str, folder: int, data: Iterator[memoryview]) -> None:
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise HostError(f"{name} exists and is not a file")
        os.ftruncate(fd, 0)
        for piece in data:
            while piece:
                piece = piece[os.write(fd, piece) :]  # noqa: PLW2901
        os.fchmod(fd, entry.mode & 0o777)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(fd)


def _finish_directory(entry: Entry, name: str, folder: int) -> None:
    fd = os.open(name, _FOLDER, dir_fd=folder)
    try:
        os.fchmod(fd, entry.mode & 0o777)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(fd)


def _make_link(entry: Entry, name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
    os.symlink(entry.link, name, dir_fd=folder)
