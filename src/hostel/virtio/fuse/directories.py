"""Operations on open directories: the host's own entries and positions (getdents64), none kept by us.

A position is the host's cookie, so a directory may change, and be gone through twice at once, as on the
host. What was read of it and did not fit the answer waits in the handle for the next request.
"""

from __future__ import annotations

import ctypes
import os
import struct
from errno import EINVAL, ENOTDIR

from hostel.abi import fuse as abi

from . import host
from .filesystem import Answer, FileSystem, Handle
from .nodes import Node, refuse
from .request import Request

DIRENT64 = struct.Struct("<QqHB")
"""``struct linux_dirent64`` as far as the name (getdents(2))."""
NAME = 19
SMALLEST = 1 << 10
LARGEST = 4 << 10
"""Bytes read of a directory at once, and kept for its handle; the first holds an entry with the longest
name, the last is what a Linux guest asks for."""


def opendir(fs: FileSystem, request: Request) -> Answer:
    node = fs.table.get(request.node)
    path_fd = fs.table.directory(node)
    fd = fs.reopen(path_fd, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
    always = fs.settings.cache == "always"
    flags = abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE if always else 0
    return abi.OPEN_OUT.pack(fs.keep(fd, writable=False), flags, 0)


def readdir(fs: FileSystem, request: Request) -> Answer:
    handle, room = _seek(fs, request, entry_size=1)
    answer: list[bytes] = []
    while entry := _next(handle):
        inode, cookie, kind, name = entry
        dirent = abi.DIRENT.pack(inode, cookie, len(name), kind) + name
        dirent += bytes(-len(dirent) % 8)
        if len(dirent) > room:
            break
        room -= len(dirent)
        answer.append(dirent)
        _take(handle, cookie)
    return b"".join(answer)


def readdirplus(fs: FileSystem, request: Request) -> Answer:
    """Each entry with what a LOOKUP of it would say; the guest is told of it, as by one."""
    node = fs.table.get(request.node)
    handle, room = _seek(fs, request, entry_size=4)
    answer: list[bytes] = []
    while entry := _next(handle):
        inode, cookie, kind, name = entry
        size = abi.ENTRY_OUT.size + abi.DIRENT.size + len(name)
        padding = -size % 8
        if size + padding > room:
            break
        room -= size + padding
        answer.append(_entry(fs, node, handle, name))
        answer.append(abi.DIRENT.pack(inode, cookie, len(name), kind) + name + bytes(padding))
        _take(handle, cookie)
    return b"".join(answer)


def _entry(fs: FileSystem, node: Node, handle: Handle, name: bytes) -> bytes:
    """All zero for what the guest is to look up itself, should it want it (linux/fuse.h)."""
    if name in (b".", b".."):
        return bytes(abi.ENTRY_OUT.size)
    try:
        found = os.stat(name, dir_fd=handle.fd, follow_symlinks=False)
        return fs.entry(node, name, found)
    except OSError:
        return bytes(abi.ENTRY_OUT.size)


def releasedir(fs: FileSystem, request: Request) -> Answer:
    number, _, _, _ = request.arguments(abi.RELEASE_IN)
    fs.release(number)
    return b""


def fsyncdir(fs: FileSystem, request: Request) -> Answer:
    number, _, _ = request.arguments(abi.FSYNC_IN)
    os.fsync(fs.handle(number).fd)
    return b""


# -- reading ------------------------------------------------------------------------------------


def _seek(fs: FileSystem, request: Request, *, entry_size: int) -> tuple[Handle, int]:
    """The handle, with what comes at the request's offset in its buffer; and the room for the answer."""
    number, offset, size, _, _, _, _ = request.arguments(abi.READ_IN)
    handle = fs.handle(number)
    room = min(size, request.most)
    if offset != handle.offset or handle.at >= len(handle.buffer):
        if offset >> 63:
            refuse(EINVAL)
        _fill(handle, offset, min(max(room // entry_size, SMALLEST), LARGEST))
    return handle, room


def _fill(handle: Handle, offset: int, size: int) -> None:
    try:
        os.lseek(handle.fd, offset, os.SEEK_SET)
        buffer = ctypes.create_string_buffer(size)
        filled = host.getdents(handle.fd, buffer)
    except NotADirectoryError:
        refuse(ENOTDIR)
    handle.buffer, handle.at, handle.offset = buffer.raw[:filled], 0, offset


def _next(handle: Handle) -> tuple[int, int, int, bytes] | None:
    if handle.at >= len(handle.buffer):
        return None
    inode, cookie, length, kind = DIRENT64.unpack_from(handle.buffer, handle.at)
    name = handle.buffer[handle.at + NAME : handle.at + length].split(b"\0", 1)[0]
    return inode, cookie, kind, name


def _take(handle: Handle, cookie: int) -> None:
    _, _, length, _ = DIRENT64.unpack_from(handle.buffer, handle.at)
    handle.at += length
    handle.offset = cookie


OPERATIONS = {
    abi.OPENDIR: opendir,
    abi.READDIR: readdir,
    abi.READDIRPLUS: readdirplus,
    abi.RELEASEDIR: releasedir,
    abi.FSYNCDIR: fsyncdir,
}
