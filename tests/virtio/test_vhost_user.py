"""vhost-user: the protocol against a backend that misbehaves; a file system by virtiofsd, and by ours."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HelperError, HostelError, QueueError, SpecError
from hostel.memory import GuestMemory
from hostel.virtio import vhost_user
from hostel.virtio.fs import VirtioFs
from hostel.virtio.vhost_user import Frontend, VhostUserDevice
from virtio.rig import RUNNING, Driver, Rig, eventually, wait_fd

DAEMON = Path("/usr/lib/qemu/virtiofsd")
FEATURES = 1 << virtio.F_VERSION_1 | 1 << abi.F_PROTOCOL_FEATURES

# --- The frontend ------------------------------------------------------------------------------


class Peer:
    """The backend's end of a connection."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(5)
        self.frontend = Frontend(ours, "test")

    def close(self) -> None:
        self.frontend.close()
        self.sock.close()

    def receive(self) -> tuple[int, int, bytes, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, abi.HEADER.size, 8)
        request, flags, size = abi.HEADER.unpack(data)
        return request, flags, self.sock.recv(size) if size else b"", list(fds)

    def answer(self, request: int, payload: bytes, *, flags: int = 5, size: int = -1) -> None:
        size = len(payload) if size < 0 else size
        self.sock.sendall(abi.HEADER.pack(request, flags, size) + payload)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_messages_on_the_wire(peer: Peer) -> None:
    with GuestMemory(4 << 20, low_end=1 << 20, high_start=1 << 32) as memory:
        peer.frontend.set_mem_table(memory)
        request, flags, payload, fds = peer.receive()
        assert (request, flags) == (abi.SET_MEM_TABLE, abi.VERSION)
        assert abi.MEMORY_HEADER.unpack_from(payload) == (2, 0)
        low, high = (abi.MEMORY_REGION.unpack_from(payload, 8 + 32 * n) for n in (0, 1))
        base = memory.regions[0].hva
        assert low == (0, 1 << 20, base, 0)
        assert high == (1 << 32, 3 << 20, base + (1 << 20), 1 << 20)
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(memory.fd).st_ino] * 2
        for fd in fds:
            os.close(fd)
    peer.frontend.set_vring_addr(1, desc=0x1000, used=0x3000, avail=0x2000)
    _, _, payload, _ = peer.receive()
    assert struct.unpack("<IIQQQQ", payload) == (1, 0, 0x1000, 0x3000, 0x2000, 0)


def test_config_goes_through_for_backends_that_own_it(peer: Peer) -> None:
    peer.answer(abi.GET_CONFIG, abi.CONFIG_HEADER.pack(8, 4, 0) + b"size")
    assert peer.frontend.get_config(8, 4) == b"size"
    assert peer.receive()[2] == abi.CONFIG_HEADER.pack(8, 4, 0) + bytes(4)
    peer.frontend.set_config(8, b"new!")
    assert peer.receive()[2] == abi.CONFIG_HEADER.pack(8, 4, 0) + b"new!"


@pytest.mark.parametrize(
    "wrong",
    [
        {"request": abi.GET_QUEUE_NUM},
        {"flags": abi.VERSION},
        {"flags": abi.FLAG_REPLY | 2},
        {"size": 4},
        {"size": 2**32 - 1},
        {"payload": b"", "size": 0},
    ],
)
def test_wrong_answers_are_refused(peer: Peer, wrong: dict[str, object]) -> None:
    good = {"request": abi.GET_FEATURES, "payload": bytes(8), "flags": 5, "size": 8}
    peer.answer(**{**good, **wrong})  # type: ignore[arg-type]
    with pytest.raises(HelperError, match="backend"):
        peer.frontend.get_features()


def test_a_wrong_ring_in_an_answer(peer: Peer) -> None:
    peer.answer(abi.GET_VRING_BASE, abi.VRING_STATE.pack(7, 0))
    with pytest.raises(HelperError, match="ring 7"):
        peer.frontend.get_vring_base(0)


