"""Our FUSE server, request by request: what each operation does to the host's files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.fuse_session import ROOT, FuseSession
from hostel.abi import fuse as abi

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of other users: needs root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "sub/deeper").mkdir(parents=True)
    (tree / "file").write_bytes(b"content")
    (tree / "sub/deeper/leaf").write_bytes(b"leaf")
    (tree / "link").symlink_to("sub/deeper")
    return tree


@pytest.fixture
def fs(tree: Path) -> Iterator[FuseSession]:
    with FuseSession(tree, xattr=True) as session:
        yield session


def error_of(call: Callable[..., object], *arguments: object, **named: object) -> int:
    try:
        call(*arguments, **named)
    except OSError as error:
        return error.errno or 0
    return 0


def forget_descriptors(fs: FuseSession) -> None:
    while fs.fs.table.make_room():
        pass


# -- the conversation ---------------------------------------------------------------------------


def test_init_offers_what_both_know(fs: FuseSession) -> None:
    major, _, readahead, flags, *_ = abi.INIT_OUT.unpack(fs.answer)
    assert (major, readahead) == (7, 1 << 16)
    assert flags & abi.DO_READDIRPLUS
    assert flags & abi.HANDLE_KILLPRIV_V2
    only = abi.INIT_IN.pack(7, 36, 0, abi.ASYNC_READ).ljust(64, b"\0")
    assert abi.INIT_OUT.unpack(fs.ask(abi.INIT, 0, only))[3] == abi.ASYNC_READ


def test_init_of_a_later_version_is_asked_again_in_ours(fs: FuseSession) -> None:
    answer = fs.ask(abi.INIT, 0, fs.init(major=8, minor=0))
    assert abi.INIT_OUT.unpack(answer)[0] == 7
    assert error_of(fs.lookup, ROOT, b"file") == errno.EIO
    fs.ask(abi.INIT, 0, fs.init())
    assert fs.lookup(ROOT, b"file")


def test_destroy_and_a_new_init_start_anew(fs: FuseSession) -> None:
    node = fs.lookup(ROOT, b"file")
    handle = fs.open(node)
    fs.ask(abi.DESTROY, 0)
    assert error_of(fs.getattr, ROOT) == errno.EIO
    fs.ask(abi.INIT, 0, fs.init())
    assert error_of(fs.getattr, node) == errno.ESTALE
    assert error_of(fs.read, handle, 1) == errno.EBADF
    assert fs.session.statistics()["nodes"] == 1


# -- names --------------------------------------------------------------------------------------


def test_lookup_and_attributes(fs: FuseSession, tree: Path) -> None:
    found, real = fs.look(ROOT, b"file").attributes, (tree / "file").stat()
    assert (found["ino"], found["size"], found["mode"]) == (real.st_ino, 7, real.st_mode)
    assert (found["uid"], found["gid"], found["nlink"]) == (real.st_uid, real.st_gid, 1)
    assert found["mtime"] * 10**9 + found["mtimensec"] == real.st_mtime_ns
    assert fs.getattr(fs.walk("sub/deeper/leaf"))["size"] == 4
    assert error_of(fs.lookup, ROOT, b"nothing") == errno.ENOENT
    assert error_of(fs.lookup, fs.lookup(ROOT, b"file"), b"below") == errno.ENOTDIR


def test_dots_lead_within_the_share_only(fs: FuseSession) -> None:
    deeper = fs.walk("sub/deeper")
    assert fs.lookup(deeper, b"..") == fs.lookup(ROOT, b"sub")
    assert fs.lookup(deeper, b".") == deeper
    assert fs.lookup(ROOT, b"..") == ROOT


def test_what_is_not_there_is_remembered_where_all_is_cached(tree: Path) -> None:
    with FuseSession(tree, cache="always", read_only=True) as fs:
        node, _, valid, *_ = abi.ENTRY_OUT.unpack(fs.ask(abi.LOOKUP, ROOT, b"nothing\0"))
        assert (node, valid > 1000) == (0, True)


def test_symbolic_links_are_text(fs: FuseSession, tree: Path) -> None:
    assert fs.ask(abi.READLINK, fs.lookup(ROOT, b"link")) == b"sub/deeper"
    entry = fs.entry(fs.ask(abi.SYMLINK, ROOT, b"new\0/etc/passwd\0"))
    assert stat.S_ISLNK(entry.attributes["mode"])
    assert os.readlink(tree / "new") == "/etc/passwd"
    assert error_of(fs.lookup, entry.node, b"below") == errno.ENOTDIR
    assert error_of(fs.open, entry.node) == errno.ENXIO
    assert error_of(fs.ask, abi.READLINK, fs.lookup(ROOT, b"file")) == errno.EINVAL


def test_make_and_remove(fs: FuseSession, tree: Path) -> None:
    new = fs.mkdir(ROOT, b"new", 0o750)
    assert stat.S_IMODE((tree / "new").stat().st_mode) == 0o750
    fs.ask(abi.MKNOD, new, abi.MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0, 0) + b"fifo\0")
    assert (tree / "new/fifo").is_fifo()
    assert error_of(fs.ask, abi.RMDIR, ROOT, b"new\0") == errno.ENOTEMPTY
    assert error_of(fs.ask, abi.UNLINK, ROOT, b"new\0") in (errno.EISDIR, errno.EPERM)
    fs.ask(abi.UNLINK, new, b"fifo\0")
    fs.ask(abi.RMDIR, ROOT, b"new\0")
    assert not (tree / "new").exists()
    assert error_of(fs.mkdir, ROOT, b"sub") == errno.EEXIST


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_no_device_of_the_guests_on_the_host(fs: FuseSession, tree: Path, kind: int) -> None:
    body = abi.MKNOD_IN.pack(kind | 0o666, 0x103, 0, 0) + b"device\0"
    assert error_of(fs.ask, abi.MKNOD, ROOT, body) == errno.EPERM
    assert not (tree / "device").exists()


def test_hard_link(fs: FuseSession, tree: Path) -> None:
    node = fs.lookup(ROOT, b"file")
    sub = fs.lookup(ROOT, b"sub")
    entry = fs.entry(fs.ask(abi.LINK, sub, abi.LINK_IN.pack(node) + b"second\0"))
    assert (entry.node, entry.attributes["nlink"]) == (node, 2)
    fs.ask(abi.UNLINK, sub, b"second\0")
    assert fs.lookup(ROOT, b"file") == node
    assert fs.getattr(node)["nlink"] == 1


def test_rename_moves_what_is_below(fs: FuseSession, tree: Path) -> None:
    leaf, sub = fs.walk("sub/deeper/leaf"), fs.lookup(ROOT, b"sub")
    other = fs.mkdir(ROOT, b"other")
    fs.rename(ROOT, b"sub", other, b"moved")
    forget_descriptors(fs)  # nothing is open: all is found by its new place
    assert fs.getattr(leaf)["size"] == 4
    assert fs.lookup(other, b"moved") == sub
    assert (tree / "other/moved/deeper/leaf").exists()


def test_rename_replaces_and_the_replaced_lives_while_it_is_used(fs: FuseSession) -> None:
    old = fs.lookup(ROOT, b"file")
    handle = fs.open(old)
    _, new_handle = fs.create(ROOT, b"new")
    fs.write(new_handle, b"NEW")
    fs.rename(ROOT, b"new", ROOT, b"file")
    assert fs.getattr(old)["nlink"] == 0
    assert fs.read(handle, 100) == b"content"
    assert fs.content("file") == b"NEW"


def test_rename_flags(fs: FuseSession, tree: Path) -> None:
    no_replace, exchange = 1, 2
    assert error_of(fs.rename, ROOT, b"file", ROOT, b"link", no_replace) == errno.EEXIST
    file, sub = fs.lookup(ROOT, b"file"), fs.lookup(ROOT, b"sub")
    fs.rename(ROOT, b"file", ROOT, b"sub", exchange)
    assert (tree / "sub").read_bytes() == b"content"
    assert (tree / "file/deeper").is_dir()
    assert (fs.lookup(ROOT, b"sub"), fs.lookup(ROOT, b"file")) == (file, sub)
    assert error_of(fs.rename, ROOT, b"file", ROOT, b"none", exchange) == errno.ENOENT
    assert error_of(fs.rename, ROOT, b"file", ROOT, b"x", 4) == errno.EINVAL


def test_removed_file_in_use_keeps_its_attributes(fs: FuseSession) -> None:
    node = fs.lookup(ROOT, b"file")
    handle = fs.open(node, os.O_RDWR)
    fs.ask(abi.UNLINK, ROOT, b"file\0")
    fs.write(handle, b"still here")
    assert fs.getattr(node)["size"] == 10
    assert fs.setattr(node, abi.FATTR_SIZE, size=3)["size"] == 3
    fs.forget(node)
    assert error_of(fs.getattr, node) == errno.ESTALE


# -- files --------------------------------------------------------------------------------------


def test_create_read_write(fs: FuseSession, tree: Path) -> None:
    entry, handle = fs.create(ROOT, b"new", mode=0o640)
    assert stat.S_IMODE(entry.attributes["mode"]) == 0o640
    assert fs.write(handle, b"hello world") == 11
    assert fs.write(handle, b"HELLO", 1 << 20) == 5
    assert fs.read(handle, 5, 6) == b"world"
    assert fs.read(handle, 100, 1 << 20) == b"HELLO"
    assert fs.read(handle, 10, 1 << 30) == b""
    fs.ask(abi.FSYNC, entry.node, abi.FSYNC_IN.pack(handle, 0, 0))
    fs.ask(abi.FLUSH, entry.node, abi.FLUSH_IN.pack(handle, 0, 0, 0))
    fs.release(handle)
    assert error_of(fs.read, handle, 1) == errno.EBADF
    assert (tree / "new").stat().st_size == (1 << 20) + 5


def test_create_opens_what_is_there_unless_told_not_to(fs: FuseSession) -> None:
    _, handle = fs.create(ROOT, b"file")
    assert fs.read(handle, 100) == b"content"
    assert error_of(fs.create, ROOT, b"file", os.O_RDWR | os.O_EXCL) == errno.EEXIST
    fs.create(ROOT, b"file", os.O_WRONLY | os.O_TRUNC)
    assert fs.getattr(fs.lookup(ROOT, b"file"))["size"] == 0
    assert error_of(fs.create, ROOT, b"sub") == errno.EISDIR
    assert error_of(fs.create, ROOT, b"link") == errno.ENXIO


def test_handles_do_what_they_were_opened_for(fs: FuseSession) -> None:
    node = fs.lookup(ROOT, b"file")
    reading, writing = fs.open(node), fs.open(node, os.O_WRONLY | os.O_APPEND)
    assert error_of(fs.write, reading, b"x") == errno.EBADF
    assert error_of(fs.read, writing, 1) == errno.EBADF
    fs.write(writing, b"+", 0)
    assert fs.read(reading, 100) == b"content+"


def test_holes_space_and_copies_within(fs: FuseSession, tree: Path) -> None:
    _, handle = fs.create(ROOT, b"sparse")
    fs.ask(abi.FALLOCATE, ROOT, abi.FALLOCATE_IN.pack(handle, 0, 1 << 16, 0, 0))
    assert (tree / "sparse").stat().st_size == 1 << 16
    fs.write(handle, b"x" * 4096, 8 << 20)
    ask = abi.LSEEK_IN.pack(handle, 4 << 20, os.SEEK_DATA, 0)
    (found,) = abi.LSEEK_OUT.unpack(fs.ask(abi.LSEEK, ROOT, ask))
    assert 4 << 20 <= found <= 8 << 20
    end = abi.LSEEK_IN.pack(handle, 0, os.SEEK_END, 0)
    assert error_of(fs.ask, abi.LSEEK, ROOT, end) == errno.EINVAL
    body = abi.COPY_FILE_RANGE_IN.pack(handle, 8 << 20, ROOT, handle, 0, 4096, 0)
    assert abi.WRITE_OUT.unpack(fs.ask(abi.COPY_FILE_RANGE, ROOT, body))[0] == 4096
    assert fs.read(handle, 4) == b"xxxx"


def test_only_regular_files_are_opened(fs: FuseSession, tree: Path) -> None:
    os.mkfifo(tree / "fifo")  # opening it would wait for a writer
    assert error_of(fs.open, fs.lookup(ROOT, b"fifo")) == errno.ENXIO
    assert error_of(fs.open, fs.lookup(ROOT, b"sub")) == errno.EISDIR


def test_whoever_writes_takes_setuid_away(fs: FuseSession, tree: Path) -> None:
    (tree / "file").chmod(0o6755)
    handle = fs.open(fs.lookup(ROOT, b"file"), os.O_WRONLY)
    fs.write(handle, b"x", flags=abi.WRITE_KILL_SUIDGID)
    assert stat.S_IMODE((tree / "file").stat().st_mode) == 0o755


@pytest.mark.parametrize(("uid", "mode"), [(1000, 0o755), (0, 0o6755)])
@pytest.mark.parametrize("opcode", [abi.FALLOCATE, abi.COPY_FILE_RANGE])
def test_other_changes(fs: FuseSession, tree: Path, uid: int, mode: int, opcode: int) -> None:
    """Requests that do not say what is to become of it: root keeps it, others do not."""
    handle, fs.uid = fs.open(fs.lookup(ROOT, b"file"), os.O_RDWR), uid
    (tree / "file").chmod(0o6755)
    copy = abi.COPY_FILE_RANGE_IN.pack(handle, 0, ROOT, handle, 1 << 15, 8, 0)
    grow = abi.FALLOCATE_IN.pack(handle, 0, 1 << 16, 0, 0)
    fs.ask(opcode, ROOT, {abi.FALLOCATE: grow, abi.COPY_FILE_RANGE: copy}[opcode])
    assert stat.S_IMODE((tree / "file").stat().st_mode) == mode


def test_setuid_is_believed_for_no_moment(fs: FuseSession, tree: Path) -> None:
    """No word of its end goes to the guest's kernel, which would run the file with it."""
    believed = []
    for mode in (0o755, 0o4755, 0o2755):
        (tree / "file").chmod(mode)
        node, _, _, found, *_ = abi.ENTRY_OUT.unpack(fs.ask(abi.LOOKUP, ROOT, b"file\0"))
        asked, *_ = abi.ATTR_OUT.unpack(fs.ask(abi.GETATTR, node, abi.GETATTR_IN.pack(0, 0, 0)))
        believed.append((found, asked))
    assert believed == [(1, 1), (0, 0), (0, 0)]


