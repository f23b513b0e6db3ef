"""Operations on open files. Data goes straight between the file and guest memory (preadv, pwritev).

Nothing but a regular file is ever opened: a FIFO or a device would block us, or do something. Flags of
open(2) that a guest may not choose are dropped; O_NONBLOCK is ours.
"""

from __future__ import annotations

import os
import stat
from errno import EBADF, EEXIST, EINVAL, EISDIR, ENOSYS, ENXIO, EROFS

from hostel.abi import fuse as abi

from . import host
from .attributes import kill_privileges
from .filesystem import Answer, FileSystem, Handle
from .nodes import checked_name, refuse
from .request import Request

_FROM_GUEST = os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC
_OURS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
MOST_COPIED = 16 << 20
"""Bytes of one COPY_FILE_RANGE: other requests wait meanwhile."""


def _open_flags(fs: FileSystem) -> int:
    return {"always": abi.FOPEN_KEEP_CACHE, "none": abi.FOPEN_DIRECT_IO, "auto": 0}[
        fs.settings.cache
    ]


def open_(fs: FileSystem, request: Request) -> Answer:
    flags, open_flags = request.arguments(abi.OPEN_IN)
    number = _open(fs, request.node, flags, kill=bool(open_flags & abi.OPEN_KILL_SUIDGID))
    return abi.OPEN_OUT.pack(number, _open_flags(fs), 0)


def _open(fs: FileSystem, number: int, flags: int, *, kill: bool) -> int:
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    if (writable or flags & os.O_TRUNC) and fs.settings.read_only:
        refuse(EROFS)
    node = fs.table.get(number)
    if not stat.S_ISREG(node.key[2]):
        refuse(EISDIR if stat.S_ISDIR(node.key[2]) else ENXIO)
    with fs.table.opened(node) as path_fd:
        fd = fs.reopen(path_fd, flags & (_FROM_GUEST | os.O_TRUNC) | _OURS)
        if kill and flags & os.O_TRUNC:
            kill_privileges(fs, path_fd)
    return fs.keep(fd, writable=writable)


def create(fs: FileSystem, request: Request) -> Answer:
    """A new file, made only where nothing is; what is there already is opened like any other."""
    flags, mode, _, open_flags = request.arguments(abi.CREATE_IN)
    name = checked_name(request.name(abi.CREATE_IN.size))
    parent = fs.table.get(request.node)
    directory = fs.table.directory(parent)
    making = flags & _FROM_GUEST | _OURS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with fs.acting_as(request):
            fd = fs.with_room(lambda: os.open(name, making, mode & 0o7777, dir_fd=directory))
    except FileExistsError:
        if flags & os.O_EXCL:
            refuse(EEXIST)
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        node = fs.table.remember(parent, name, found)
        kill = bool(open_flags & abi.OPEN_KILL_SUIDGID)
        try:
            number = _open(fs, node.id, flags, kill=kill)
        except OSError:
            fs.table.forget(node.id, 1)
            raise
        entry = fs.entry_of(node, os.stat(fs.handles[number].fd))
    else:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        number = fs.keep(fd, writable=writable)
        entry = fs.entry(parent, name, os.stat(fd))
    return entry + abi.OPEN_OUT.pack(number, _open_flags(fs), 0)


def release(fs: FileSystem, request: Request) -> Answer:
    number, _, _, _ = request.arguments(abi.RELEASE_IN)
    fs.release(number)
    return b""


def read(fs: FileSystem, request: Request) -> Answer:
    number, offset, size, _, _, _, _ = request.arguments(abi.READ_IN)
    handle = fs.handle(number)
    return os.preadv(handle.fd, request.space(size), _offset(offset)) if size else b""


def write(fs: FileSystem, request: Request) -> Answer:
    number, offset, size, flags, _, _, _ = request.arguments(abi.WRITE_IN)
    handle = _writable(fs, number)
    if size != sum(map(len, request.data)):
        refuse(EINVAL)
    written = os.pwritev(handle.fd, request.data, _offset(offset)) if size else 0
    if flags & abi.WRITE_KILL_SUIDGID:
        kill_privileges(fs, handle.fd)
    return abi.WRITE_OUT.pack(written, 0)


def flush(fs: FileSystem, request: Request) -> Answer:
    """A descriptor of the guest's was closed: some file systems tell only now what went wrong."""
    if fs.settings.read_only:
        refuse(ENOSYS)  # nothing can; the guest's kernel will not ask again
    number, _, _, _ = request.arguments(abi.FLUSH_IN)
    os.close(os.dup(fs.handle(number).fd))
    return b""


def fsync(fs: FileSystem, request: Request) -> Answer:
    number, flags, _ = request.arguments(abi.FSYNC_IN)
    handle = fs.handle(number)
    if flags & abi.FSYNC_FDATASYNC:
        os.fdatasync(handle.fd)
    else:
        os.fsync(handle.fd)
    return b""


def fallocate(fs: FileSystem, request: Request) -> Answer:
    number, offset, length, mode, _ = request.arguments(abi.FALLOCATE_IN)
    handle = _writable(fs, number)
    host.fallocate(handle.fd, mode, _offset(offset), _offset(length))
    _changed(fs, request, handle)
    return b""


def _changed(fs: FileSystem, request: Request, handle: Handle) -> None:
    """By requests that have no word for it as WRITE has: root keeps setuid, as on any file system."""
    if request.uid:
        kill_privileges(fs, handle.fd)


def lseek(fs: FileSystem, request: Request) -> Answer:
    """Holes and data only: a guest's kernel does the rest by itself."""
    number, offset, whence, _ = request.arguments(abi.LSEEK_IN)
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        refuse(EINVAL)
    return abi.LSEEK_OUT.pack(os.lseek(fs.handle(number).fd, _offset(offset), whence))


def copy_file_range(fs: FileSystem, request: Request) -> Answer:
    source, start, _, target, to, size, _ = request.arguments(abi.COPY_FILE_RANGE_IN)
    handle = _writable(fs, target)
    copied = os.copy_file_range(
        fs.handle(source).fd,
        handle.fd,
        min(size, MOST_COPIED),
        _offset(start),
        _offset(to),
    )
    _changed(fs, request, handle)
    return abi.WRITE_OUT.pack(copied, 0)


def _writable(fs: FileSystem, number: int) -> Handle:
    handle = fs.handle(number)
    return handle if handle.writable else refuse(EBADF)


def _offset(offset: int) -> int:
    """As a signed number, which off_t is."""
    return offset if not offset >> 63 else refuse(EINVAL)


OPERATIONS = {
    abi.OPEN: open_,
    abi.RELEASE: release,
    abi.READ: read,
    abi.WRITE: write,
    abi.FLUSH: flush,
    abi.FSYNC: fsync,
    abi.FALLOCATE: fallocate,
    abi.LSEEK: lseek,
    abi.COPY_FILE_RANGE: copy_file_range,
}
CHANGES = {abi.CREATE: create}
