"""A guest's kernel that is not one: what our FUSE server makes of requests that break the protocol.

Nothing outside the share is read or made; the answer is an error number, or a ``FuseFault`` where there
can be none.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.fuse_session import ROOT, FuseSession
from hostel.abi import fuse as abi
from hostel.virtio.fuse import FuseFault

SECRET = b"a secret of the host's"
OPCODES = sorted(
    value
    for name, value in vars(abi).items()
    if isinstance(value, int) and name.isupper() and "_" not in name and 0 < value < 64
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``tree`` is shared; ``outside``, beside it, is not."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(SECRET)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_bytes(b"content")
    (tree / "sub/secret").write_bytes(b"harmless")
    (tree / "out").symlink_to("../outside")
    (tree / "absolute").symlink_to(tmp_path / "outside/secret")
    (tree / "magic").symlink_to("/proc/self/root")
    return tree


@pytest.fixture
def fs(tree: Path) -> Iterator[FuseSession]:
    with FuseSession(tree, xattr=True) as session:
        yield session


def answer_to(fs: FuseSession, opcode: int, node: int, body: bytes = b"") -> str:
    try:
        fs.ask(opcode, node, body)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# -- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 16, 39])
def test_no_whole_header_stops_the_device(fs: FuseSession, size: int) -> None:
    with pytest.raises(FuseFault, match="without a whole header"):
        fs.send([bytes(size)] if size else [], [16, 4096])


@pytest.mark.parametrize("writable", [[], [15], [8, 7]])
def test_no_room_for_an_answer_stops_the_device(fs: FuseSession, writable: list[int]) -> None:
    with pytest.raises(FuseFault, match="no room for the answer"):
        fs.send([fs.header(abi.STATFS, ROOT, 0)], writable)


def test_endless_header_stops_the_device(fs: FuseSession) -> None:
    with pytest.raises(FuseFault, match="too many bytes"):
        fs.send([bytes(20), bytes(3 << 20)], [16, 4096])


def test_a_request_may_be_cut_anywhere(fs: FuseSession) -> None:
    whole = fs.header(abi.LOOKUP, ROOT, 5) + b"file\0"
    pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)]
    answer = fs.send(pieces, [5, 3, 20, 500])
    size, error, _ = abi.OUT_HEADER.unpack_from(answer)
    assert (size, error) == (abi.OUT_HEADER.size + abi.ENTRY_OUT.size, 0)


@pytest.mark.parametrize("lie", [0, 39, 44, 46, 1 << 31, 0xFFFF_FFFF])
def test_length_that_lies(fs: FuseSession, lie: int) -> None:
    header = bytearray(fs.header(abi.LOOKUP, ROOT, 5))
    struct.pack_into("<I", header, 0, lie)
    answer = fs.send([bytes(header), b"file\0"], [16, 4096])
    assert abi.OUT_HEADER.unpack_from(answer)[1] == -errno.EINVAL


def test_answer_that_does_not_fit(fs: FuseSession) -> None:
    answer = fs.send([fs.header(abi.LOOKUP, ROOT, 5), b"file\0"], [16, 8])
    assert abi.OUT_HEADER.unpack_from(answer)[1] == -errno.EINVAL


@pytest.mark.parametrize("opcode", [0, 2000, 4096, 0xFFFF_FFFF, 39, 40, 48])
def test_operations_there_are_none(fs: FuseSession, opcode: int) -> None:
    assert answer_to(fs, opcode, ROOT) in ("ENOSYS", "EINVAL")


@pytest.mark.parametrize(("major", "minor"), [(6, 99), (0, 0), (7, 30), (7, 0)])
def test_init_of_old(fs: FuseSession, major: int, minor: int) -> None:
    assert answer_to(fs, abi.INIT, 0, fs.init(major, minor)) == "EPROTO"


def test_everything_before_init(fs: FuseSession) -> None:
    fs.ask(abi.DESTROY, 0)
    for opcode in set(OPCODES) - {
        abi.INIT,
        abi.DESTROY,
        abi.INTERRUPT,
        abi.FORGET,
        abi.BATCH_FORGET,
    }:
        assert answer_to(fs, opcode, ROOT, bytes(128)) == "EIO", opcode


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [0, 99, 1 << 63, (1 << 64) - 1])
def test_nodes_there_are_none(fs: FuseSession, node: int) -> None:
    named = {
        abi.LOOKUP: 0,
        abi.UNLINK: 0,
        abi.MKDIR: 8,
        abi.CREATE: 16,
        abi.OPEN: 8,
        abi.READLINK: 0,
    }
    for opcode, size in named.items():
        name = b"" if opcode in (abi.OPEN, abi.READLINK) else b"x\0"
        assert answer_to(fs, opcode, node, bytes(size) + name) == "ESTALE", opcode
    assert answer_to(fs, abi.GETATTR, node, bytes(16)) == "ESTALE"
    assert answer_to(fs, abi.LINK, ROOT, abi.LINK_IN.pack(node) + b"x\0") == "ESTALE"
    assert answer_to(fs, abi.RENAME, ROOT, abi.RENAME_IN.pack(node) + b"file\0x\0") == "ESTALE"


@pytest.mark.parametrize("handle", [0, 99, (1 << 64) - 1])
def test_handles_there_are_none(fs: FuseSession, handle: int) -> None:
    bodies = {
        abi.READ: abi.READ_IN.pack(handle, 0, 10, 0, 0, 0, 0),
        abi.READDIR: abi.READ_IN.pack(handle, 0, 10, 0, 0, 0, 0),
        abi.READDIRPLUS: abi.READ_IN.pack(handle, 0, 10, 0, 0, 0, 0),
        abi.WRITE: abi.WRITE_IN.pack(handle, 0, 1, 0, 0, 0, 0) + b"x",
        abi.RELEASE: abi.RELEASE_IN.pack(handle, 0, 0, 0),
        abi.RELEASEDIR: abi.RELEASE_IN.pack(handle, 0, 0, 0),
        abi.FLUSH: abi.FLUSH_IN.pack(handle, 0, 0, 0),
        abi.FSYNC: abi.FSYNC_IN.pack(handle, 0, 0),
        abi.FALLOCATE: abi.FALLOCATE_IN.pack(handle, 0, 1, 0, 0),
        abi.LSEEK: abi.LSEEK_IN.pack(handle, 0, os.SEEK_DATA, 0),
        abi.COPY_FILE_RANGE: abi.COPY_FILE_RANGE_IN.pack(handle, 0, ROOT, handle, 0, 1, 0),
    }
    assert {answer_to(fs, opcode, ROOT, body) for opcode, body in bodies.items()} == {"EBADF"}


def test_forgetting_more_than_was_told(fs: FuseSession) -> None:
    node = fs.lookup(ROOT, b"file")
    fs.forget(node, 1 << 40)
    fs.forget(node, 1)
    fs.forget(ROOT, 1 << 40)
    assert fs.session.statistics()["nodes"] == 1
    assert answer_to(fs, abi.GETATTR, ROOT, bytes(16)) == ""
    many = abi.BATCH_FORGET_IN.pack(0xFFFF_FFFF, 0) + abi.FORGET_ONE.pack(
        fs.lookup(ROOT, b"file"), 1
    )
    assert fs.send([fs.header(abi.BATCH_FORGET, 0, len(many)), many], []) == b""
    assert fs.session.statistics()["nodes"] == 2


def test_huge_sizes_and_offsets(fs: FuseSession) -> None:
    handle = fs.open(fs.lookup(ROOT, b"file"), os.O_RDWR)
    assert fs.read(handle, 0xFFFF_FFFF) == b"content"
    bodies = {
        abi.READ: abi.READ_IN.pack(handle, 1 << 63, 10, 0, 0, 0, 0),
        abi.WRITE: abi.WRITE_IN.pack(handle, 1 << 63, 1, 0, 0, 0, 0) + b"x",
        abi.FALLOCATE: abi.FALLOCATE_IN.pack(handle, 1 << 63, 1 << 63, 0, 0),
        abi.LSEEK: abi.LSEEK_IN.pack(handle, 1 << 63, os.SEEK_DATA, 0),
    }
    assert {answer_to(fs, opcode, ROOT, body) for opcode, body in bodies.items()} == {"EINVAL"}
    lying = abi.WRITE_IN.pack(handle, 0, 1 << 30, 0, 0, 0, 0) + b"x"
    assert answer_to(fs, abi.WRITE, ROOT, lying) == "EINVAL"
    assert fs.read(handle, 100) == b"content"
    directory = fs.ask(abi.OPENDIR, ROOT, bytes(8))
    (number, *_) = abi.OPEN_OUT.unpack(directory)
    for offset in (12345, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        body = abi.READ_IN.pack(number, offset, 4096, 0, 0, 0, 0)
        assert answer_to(fs, abi.READDIR, ROOT, body) in ("", "EINVAL")


# -- names --------------------------------------------------------------------------------------

NAMES = {
    b"../outside": "EINVAL",
    b"..": "EINVAL",
    b".": "EINVAL",
    b"sub/secret": "EINVAL",
    b"/": "EINVAL",
    b"/etc/passwd": "EINVAL",
    b"": "EINVAL",
    b"x" * 256: "ENAMETOOLONG",
}


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_lead_elsewhere(fs: FuseSession, tree: Path, name: bytes) -> None:
    before = sorted(tree.parent.rglob("*"))
    zero = name + b"\0"
    bodies = {
        abi.MKDIR: abi.MKDIR_IN.pack(0o755, 0) + zero,
        abi.MKNOD: abi.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0, 0) + zero,
        abi.CREATE: abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + zero,
        abi.SYMLINK: zero + b"target\0",
        abi.LINK: abi.LINK_IN.pack(fs.lookup(ROOT, b"file")) + zero,
        abi.UNLINK: zero,
        abi.RMDIR: zero,
        abi.RENAME: abi.RENAME_IN.pack(ROOT) + b"file\0" + zero,
        abi.RENAME2: abi.RENAME2_IN.pack(ROOT, 0, 0) + zero + b"new\0",
    }
    if name not in (b".", b".."):
        bodies[abi.LOOKUP] = zero
    answers = {opcode: answer_to(fs, opcode, ROOT, body) for opcode, body in bodies.items()}
    assert set(answers.values()) == {NAMES[name]}, answers
    assert sorted(tree.parent.rglob("*")) == before


@pytest.mark.parametrize("body", [b"file", b"file\0\0", b"file\0more\0", b"fi\0le\0"])
def test_strings_that_are_none(fs: FuseSession, body: bytes) -> None:
    assert answer_to(fs, abi.LOOKUP, ROOT, body) == "EINVAL"


def test_links_lead_nowhere(fs: FuseSession) -> None:
    for name in (b"out", b"absolute", b"magic"):
        node = fs.lookup(ROOT, name)
        assert answer_to(fs, abi.OPEN, node, abi.OPEN_IN.pack(os.O_RDONLY, 0)) == "ENXIO"
        assert answer_to(fs, abi.OPENDIR, node, abi.OPEN_IN.pack(0, 0)) == "ENOTDIR"
        assert answer_to(fs, abi.LOOKUP, node, b"secret\0") == "ENOTDIR"
        body = abi.CREATE_IN.pack(os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644, 0, 0) + name + b"\0"
        assert answer_to(fs, abi.CREATE, ROOT, body) == "ENXIO"
        assert answer_to(fs, abi.SETATTR, node, abi.SETATTR_IN.pack(8, *[0] * 15)) == "EINVAL"


# -- read-only ----------------------------------------------------------------------------------


def test_read_only_whatever_is_mounted(tree: Path) -> None:
    with FuseSession(tree, read_only=True) as fs:
        file = fs.lookup(ROOT, b"file")
        bodies = {
            abi.SETATTR: abi.SETATTR_IN.pack(1, *[0] * 15),
            abi.SYMLINK: b"new\0target\0",
            abi.MKNOD: abi.MKNOD_IN.pack(stat.S_IFREG, 0, 0, 0) + b"new\0",
            abi.MKDIR: abi.MKDIR_IN.pack(0, 0) + b"new\0",
            abi.UNLINK: b"file\0",
            abi.RMDIR: b"sub\0",
            abi.RENAME: abi.RENAME_IN.pack(ROOT) + b"file\0new\0",
            abi.RENAME2: abi.RENAME2_IN.pack(ROOT, 0, 0) + b"file\0new\0",
            abi.LINK: abi.LINK_IN.pack(file) + b"new\0",
            abi.SETXATTR: abi.SETXATTR_IN.pack(1, 0, 0, 0) + b"user.x\0x",
            abi.REMOVEXATTR: b"user.x\0",
            abi.CREATE: abi.CREATE_IN.pack(os.O_RDONLY | os.O_CREAT, 0, 0, 0) + b"file\0",
        }
        assert {answer_to(fs, op, ROOT, body) for op, body in bodies.items()} == {"EROFS"}
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            assert answer_to(fs, abi.OPEN, file, abi.OPEN_IN.pack(flags, 0)) == "EROFS"
        handle = fs.open(file)
        write = abi.WRITE_IN.pack(handle, 0, 1, 0, 0, 0, 0) + b"x"
        assert answer_to(fs, abi.WRITE, file, write) == "EBADF"
        allocate = abi.FALLOCATE_IN.pack(handle, 0, 100, 0, 0)
        assert answer_to(fs, abi.FALLOCATE, file, allocate) == "EBADF"
    assert (tree / "file").read_bytes() == b"content"


# -- greed --------------------------------------------------------------------------------------


def test_no_more_open_files_than_half_of_the_descriptors(tree: Path) -> None:
    with FuseSession(tree, descriptors=64) as fs:
        node = fs.lookup(ROOT, b"file")
        before = len(os.listdir("/proc/self/fd"))
        answers = [answer_to(fs, abi.OPEN, node, abi.OPEN_IN.pack(0, 0)) for _ in range(50)]
        assert answers == [""] * 32 + ["ENFILE"] * 18
        assert len(os.listdir("/proc/self/fd")) == before + 32
        assert answer_to(fs, abi.OPENDIR, ROOT, bytes(8)) == "ENFILE"
        assert fs.lookup(ROOT, b"sub")


def test_nodes_without_end(tree: Path) -> None:
    """Looked up and never forgotten: the same files are the same nodes."""
    with FuseSession(tree) as fs:
        for _ in range(1000):
            for name in (b"file", b"sub", b"out", b".", b".."):
                fs.lookup(ROOT, name)
        assert fs.session.statistics()["nodes"] == 4


# -- races --------------------------------------------------------------------------------------


class Swapper(threading.Thread):
    """Makes ``name`` a directory, then a link out of the share, and so on."""

    def __init__(self, tree: Path, name: str) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.swaps = 0
        self._at, self._real, self._link = tree / name, tree / "real", tree / "link"
        self._link.symlink_to("../outside")

    def run(self) -> None:
        while not self.ended.is_set():
            self._at.rename(self._real)
            self._link.rename(self._at)
            self._at.rename(self._link)
            self._real.rename(self._at)
            self.swaps += 1


def test_directory_swapped_for_a_link_out_of_the_share(fs: FuseSession, tree: Path) -> None:
    swapper = Swapper(tree, "sub")
    swapper.start()
    read = made = 0
    answers = set()
    try:
        for at in range(200_000):
            if at > 3000 and min(swapper.swaps, read, made) > 10:
                break  # how often both come between is the scheduler's to say
            while fs.fs.table.make_room():
                pass  # all is found anew, by name
            try:
                node = fs.lookup(ROOT, b"sub")
                _, handle = fs.create(node, b"made%d" % at)
                fs.release(handle)
                made += 1
                assert fs.content("sub/secret") == b"harmless"
                read += 1
            except OSError as error:
                answers.add(error.errno)
    finally:
        swapper.ended.set()
        swapper.join()
    assert sorted(path.name for path in (tree.parent / "outside").iterdir()) == ["secret"]
    assert answers <= {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENXIO}
    assert min(swapper.swaps, read, made) > 10


# -- nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", OPCODES)
def test_nonsense_is_answered(fs: FuseSession, tree: Path, opcode: int) -> None:
    """Random bodies, and every body cut short. Nothing but an error number ever comes of it."""
    dice = random.Random(opcode)
    nodes = [ROOT, fs.lookup(ROOT, b"sub"), fs.lookup(ROOT, b"file"), fs.lookup(ROOT, b"out"), 77]
    fs.open(nodes[2], os.O_RDWR)
    for _ in range(300):
        words = [
            dice.choice((0, 1, 2, 3, 8, 1 << 31, (1 << 64) - 1)) for _ in range(dice.randrange(9))
        ]
        body = struct.pack(f"<{len(words)}Q", *words)
        body += dice.choice((b"", b"x\0", b"..\0", b"sub\0y\0", b"\0", b"a/b\0", b"user.x\0v"))
        body = body[: dice.choice((len(body), dice.randrange(len(body) + 1)))]
        fs.uid = dice.choice((0, 1000, (1 << 32) - 1))
        if opcode == abi.INIT:
            fs.ask(abi.INIT, 0, fs.init())
        answer_to(fs, opcode, dice.choice(nodes), body)
    assert (tree.parent / "outside/secret").read_bytes() == SECRET
    assert len(list((tree.parent / "outside").iterdir())) == 1
    assert os.geteuid() == os.stat("/proc/self").st_uid
    fs.ask(abi.INIT, 0, fs.init())
    assert fs.getattr(ROOT)["nlink"]