def test_a_refusal_is_an_error(peer: Peer) -> None:
    peer.answer(abi.GET_PROTOCOL_FEATURES, abi.U64.pack(1 << abi.PROTOCOL_F_REPLY_ACK))
    peer.frontend.negotiate(1 << abi.PROTOCOL_F_REPLY_ACK)
    peer.answer(abi.SET_OWNER, abi.U64.pack(1))
    with pytest.raises(HelperError, match="refused"):
        peer.frontend.set_owner()


def test_silence_ends(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user, "TIMEOUT", 0.1)
    quiet = Peer()
    with pytest.raises(HelperError, match="timed out"):
        quiet.frontend.get_features()
    quiet.close()


def test_a_peer_that_hangs_up(peer: Peer) -> None:
    peer.sock.close()
    with pytest.raises(HelperError, match="backend"):
        peer.frontend.get_features()


# --- A device on a backend in Python -----------------------------------------------------------


class Backend(threading.Thread):
    """Answers as a backend does, keeps what it is told, and can stop doing so."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.seen: list[int] = []
        self.fds: dict[tuple[int, int], int] = {}
        self.queues = 2
        self.silent_on = -1
        self.start()

    def run(self) -> None:
        while data := self._header():
            request, flags, size = abi.HEADER.unpack(data)
            payload = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
            self.seen.append(request)
            if request != self.silent_on:
                self._answer(request, flags, payload)

    def _header(self) -> bytes:
        data, fds, _, _ = socket.recv_fds(self.sock, abi.HEADER.size, 8)
        for fd in fds:
            os.close(fd)
        return data

    def _answer(self, request: int, flags: int, payload: bytes) -> None:
        protocol = 1 << abi.PROTOCOL_F_MQ | 1 << abi.PROTOCOL_F_REPLY_ACK
        answers: dict[int, Callable[[], bytes]] = {
            abi.GET_FEATURES: lambda: abi.U64.pack(FEATURES),
            abi.GET_PROTOCOL_FEATURES: lambda: abi.U64.pack(protocol),
            abi.GET_QUEUE_NUM: lambda: abi.U64.pack(self.queues),
            abi.GET_VRING_BASE: lambda: abi.VRING_STATE.pack(payload[0], 5),
        }
        if request in answers:
            body = answers[request]()
        elif flags & abi.FLAG_NEED_REPLY:
            body = abi.U64.pack(0)
        else:
            return
        self.sock.sendall(abi.HEADER.pack(request, abi.VERSION | abi.FLAG_REPLY, len(body)) + body)


class Remote(VhostUserDevice):
    device_id = virtio.ID_FS


class Pair:
    def __init__(self, rig: Rig, transport: str = "pci") -> None:
        ours, theirs = socket.socketpair()
        self.backend = Backend(theirs)
        self.device = Remote(rig.loop, ours, name="remote", queue_sizes=(16, 16))
        self.faults: list[HostelError] = []
        self.device.on_fault = lambda device, error: self.faults.append(error)
        self.driver = rig.seat(transport, self.device)

    def close(self) -> None:
        self.backend.sock.shutdown(socket.SHUT_RDWR)
        self.backend.join(5)
        self.backend.sock.close()


@pytest.fixture(params=["pci", "mmio"])
def pair(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Pair]:
    pair = Pair(rig, request.param)
    yield pair
    pair.close()


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtio.rig.ALWAYS", 1 << virtio.F_VERSION_1)


@pytest.mark.usefixtures("few_features")
class TestDevice:
    def test_order_of_the_set_up(self, pair: Pair) -> None:
        assert pair.backend.seen == [], "nothing before a driver is there"
        pair.driver.start()
        seen = pair.backend.seen
        assert seen[:5] == [
            abi.GET_FEATURES,
            abi.GET_PROTOCOL_FEATURES,
            abi.SET_PROTOCOL_FEATURES,
            abi.SET_OWNER,
            abi.GET_QUEUE_NUM,
        ]
        ring = [
            abi.SET_VRING_NUM,
            abi.SET_VRING_BASE,
            abi.SET_VRING_ADDR,
            abi.SET_VRING_CALL,
            abi.SET_VRING_KICK,
            abi.SET_VRING_ENABLE,
        ]
        assert seen[5:] == [abi.SET_FEATURES, abi.SET_MEM_TABLE, *ring, *ring]
        pair.driver.set_status(0)
        assert seen[-2:] == [abi.GET_VRING_BASE] * 2
        pair.driver.start()
        assert seen.count(abi.SET_OWNER) == 1
        assert seen.count(abi.SET_MEM_TABLE) == 2

    def test_a_bad_ring_never_reaches_the_backend(self, pair: Pair) -> None:
        pair.driver.start()
        pair.driver.negotiate()
        before = len(pair.backend.seen)
        pair.driver.queues[0].used = 1 << 45
        pair.driver.set_up(0, pair.driver.queues[0])
        pair.driver.set_status(RUNNING)
        assert pair.driver.needs_reset
        assert isinstance(pair.faults[-1], QueueError)
        assert len(pair.backend.seen) == before

    def test_the_backend_dies(self, pair: Pair) -> None:
        pair.driver.start()
        pair.backend.sock.shutdown(socket.SHUT_RDWR)
        assert wait_fd(pair.driver.config_fd())
        assert pair.driver.needs_reset
        assert "hung up" in str(pair.faults[0])
        pair.driver.set_status(0)
        assert pair.driver.get_status() == 0
        pair.driver.set_status(3)
        assert pair.driver.needs_reset, "it does not come back"

    def test_the_backend_dies_before_a_driver_looks(self, pair: Pair) -> None:
        pair.backend.sock.shutdown(socket.SHUT_RDWR)
        assert eventually(lambda: bool(pair.faults))
        pair.driver.set_status(1)
        pair.driver.set_status(3)
        assert pair.driver.needs_reset

    def test_a_backend_that_never_stops_is_cut_off(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair.driver.start()
        pair.device.frontend._sock.settimeout(0.2)
        pair.backend.silent_on = abi.GET_VRING_BASE
        pair.driver.set_status(0)
        assert pair.driver.get_status() == 0
        assert "timed out" in str(pair.faults[0])
        assert eventually(lambda: not pair.backend.is_alive())

    def test_too_few_queues(self, pair: Pair) -> None:
        pair.backend.queues = 1
        pair.driver.set_status(1)
        pair.driver.set_status(3)
        assert pair.driver.needs_reset
        assert "has 1 queues" in str(pair.faults[0])

    def test_state(self, pair: Pair) -> None:
        pair.driver.start()
        assert pair.device.save() == {"queues": [[0, 5, 5], [1, 5, 5]]}
        assert pair.backend.seen[-1] == abi.SET_VRING_ENABLE, "it runs again"


# --- A file system ---------------------------------------------------------------------------------

FUSE_IN = struct.Struct("<IIQQIIII")
FUSE_OUT = struct.Struct("<IiQ")
FUSE_LOOKUP, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 14, 15, 26
ROOT = 1


OURS = """
import os, socket, sys
from hostel.virtio.fuse import FileSystem, Session, Settings, serve
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1] + "~")
    listener.listen()
    os.rename(sys.argv[1] + "~", sys.argv[1])
    root = os.open(sys.argv[2], os.O_PATH)
    fs = FileSystem(root, Settings(cache="none"), memory=1 << 28, descriptors=1024)
    serve(listener.accept()[0], Session(fs))