# -- attributes ---------------------------------------------------------------------------------


def test_set_attributes(fs: FuseSession, tree: Path) -> None:
    node = fs.lookup(ROOT, b"file")
    assert stat.S_IMODE(fs.setattr(node, abi.FATTR_MODE, mode=0o4711)["mode"]) == 0o4711
    assert fs.setattr(node, abi.FATTR_SIZE, size=3)["size"] == 3
    before = (tree / "file").stat()
    fs.setattr(node, abi.FATTR_MTIME, mtime=1000, mtimensec=5)
    after = (tree / "file").stat()
    assert (after.st_mtime_ns, after.st_atime_ns) == (1000 * 10**9 + 5, before.st_atime_ns)
    fs.setattr(node, abi.FATTR_MTIME | abi.FATTR_MTIME_NOW)
    assert (tree / "file").stat().st_mtime > 10**9
    bad = {"mtimensec": 10**9}
    assert error_of(fs.setattr, node, abi.FATTR_MTIME, **bad) == errno.EINVAL
    assert error_of(fs.setattr, node, abi.FATTR_SIZE, size=1 << 63) == errno.EINVAL
    link = fs.lookup(ROOT, b"link")
    fs.setattr(link, abi.FATTR_MTIME, mtime=1000)
    assert ((tree / "link").lstat().st_mtime, (tree / "sub").stat().st_mtime > 10**9) == (
        1000,
        True,
    )
    assert error_of(fs.setattr, link, abi.FATTR_MODE, mode=0o777) == errno.EOPNOTSUPP


