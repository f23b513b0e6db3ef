"""Operations on attributes, plain and extended.

What has no open handle is reached by an O_PATH descriptor and ``/proc/self/fd``: the very file that the
guest means, or ESTALE.
"""

from __future__ import annotations

import os
import stat
from errno import EINVAL, ENODATA, ENOSYS, EOPNOTSUPP, ERANGE

from hostel.abi import fuse as abi

from . import host
from .filesystem import Answer, FileSystem
from .nodes import Node, refuse
from .request import Request

OF_USERS = b"user."
_TIMES = abi.FATTR_ATIME | abi.FATTR_MTIME | abi.FATTR_ATIME_NOW | abi.FATTR_MTIME_NOW
_OWNERS = abi.FATTR_UID | abi.FATTR_GID
_SAME = -1


def getattr_(fs: FileSystem, request: Request) -> Answer:
    flags, _, number = request.arguments(abi.GETATTR_IN)
    node = fs.table.get(request.node)
    if flags & abi.GETATTR_FH and (handle := fs.handles.get(number)):
        return fs.attributes_answer(os.stat(handle.fd))
    return fs.attributes_answer(fs.table.stat(node))


def setattr_(fs: FileSystem, request: Request) -> Answer:
    new = dict(zip(abi.SETATTR_IN.offsets, request.arguments(abi.SETATTR_IN), strict=True))
    node = fs.table.get(request.node)
    valid = new["valid"]
    with fs.table.opened(node) as fd:
        name = b"%d" % fd
        if valid & _OWNERS:
            uid = fs.host_uid(new["uid"]) if valid & abi.FATTR_UID else _SAME
            gid = fs.host_gid(new["gid"]) if valid & abi.FATTR_GID else _SAME
            os.chown(name, uid, gid, dir_fd=fs.proc)
        if valid & abi.FATTR_MODE:
            _change_mode(fs, node, name, new["mode"])
        if valid & abi.FATTR_SIZE:
            handle = new["fh"] if valid & abi.FATTR_FH else 0
            _truncate(fs, node, fd, handle, new["size"])
        if valid & _TIMES:
            host.set_times(fs.proc, name, (_time(new, "atime"), _time(new, "mtime")))
        if valid & abi.FATTR_KILL_SUIDGID:
            kill_privileges(fs, fd)
        return fs.attributes_answer(os.stat(fd))


def _change_mode(fs: FileSystem, node: Node, name: bytes, mode: int) -> None:
    if stat.S_ISLNK(node.key[2]):
        refuse(EOPNOTSUPP)
    os.chmod(name, stat.S_IMODE(mode), dir_fd=fs.proc)


def _truncate(fs: FileSystem, node: Node, fd: int, number: int, size: int) -> None:
    if size >> 63 or not stat.S_ISREG(node.key[2]):
        refuse(EINVAL)
    if (handle := fs.handles.get(number)) and handle.writable:
        os.ftruncate(handle.fd, size)
        return
    writing = fs.reopen(fd, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.ftruncate(writing, size)
    finally:
        os.close(writing)


def _time(new: dict[str, int], name: str) -> tuple[int, int]:
    """What SETATTR says of one of the times, as utimensat(2) takes it."""
    now, given = (
        (abi.FATTR_ATIME_NOW, abi.FATTR_ATIME)
        if name == "atime"
        else (abi.FATTR_MTIME_NOW, abi.FATTR_MTIME)
    )
    if new["valid"] & now:
        return 0, host.UTIME_NOW
    if new["valid"] & given:
        if new[f"{name}nsec"] > 999_999_999:
            refuse(EINVAL)
        return new[name], new[f"{name}nsec"]
    return 0, host.UTIME_OMIT


def kill_privileges(fs: FileSystem, fd: int) -> None:
    """A file that somebody else changes is no longer setuid. For whoever is not root the host does it."""
    mode = os.stat(fd).st_mode
    executable_by_group = stat.S_ISGID | stat.S_IXGRP
    kept = mode & ~stat.S_ISUID
    if mode & executable_by_group == executable_by_group:
        kept &= ~stat.S_ISGID
    if kept != mode and stat.S_ISREG(mode):
        os.chmod(b"%d" % fd, stat.S_IMODE(kept), dir_fd=fs.proc)


def access(fs: FileSystem, request: Request) -> Answer:
    """Whether we may: a guest's kernel asks only where it does not judge by itself."""
    mask, _ = request.arguments(abi.ACCESS_IN)
    with fs.table.opened(fs.table.get(request.node)) as fd:
        if not os.access(b"%d" % fd, mask & 7, dir_fd=fs.proc, effective_ids=True):
            raise PermissionError(13, "Permission denied")
    return b""


def statfs(fs: FileSystem, request: Request) -> Answer:
    with fs.table.opened(fs.table.get(request.node)) as fd:
        at = os.fstatvfs(fd)
    return abi.STATFS_OUT.pack(
        at.f_blocks,
        at.f_bfree,
        at.f_bavail,
        at.f_files,
        at.f_ffree,
        at.f_bsize,
        min(at.f_namemax, 255),
        at.f_frsize,
        0,
        bytes(24),
    )


# -- extended attributes ------------------------------------------------------------------------


def _path(fs: FileSystem, fd: int) -> bytes:
    if not fs.settings.xattr:
        refuse(ENOSYS)  # the guest's kernel will not ask again
    return b"/proc/self/fd/%d" % fd


def getxattr(fs: FileSystem, request: Request) -> Answer:
    size, _ = request.arguments(abi.GETXATTR_IN)
    name = request.name(abi.GETXATTR_IN.size)
    with fs.table.opened(fs.table.get(request.node)) as fd:
        path = _path(fs, fd)
        if not name.startswith(OF_USERS):
            refuse(ENODATA)
        return _sized(os.getxattr(path, name), size)


def listxattr(fs: FileSystem, request: Request) -> Answer:
    size, _ = request.arguments(abi.GETXATTR_IN)
    with fs.table.opened(fs.table.get(request.node)) as fd:
        found = map(os.fsencode, os.listxattr(_path(fs, fd)))
        names = b"".join(name + b"\0" for name in found if name.startswith(OF_USERS))
    return _sized(names, size)


def _sized(value: bytes, size: int) -> bytes:
    """0 asks how long it is (getxattr(2))."""
    if size == 0:
        return abi.GETXATTR_OUT.pack(len(value), 0)
    return value if len(value) <= size else refuse(ERANGE)


def setxattr(fs: FileSystem, request: Request) -> Answer:
    size, flags, _, _ = request.arguments(abi.SETXATTR_IN)
    name, zero, value = request.body[abi.SETXATTR_IN.size :].partition(b"\0")
    if not zero or len(value) != size:
        refuse(EINVAL)
    with fs.table.opened(fs.table.get(request.node)) as fd:
        os.setxattr(_path(fs, fd), _of_users(name), value, flags & 3)
    return b""


def removexattr(fs: FileSystem, request: Request) -> Answer:
    name = request.name()
    with fs.table.opened(fs.table.get(request.node)) as fd:
        os.removexattr(_path(fs, fd), _of_users(name))
    return b""


def _of_users(name: bytes) -> bytes:
    return name if name.startswith(OF_USERS) else refuse(EOPNOTSUPP)


OPERATIONS = {
    abi.GETATTR: getattr_,
    abi.ACCESS: access,
    abi.STATFS: statfs,
    abi.GETXATTR: getxattr,
    abi.LISTXATTR: listxattr,
}
CHANGES = {abi.SETATTR: setattr_, abi.SETXATTR: setxattr, abi.REMOVEXATTR: removexattr}
