"""Files and trees through the real agent, both ways; and what a hostile guest sends instead of a copy."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostel.errors import AgentError, HostelError, HostError, UserError
from hostel.guest.client import AgentClient, Ids
from hostel.guest.files import Entry, copy_in, copy_out, list_directory
from hostel.guest.protocol import HEADER, Channel, EntryKind, ExitKind, Type, Writer

END = Entry(EntryKind.END)


def make_tree(root: Path) -> None:
    (root / "a" / "empty").mkdir(parents=True)
    (root / "a" / "data").write_bytes(os.urandom(300_000))
    (root / "a" / "script").write_text("#!/bin/sh\n")
    (root / "a" / "script").chmod(0o755)
    (root / "nothing").touch()
    (root / "weird \n name").write_text("x")
    (root / os.fsdecode(b"\xff")).write_text("bytes")
    (root / "link").symlink_to("a/data")
    (root / "dangling").symlink_to("/nowhere/at all")
    os.mkfifo(root / "pipe")
    (root / "read-only").mkdir()
    (root / "read-only" / "inner").write_text("y")
    (root / "read-only").chmod(0o555)
    for path in (root / "a", root / "a" / "data", root):
        os.utime(path, ns=(10**18 + 1, 10**18 + 7))


def picture(root: Path) -> dict[str, object]:
    """All of a tree that a copy keeps."""
    seen: dict[str, object] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        info, name = path.lstat(), str(path.relative_to(root))
        if stat.S_ISLNK(info.st_mode):
            seen[name] = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            seen[name] = (oct(info.st_mode), info.st_mtime_ns, path.read_bytes())
        elif stat.S_ISDIR(info.st_mode):
            seen[name] = (oct(info.st_mode), info.st_mtime_ns)
    return seen


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    make_tree(root)
    return root


def test_put_and_get(client: AgentClient, tmp_path: Path) -> None:
    path, data = tmp_path / "file", os.urandom(3 << 20)
    client.put(
        str(path), data, mode=0o640, owner=Ids(os.geteuid(), os.getegid()), mtime_ns=1_500_000_001
    )
    info = path.stat()
    assert path.read_bytes() == data
    assert stat.S_IMODE(info.st_mode) == 0o640
    assert info.st_mtime_ns == 1_500_000_001
    assert client.get(str(path)) == data


def test_put_replaces(client: AgentClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    client.put(str(path), b"a long first version")
    client.put(str(path), b"")
    assert client.get(str(path)) == b""


@pytest.mark.parametrize("path", ["/nowhere/x", "/"])
def test_put_says_why_not(client: AgentClient, path: str) -> None:
    with pytest.raises(AgentError, match=f"open: {path}: "):
        client.put(path, b"x" * (2 << 20))


def test_get_says_why_not(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="stat: /nowhere: No such file or directory"):
        client.get("/nowhere")
    with pytest.raises(AgentError, match="is not a file"):
        client.get(str(tmp_path))


def test_full_disk(client: AgentClient) -> None:
    with pytest.raises(AgentError, match="write: /dev/full: No space left on device"):
        client.put("/dev/full", b"x" * (1 << 20))


def test_list(client: AgentClient, tree: Path) -> None:
    entries = {entry.name: entry for entry in list_directory(client, str(tree))}
    assert set(entries) == set(os.listdir(tree))
    assert entries["a"].kind is EntryKind.DIRECTORY
    assert entries["link"].link == "a/data"
    assert entries["pipe"].kind is EntryKind.OTHER
    assert [e.size for e in list_directory(client, str(tree / "a" / "data"))] == [300_000]


@pytest.mark.parametrize("copy", ["in", "out"])
def test_trees_are_copied_whole(client: AgentClient, tree: Path, copy: str) -> None:
    target = tree.parent / "copy"
    if copy == "in":
        copy_in(client, tree, str(target))
    else:
        copy_out(client, str(tree), target)
    assert picture(target) == picture(tree)
    assert len(picture(target)) == 12
    assert not (target / "pipe").exists()


def test_copies_again_over_the_first(client: AgentClient, tree: Path) -> None:
    for _ in range(2):
        copy_in(client, tree, str(tree.parent / "in"))
        copy_out(client, str(tree), tree.parent / "out")
    if os.geteuid() == 0:  # anyone else cannot write into the read-only folder again
        copies = tree.parent / "in" / "tree", tree.parent / "out" / "tree"
        assert [picture(copy) for copy in copies] == [picture(tree)] * 2


def test_into_a_directory_that_exists(client: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    copy_in(client, tmp_path / "file", str(tmp_path / "in"))
    copy_out(client, str(tmp_path / "file"), tmp_path / "out")
    assert (tmp_path / "in" / "file").read_text() == "text"
    assert (tmp_path / "out" / "file").read_text() == "text"


def test_copy_in_of_what_is_not_there(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        copy_in(client, tmp_path / "nothing", "/tmp/x")


def test_copy_out_of_what_is_not_there(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="No such file"):
        copy_out(client, "/nowhere", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_copy_out_without_a_name(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no name of its own"):
        copy_out(client, "/", tmp_path)


# A guest that lies


@pytest.fixture
def liar() -> Iterator[Callable[[bytes], AgentClient]]:
    """A client whose agent answers the first request with these bytes on STDOUT, and success."""
    opened: list[tuple[AgentClient, socket.socket]] = []

    def start(answer: bytes) -> AgentClient:
        ours, theirs = socket.socketpair()
        threading.Thread(target=_lie, args=(theirs, answer), daemon=True).start()
        opened.append((AgentClient(ours), theirs))
        return opened[-1][0]

    yield start
    for client, theirs in opened:
        client.close()
        theirs.close()


def _lie(sock: socket.socket, answer: bytes) -> None:
    exit_message = Writer().u32(ExitKind.CODE, 0).string("").string("").data
    try:
        while HEADER.unpack(sock.recv(HEADER.size))[2] != Type.PACK:
            sock.recv(4)  # the greeting's payload
        for start in range(0, len(answer), 1 << 15):
            part = answer[start : start + (1 << 15)]
            sock.sendall(HEADER.pack(len(part), 1, Type.DATA, Channel.STDOUT, 0) + part)
        for channel in (Channel.STDOUT, Channel.STDERR):
            sock.sendall(HEADER.pack(0, 1, Type.EOF, channel, 0))
        sock.sendall(HEADER.pack(len(exit_message), 1, Type.EXIT, 0, 0) + exit_message)
    except OSError:
        pass  # the client had enough


def file(name: str, content: bytes = b"stolen", mode: int = 0o644) -> bytes:
    return bytes(Entry(EntryKind.FILE, name, mode, 0, 0, 0, len(content)).encode()) + content


def directory(name: str) -> bytes:
    return bytes(Entry(EntryKind.DIRECTORY, name, 0o755, 0, 0, 0).encode())


def link(name: str, target: str) -> bytes:
    return bytes(Entry(EntryKind.SYMLINK, name, 0o777, 0, 0, 0, link=target).encode())


NAMES = [
    "../evil",
    "a/../../evil",
    "/tmp/evil",
    "..",
    ".",
    "a//b",
    "a/",
    "/",
    "../../../../../../etc/evil",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [file, directory, lambda name: link(name, "x")])
def test_names_that_lead_elsewhere(
    liar: Callable[[bytes], AgentClient], tmp_path: Path, name: str, make: Callable[[str], bytes]
) -> None:
    target = tmp_path / "inner" / "copy"
    target.parent.mkdir()
    answer = directory("") + directory("a") + make(name) + bytes(END.encode())
    with pytest.raises(AgentError, match="leads elsewhere"):
        copy_out(liar(answer), "/x", target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "copy", "inner"]


@pytest.mark.parametrize("name", ["out/evil", "out"])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_are_not_followed(
    liar: Callable[[bytes], AgentClient], tmp_path: Path, name: str, absolute: bool
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "evil").write_text("mine")
    aim = outside / "evil" if name == "out" else outside
    pointer = str(aim) if absolute else os.path.relpath(aim, tmp_path / "copy")
    answer = directory("") + link("out", pointer) + file(name) + bytes(END.encode())
    with pytest.raises(HostError, match="cannot be written"):
        copy_out(liar(answer), "/x", tmp_path / "copy")
    assert (outside / "evil").read_text() == "mine"
    assert os.listdir(outside) == ["evil"]


def test_the_root_of_a_copy_is_no_way_out(
    liar: Callable[[bytes], AgentClient], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    answer = link("", str(outside)) + file("evil") + bytes(END.encode())
    with pytest.raises(HostError):
        copy_out(liar(answer), "/x", tmp_path / "copy")
    assert os.listdir(outside) == []


def test_a_pipe_in_the_way_does_not_hold_us(
    liar: Callable[[bytes], AgentClient], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "copy")
    with pytest.raises(HostError):
        copy_out(liar(file("") + bytes(END.encode())), "/x", tmp_path / "copy")


def test_set_uid_is_dropped(liar: Callable[[bytes], AgentClient], tmp_path: Path) -> None:
    copy_out(liar(file("", mode=0o6755) + bytes(END.encode())), "/x", tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o755


BROKEN = {
    "nothing": b"",
    "half an entry": b"\0" * 20,
    "unknown kind": struct.pack("<I", 77) + b"\0" * 28 + (b"\0" * 5) * 2,
    "endless name": struct.pack("<I", 0) + b"\0" * 28 + b"\xff\xff\xff\xff",
    "name without its NUL": struct.pack("<I", 0) + b"\0" * 28 + b"\2\0\0\0abc" + b"\0" * 5,
    "data cut short": bytes(Entry(EntryKind.FILE, "", 0, 0, 0, 0, 1 << 40).encode()) + b"x",
    "no end": directory(""),
    "kind of a file inside a file": file("") + file("inner"),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
def test_broken_streams(
    liar: Callable[[bytes], AgentClient], tmp_path: Path, answer: bytes
) -> None:
    with pytest.raises(HostelError):
        copy_out(liar(answer), "/x", tmp_path / "copy")


def test_get_has_a_limit(liar: Callable[[bytes], AgentClient]) -> None:
    answer = bytes(Entry(EntryKind.FILE, "", 0, 0, 0, 0, 1 << 62).encode())
    with pytest.raises(AgentError, match="copy it to a file"):
        liar(answer).get("/x")


def test_extreme_times(liar: Callable[[bytes], AgentClient], tmp_path: Path) -> None:
    entry = Entry(EntryKind.FILE, "", 0o600, 0, 0, -(1 << 63), 0).encode()
    copy_out(liar(bytes(entry) + bytes(END.encode())), "/x", tmp_path / "copy")
    assert (tmp_path / "copy").exists()