@needs_root
def test_files_belong_to_who_made_them(fs: FuseSession, tree: Path) -> None:
    tree.chmod(0o777)
    fs.uid, fs.gid = 1234, 2345
    fs.create(ROOT, b"new")
    fs.mkdir(ROOT, b"directory")
    fs.ask(abi.SYMLINK, ROOT, b"symlink\0x\0")
    for name in ("new", "directory", "symlink"):
        found = (tree / name).lstat()
        assert (found.st_uid, found.st_gid) == (1234, 2345)
    assert (os.geteuid(), os.getegid()) == (0, 0)
    assert fs.content("new") == b""  # and nobody stays who we acted as
    fs.setattr(fs.lookup(ROOT, b"new"), abi.FATTR_UID, uid=77)
    assert (tree / "new").stat().st_uid == 77


@needs_root
def test_owner_stands_for_us(tree: Path) -> None:
    os.chown(tree / "sub", 500, 600)
    with FuseSession(tree, owner=(1000, 100)) as fs:
        found = fs.look(ROOT, b"file").attributes
        assert (found["uid"], found["gid"]) == (1000, 100)
        other = fs.look(ROOT, b"sub").attributes
        assert (other["uid"], other["gid"]) == (500, 600)
        fs.uid, fs.gid = 1000, 100
        fs.create(ROOT, b"new")
        assert ((tree / "new").stat().st_uid, (tree / "new").stat().st_gid) == (0, 0)
        fs.setattr(fs.lookup(ROOT, b"sub"), abi.FATTR_UID | abi.FATTR_GID, uid=1000, gid=100)
        assert ((tree / "sub").stat().st_uid, (tree / "sub").stat().st_gid) == (0, 0)


