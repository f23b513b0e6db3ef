"""Operations on names: look up, make, remove, rename, link.

What is made is made by name in a directory's descriptor, never through a link that is there already; and
what it turned out to be is looked at afterwards, whoever else works in that directory.
"""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, nullcontext
from errno import EINVAL, EPERM

from hostel.abi import fuse as abi

from . import host
from .filesystem import Answer, FileSystem
from .nodes import Node, checked_name, refuse
from .request import Request

_RENAME_FLAGS = host.RENAME_NOREPLACE | host.RENAME_EXCHANGE
_PERMISSIONS = 0o7777


def _look(fs: FileSystem, directory: int, name: bytes) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def lookup(fs: FileSystem, request: Request) -> Answer:
    parent = fs.table.get(request.node)
    name = request.name()
    if name in (b".", b".."):
        return _lookup_dots(fs, parent, name)
    directory = fs.table.directory(parent)
    try:
        found = _look(fs, directory, checked_name(name))
    except FileNotFoundError:
        if fs.settings.cache != "always":
            raise
        # node 0: "not there", for as long (linux/fs/fuse/dir.c, fuse_lookup_name)
        return abi.ENTRY_OUT.pack(0, 0, fs.validity, 0, 0, 0, bytes(abi.ATTR.size))
    return fs.entry(parent, name, found)


def _lookup_dots(fs: FileSystem, node: Node, name: bytes) -> bytes:
    """For a guest that exports the file system again. The root's parent is the root."""
    if name == b".." and node.parent is not None:
        node = node.parent
    found = fs.table.stat(node)
    node.lookups += 1
    return fs.entry_of(node, found)


def _made(fs: FileSystem, parent: Node, name: bytes) -> bytes:
    return fs.entry(parent, name, _look(fs, fs.table.directory(parent), name))


def mkdir(fs: FileSystem, request: Request) -> Answer:
    mode, _ = request.arguments(abi.MKDIR_IN)
    name = checked_name(request.name(abi.MKDIR_IN.size))
    parent = fs.table.get(request.node)
    directory = fs.table.directory(parent)
    with fs.acting_as(request):
        os.mkdir(name, mode & _PERMISSIONS, dir_fd=directory)
    return _made(fs, parent, name)


def mknod(fs: FileSystem, request: Request) -> Answer:
    """Files, FIFOs and sockets. A device of the guest's making would be one of the host's."""
    mode, _, _, _ = request.arguments(abi.MKNOD_IN)
    name = checked_name(request.name(abi.MKNOD_IN.size))
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
        refuse(EPERM)
    parent = fs.table.get(request.node)
    directory = fs.table.directory(parent)
    with fs.acting_as(request):
        os.mknod(name, kind | mode & _PERMISSIONS, dir_fd=directory)
    return _made(fs, parent, name)


def symlink(fs: FileSystem, request: Request) -> Answer:
    """The target is text: whoever follows it does so in his own root."""
    name, target = request.names(0, 2)
    parent = fs.table.get(request.node)
    directory = fs.table.directory(parent)
    with fs.acting_as(request):
        os.symlink(target, checked_name(name), dir_fd=directory)
    return _made(fs, parent, name)


def readlink(fs: FileSystem, request: Request) -> Answer:
    node = fs.table.get(request.node)
    if not stat.S_ISLNK(node.key[2]):
        refuse(EINVAL)
    with fs.table.opened(node) as fd:
        return os.readlink(b"", dir_fd=fd)


def link(fs: FileSystem, request: Request) -> Answer:
    (old,) = request.arguments(abi.LINK_IN)
    name = checked_name(request.name(abi.LINK_IN.size))
    parent = fs.table.get(request.node)
    with fs.table.opened(fs.table.get(old)) as fd:
        # through /proc: the very file, not whatever its name leads to by now
        os.link(
            b"%d" % fd,
            name,
            src_dir_fd=fs.proc,
            dst_dir_fd=fs.table.directory(parent),
            follow_symlinks=True,
        )
    return _made(fs, parent, name)


def unlink(fs: FileSystem, request: Request) -> Answer:
    name = checked_name(request.name())
    directory = fs.table.directory(fs.table.get(request.node))
    with fs.table.losing_its_name(_look(fs, directory, name)):
        os.unlink(name, dir_fd=directory)
    return b""


def rmdir(fs: FileSystem, request: Request) -> Answer:
    name = checked_name(request.name())
    directory = fs.table.directory(fs.table.get(request.node))
    with fs.table.losing_its_name(_look(fs, directory, name)):
        os.rmdir(name, dir_fd=directory)
    return b""


def rename(fs: FileSystem, request: Request) -> Answer:
    (target,) = request.arguments(abi.RENAME_IN)
    return _rename(fs, request, target, 0, abi.RENAME_IN.size)


def rename2(fs: FileSystem, request: Request) -> Answer:
    target, flags, _ = request.arguments(abi.RENAME2_IN)
    if flags & ~_RENAME_FLAGS:
        refuse(EINVAL)
    return _rename(fs, request, target, flags, abi.RENAME2_IN.size)


def _rename(fs: FileSystem, request: Request, target: int, flags: int, offset: int) -> bytes:
    name, new_name = map(checked_name, request.names(offset, 2))
    parent, new_parent = fs.table.get(request.node), fs.table.get(target)
    source, destination = fs.table.directory(parent), fs.table.directory(new_parent)
    moved = fs.table.find(_look(fs, source, name))
    with _replacing(fs, destination, new_name, flags) as replaced:
        host.rename(source, name, destination, new_name, flags)
    if moved is not None and moved is not replaced:
        fs.table.move(moved, new_parent, new_name)
    if replaced is not None and flags & host.RENAME_EXCHANGE:
        fs.table.move(replaced, parent, name)
    return b""


def _replacing(
    fs: FileSystem, directory: int, name: bytes, flags: int
) -> AbstractContextManager[Node | None]:
    """What a rename onto ``name`` takes the name from; with EXCHANGE it gets another."""
    try:
        found = _look(fs, directory, name)
    except FileNotFoundError:
        return nullcontext()
    if flags & host.RENAME_EXCHANGE:
        return nullcontext(fs.table.find(found))
    return fs.table.losing_its_name(found)


def forget(fs: FileSystem, request: Request) -> Answer:
    (count,) = request.arguments(abi.FORGET_IN)
    fs.table.forget(request.node, count)
    return None


def batch_forget(fs: FileSystem, request: Request) -> Answer:
    count, _ = request.arguments(abi.BATCH_FORGET_IN)
    size, start = abi.FORGET_ONE.size, abi.BATCH_FORGET_IN.size
    if count > (len(request.body) - start) // size:
        refuse(EINVAL)
    for offset in range(start, start + count * size, size):
        fs.table.forget(*abi.FORGET_ONE.unpack_from(request.body, offset))
    return None


OPERATIONS = {
    abi.LOOKUP: lookup,
    abi.FORGET: forget,
    abi.BATCH_FORGET: batch_forget,
    abi.READLINK: readlink,
}
CHANGES = {
    abi.MKDIR: mkdir,
    abi.MKNOD: mknod,
    abi.SYMLINK: symlink,
    abi.LINK: link,
    abi.UNLINK: unlink,
    abi.RMDIR: rmdir,
    abi.RENAME: rename,
    abi.RENAME2: rename2,
}