"""


def _connected(rig: Rig, path: Path) -> VirtioFs:
    """The daemon binds its socket, and listens a moment later."""
    for _ in range(2000):
        with contextlib.suppress(HelperError):
            return VirtioFs(rig.loop, "root", str(path))
        time.sleep(0.005)
    raise AssertionError("the daemon does not listen")


class Share:
    """A directory served by another process, mounted by a driver that speaks FUSE."""

    def __init__(self, rig: Rig, transport: str, directory: Path, *, ours: bool) -> None:
        self.source = directory / "source"
        self.source.mkdir()
        (self.source / "hello").write_text("from the host\n")
        path = directory / "fs.sock"
        # It dies with us, however we end.
        command: list[object] = ["setpriv", "--pdeathsig", "KILL"]
        if ours:
            command += [sys.executable, "-c", OURS, path, self.source]
        else:
            command += [DAEMON, f"--socket-path={path}", "-o", f"source={self.source}"]
            command += ["-o", "sandbox=chroot"]
        self.daemon = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        self.device = _connected(rig, path)
        self.driver: Driver = rig.seat(transport, self.device)
        self._unique = 1

    def close(self) -> None:
        self.daemon.kill()
        self.daemon.wait()

    def mount(self) -> None:
        self.driver.start(size=64)
        answer = self.fuse(FUSE_INIT, 0, struct.pack("<IIII", 7, 31, 65536, 0).ljust(64, b"\0"))
        assert struct.unpack_from("<II", answer)[0] == 7

    def fuse(self, opcode: int, node: int, body: bytes, room: int = 4096) -> bytes:
        """Over the request queue, which is number 1."""
        self._unique += 2
        header = FUSE_IN.pack(40 + len(body), opcode, self._unique, node, 0, 0, 1, 0)
        done = self.driver.request(1, [header, body], [FUSE_OUT.size, room], indirect=True)
        length, error, unique = FUSE_OUT.unpack_from(done.data)
        assert (length, unique) == (done.written, self._unique)
        if error:
            raise OSError(-error, os.strerror(-error))
        return done.data[FUSE_OUT.size :]

    def read(self, name: str) -> bytes:
        (node,) = struct.unpack_from("<Q", self.fuse(FUSE_LOOKUP, ROOT, name.encode() + b"\0"))
        (handle,) = struct.unpack_from("<Q", self.fuse(FUSE_OPEN, node, bytes(8)))
        return self.fuse(FUSE_READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0))


@pytest.fixture(params=["pci", "mmio", "pci ours"])
def share(request: pytest.FixtureRequest, rig: Rig, tmp_path: Path) -> Iterator[Share]:
    transport, _, ours = request.param.partition(" ")
    if not ours and not DAEMON.exists():
        pytest.skip(f"{DAEMON} is not installed (Debian: qemu-system-common)")
    if not ours and os.geteuid():
        pytest.skip("sandbox=chroot needs root")
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    share = Share(rig, transport, tmp_path, ours=bool(ours))
    yield share
    share.close()


def test_a_real_file_through_fuse(share: Share) -> None:
    at = virtio.FS_CONFIG.offsets
    assert share.driver.config(at["tag"], 4) == int.from_bytes(b"root", "little")
    assert share.driver.config(at["num_request_queues"], 4) == 1
    share.mount()
    assert share.read("hello") == b"from the host\n"
    with pytest.raises(FileNotFoundError):
        share.fuse(FUSE_LOOKUP, ROOT, b"absent\0")
    assert not share.driver.needs_reset


def test_a_guest_that_restarts_mounts_again(share: Share) -> None:
    for turn in range(3):
        share.mount()
        (share.source / "hello").write_text(f"turn {turn}")
        assert share.read("hello") == f"turn {turn}".encode()
        share.driver.set_status(0)


def test_the_daemon_is_killed(share: Share) -> None:
    share.mount()
    faults: list[HostelError] = []
    share.device.on_fault = lambda device, error: faults.append(error)
    share.daemon.kill()
    deadline = time.monotonic() + 10
    while not (faults and share.driver.needs_reset) and time.monotonic() < deadline:
        wait_fd(share.driver.config_fd(), 0.01)  # on MMIO it also tells of used buffers
    assert share.driver.needs_reset
    assert isinstance(faults[0], HelperError)
    assert "fs root" in str(faults[0])
    started = time.monotonic()
    share.driver.set_status(0)
    assert time.monotonic() - started < 2


def test_state_while_mounted(share: Share) -> None:
    share.mount()
    state = share.driver.seat.save()
    assert state
    assert share.read("hello") == b"from the host\n", "it goes on after a save"


def test_tags(rig: Rig, tmp_path: Path) -> None:
    for tag in ("", "x" * 37):
        with pytest.raises(SpecError, match="tag"):
            VirtioFs(rig.loop, tag, tmp_path / "none")
    with pytest.raises(HelperError, match="cannot be reached"):
        VirtioFs(rig.loop, "fine", tmp_path / "none")