def test_extended_attributes_of_users(fs: FuseSession, tree: Path) -> None:
    try:
        os.setxattr(tree / "file", "user.there", b"value")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    node = fs.lookup(ROOT, b"file")
    get = abi.GETXATTR_IN.pack(100, 0)
    assert fs.ask(abi.GETXATTR, node, get + b"user.there\0") == b"value"
    size = fs.ask(abi.GETXATTR, node, abi.GETXATTR_IN.pack(0, 0) + b"user.there\0")
    assert abi.GETXATTR_OUT.unpack(size)[0] == 5
    short = abi.GETXATTR_IN.pack(2, 0) + b"user.there\0"
    assert error_of(fs.ask, abi.GETXATTR, node, short) == errno.ERANGE
    fs.ask(abi.SETXATTR, node, abi.SETXATTR_IN.pack(3, 0, 0, 0) + b"user.new\0a\0b")
    assert os.getxattr(tree / "file", "user.new") == b"a\0b"
    assert set(fs.ask(abi.LISTXATTR, node, get).split(b"\0")) == {b"user.there", b"user.new", b""}
    fs.ask(abi.REMOVEXATTR, node, b"user.new\0")
    assert os.listxattr(tree / "file") == ["user.there"]
    for name in (b"trusted.x", b"security.capability", b"system.posix_acl_access"):
        assert error_of(fs.ask, abi.GETXATTR, node, get + name + b"\0") == errno.ENODATA
        body = abi.SETXATTR_IN.pack(1, 0, 0, 0) + name + b"\0x"
        assert error_of(fs.ask, abi.SETXATTR, node, body) == errno.EOPNOTSUPP


def test_statfs_and_access(fs: FuseSession, tree: Path) -> None:
    blocks, *_, name_length, _, _, _ = abi.STATFS_OUT.unpack(fs.ask(abi.STATFS, ROOT))
    assert (blocks, name_length) == (os.statvfs(tree).f_blocks, 255)
    fs.ask(abi.ACCESS, fs.lookup(ROOT, b"file"), abi.ACCESS_IN.pack(os.R_OK, 0))
    (tree / "file").chmod(0o644)
    body = abi.ACCESS_IN.pack(os.X_OK, 0)
    assert error_of(fs.ask, abi.ACCESS, fs.lookup(ROOT, b"file"), body) == errno.EACCES


# -- directories --------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("room", [512, 4096, 1 << 16])
def test_directories_are_listed_whole(tmp_path: Path, plus: bool, room: int) -> None:
    names = {f"{'n' * (at % 200)}{at}".encode() for at in range(700)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    with FuseSession(tmp_path) as fs:
        found = list(fs.list(ROOT, plus=plus, room=room))
        assert len(found) == len(names) + 2
        assert {name for name, _ in found} == names | {b".", b".."}
        if plus:
            assert fs.session.statistics()["nodes"] == len(names) + 1
            assert all(bool(node) == (name not in (b".", b"..")) for name, node in found)
            for _, node in found:
                fs.forget(node)
            assert fs.session.statistics()["nodes"] == 1


def test_listing_goes_on_from_any_position(fs: FuseSession, tree: Path) -> None:
    for at in range(100):
        (tree / f"sub/{at}").touch()
    opened = fs.ask(abi.OPENDIR, fs.lookup(ROOT, b"sub"), abi.OPEN_IN.pack(0, 0))
    handle = abi.OPEN_OUT.unpack(opened)[0]

    def read(offset: int) -> bytes:
        body = abi.READ_IN.pack(handle, offset, 1024, 0, 0, 0, 0)
        return fs.ask(abi.READDIR, ROOT, body)

    first = read(0)
    (_, cookie, _, _) = abi.DIRENT.unpack_from(first)
    second = read(cookie)
    read(0)
    assert read(0) == first
    assert read(cookie) == second
    fs.ask(abi.FSYNCDIR, ROOT, abi.FSYNC_IN.pack(handle, 0, 0))


# -- few descriptors ----------------------------------------------------------------------------


def test_a_node_needs_no_descriptor(tmp_path: Path) -> None:
    for outer in range(60):
        for inner in range(10):
            (tmp_path / f"{outer}/{inner}").mkdir(parents=True)
            (tmp_path / f"{outer}/{inner}/file").write_text(f"{outer} {inner}")
    before = len(os.listdir("/proc/self/fd"))
    with FuseSession(tmp_path, descriptors=64) as fs:
        nodes = {
            (outer, inner): fs.walk(f"{outer}/{inner}/file")
            for outer in range(60)
            for inner in range(10)
        }
        assert fs.session.statistics()["nodes"] == 1 + 60 + 600 + 600
        for (outer, inner), node in nodes.items():
            handle = fs.open(node)
            assert fs.read(handle, 100) == f"{outer} {inner}".encode()
            fs.release(handle)
        assert len(os.listdir("/proc/self/fd")) < before + 24


def test_the_hosts_changes_show(fs: FuseSession, tree: Path) -> None:
    leaf = fs.walk("sub/deeper/leaf")
    forget_descriptors(fs)
    (tree / "sub").rename(tree / "elsewhere")
    assert error_of(fs.getattr, leaf) == errno.ESTALE
    assert fs.walk("elsewhere/deeper/leaf") == leaf  # the guest's kernel asks again, from the top
    assert fs.getattr(leaf)["size"] == 4
    (tree / "elsewhere/deeper/leaf").unlink()
    (tree / "elsewhere/deeper/leaf").mkdir()
    assert error_of(fs.getattr, leaf) == errno.ESTALE
    assert fs.walk("elsewhere/deeper/leaf") != leaf


def test_no_more_nodes_than_a_guest_of_that_size_could_remember(tmp_path: Path) -> None:
    for at in range(40):
        (tmp_path / f"{at}").touch()
    with FuseSession(tmp_path, memory=768 * 20) as fs:
        for at in range(19):
            fs.lookup(ROOT, b"%d" % at)
        assert error_of(fs.lookup, ROOT, b"30") == errno.ENFILE
        fs.forget(fs.lookup(ROOT, b"3"), 2)
        assert fs.lookup(ROOT, b"30")
