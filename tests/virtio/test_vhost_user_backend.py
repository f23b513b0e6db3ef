"""Our vhost-user backend behind our vhost-user frontend: a guest's sockets, and entropy, through both."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HostError, MemoryFault
from hostel.memory import GuestMemory, Region
from hostel.virtio.foreign import ForeignMemory
from hostel.virtio.rng import Rng
from hostel.virtio.vhost_user import Frontend, VhostUserDevice
from hostel.virtio.vhost_user_backend import Backend
from hostel.virtio.vsock import RX, Vsock
from virtio.rig import EVENT_INDEX, Rig, eventually, wait_fd
from virtio.vsock_guest import CID, PORT, Guest, Packet, Program


class Remote(VhostUserDevice):
    """A VMM's part of a socket device: all of it but the event queue."""

    device_id = virtio.ID_VSOCK


class Served(Guest):
    """The guest of ``vsock_guest``, with a vhost-user connection between it and the device."""

    def __init__(self, rig: Rig, directory: Path, *, features: int = 0) -> None:
        self.rig, self.path = rig, directory / "vsock.sock"
        ours, theirs = socket.socketpair()
        self.device = Vsock(rig.loop, self.path, cid=CID)
        self.backend = Backend(rig.loop, theirs, self.device, queues=2)
        # In the frontend each request waits for its answer, so it has an event loop's thread to itself.
        self.remote = Remote(rig.loop, ours, name="remote", queue_sizes=(128, 128))
        self.driver = rig.on_pci(self.remote)
        self.buffer, self.features, self.size = 4096, features, 128
        self.filled = True
        self.start()


@pytest.fixture(params=[0, EVENT_INDEX])
def guest(rig: Rig, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    guest = Served(rig, tmp_path, features=request.param)
    yield guest
    guest.backend.close()


def test_a_connection_through_both(guest: Served) -> None:
    program = Program(guest)
    connection = guest.connect()
    data = os.urandom(500_000)
    with program.accept() as sock:
        connection.write(b"hello")
        assert sock.recv(100) == b"hello"
        sock.sendall(data[:100_000])
        assert connection.read(100_000) == data[:100_000]
    program.close()


def test_a_guest_that_starts_anew(guest: Served) -> None:
    program = Program(guest)
    guest.connect()
    program.accept().close()
    guest.driver.set_status(0)
    assert len(guest.device.streams) == 0
    guest.start()
    guest.connect()
    with program.accept() as sock:
        sock.sendall(b"again")
        assert guest.connections[1024, PORT].read(5) == b"again"
    program.close()


def test_configuration(guest: Served) -> None:
    assert guest.remote.frontend.has(abi.PROTOCOL_F_CONFIG)
    assert guest.remote.frontend.get_config(0, 8) == CID.to_bytes(8, "little")


def test_an_interrupt_while_the_eventfd_changes(rig: Rig, tmp_path: Path) -> None:
    """A VMM gives another one when the guest masks its interrupt: what went to the last is not lost."""
    guest = Served(rig, tmp_path, features=EVENT_INDEX)
    masked = os.eventfd(0, os.EFD_NONBLOCK)
    guest.remote.frontend.set_vring_call(RX, masked)
    guest.send(Packet(virtio.VSOCK_OP_REQUEST))
    assert wait_fd(masked), "the refusal"
    guest.remote.frontend.set_vring_call(RX, guest.driver.call_fd(RX))
    assert wait_fd(guest.driver.call_fd(RX), 2)
    os.close(masked)
    guest.backend.close()


def test_the_vmm_goes(guest: Served) -> None:
    program = Program(guest)
    guest.connect()
    with program.accept() as sock:
        guest.rig.loop.run_sync(guest.remote._disconnect)
        assert sock.recv(10) == b""
        assert eventually(lambda: not guest.path.exists())
    program.close()


@pytest.mark.parametrize(
    "message",
    [
        abi.HEADER.pack(99, 1, 0),
        abi.HEADER.pack(abi.SET_FEATURES, 1, 1 << 30),
        abi.HEADER.pack(abi.SET_FEATURES, 1, 3) + b"abc",
        abi.HEADER.pack(abi.SET_VRING_NUM, 1, 8) + abi.VRING_STATE.pack(9, 16),
        abi.HEADER.pack(abi.SET_VRING_NUM, 1, 8) + abi.VRING_STATE.pack(256, 16),
        abi.HEADER.pack(abi.SET_VRING_NUM, 1, 0),
        abi.HEADER.pack(abi.GET_FEATURES, 2, 0),
        abi.HEADER.pack(abi.SET_VRING_KICK, 1, 8) + abi.U64.pack(0),
        abi.HEADER.pack(abi.SET_VRING_ADDR, 1, 40) + abi.VRING_ADDR.pack(0, 0, 1, 2, 3, 0),
        abi.HEADER.pack(abi.SET_MEM_TABLE, 1, 8) + abi.MEMORY_HEADER.pack(1, 0),
        abi.HEADER.pack(abi.GET_CONFIG, 1, 12) + abi.CONFIG_HEADER.pack(0, 1 << 30, 0),
    ],
)
def test_what_is_no_message_ends_the_connection(rig: Rig, tmp_path: Path, message: bytes) -> None:
    ours, theirs = socket.socketpair()
    device = Vsock(rig.loop, tmp_path / "vsock.sock", cid=CID)
    Backend(rig.loop, theirs, device, queues=2)
    ours.settimeout(5)
    ours.sendall(message)
    assert ours.recv(1) == b""
    assert not (tmp_path / "vsock.sock").exists()
    ours.close()


@pytest.mark.parametrize("size", [5, abi.HEADER.size + 3])
def test_half_a_message(rig: Rig, tmp_path: Path, size: int) -> None:
    ended = threading.Event()
    ours, theirs = socket.socketpair()
    device = Vsock(rig.loop, tmp_path / "vsock.sock", cid=CID)
    backend = Backend(rig.loop, theirs, device, queues=2, on_end=ended.set)
    ours.sendall((abi.HEADER.pack(abi.SET_FEATURES, 1, 8) + bytes(8))[:size])
    ours.close()
    assert ended.wait(10)
    assert "in the middle" in str(backend.error)


def test_a_message_in_pieces(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    backend = Backend(rig.loop, theirs, Rng(rig.loop), queues=1)
    ours.settimeout(5)
    for byte in abi.HEADER.pack(abi.GET_QUEUE_NUM, 1, 0):
        ours.send(bytes([byte]))
        rig.loop.run_sync(lambda: None)
    assert ours.recv(100) == abi.HEADER.pack(abi.GET_QUEUE_NUM, 5, 8) + abi.U64.pack(1)
    ours.close()
    assert eventually(lambda: theirs.fileno() < 0)
    assert backend.error is None, "it hung up: no fault"


def test_one_ring_of_two(rig: Rig) -> None:
    """A driver may leave queues out (virtio 1.2 §3.1.1): the others are served."""
    ours, theirs = socket.socketpair()
    backend = Backend(rig.loop, theirs, Rng(rig.loop), queues=2)
    remote = Remote(rig.loop, ours, name="remote", queue_sizes=(64, 64))
    driver = rig.on_pci(remote)
    for _ in range(2):
        driver.start(indexes=(1,))
        assert driver.request(1, [], [32]).written == 32
        assert remote.save()["queues"] == [[1, 1, 1]]
        driver.start()
        assert driver.request(0, [], [16]).written == 16
        assert driver.request(1, [], [16]).written == 16
    assert not remote.frontend.has(abi.PROTOCOL_F_CONFIG), "this device has no config space"
    backend.close()


def test_a_guest_that_polls(guest: Served) -> None:
    """The VMM takes the eventfd away, and gives it back: an interrupt comes for what went unheard."""
    frontend = guest.remote.frontend
    frontend._set(abi.SET_VRING_CALL, abi.U64.pack(RX | abi.VRING_NO_FD))
    guest.send(Packet(virtio.VSOCK_OP_REQUEST))
    queue = guest.driver.queues[RX]
    assert eventually(lambda: guest.rig.memory.read_u16(queue.used + 2) > 0)
    assert not wait_fd(guest.driver.call_fd(RX), 0.05)
    frontend.set_vring_call(RX, guest.driver.call_fd(RX))
    assert wait_fd(guest.driver.call_fd(RX), 2)


def test_memory_shown_anew_while_rings_run(guest: Served) -> None:
    """As QEMU does when a part of it moves, or is plugged in; no connection ends of it."""
    program = Program(guest)
    connection = guest.connect()
    memory, frontend = guest.rig.memory, guest.remote.frontend
    with program.accept() as sock, GuestMemory(2 << 20) as plugged:
        regions = [(region, memory.fd) for region in memory.regions]
        regions.append((Region(1 << 32, plugged.size, plugged.regions[0].hva, 0), plugged.fd))
        _show(frontend, regions)
        connection.write(b"still")
        assert sock.recv(100) == b"still"
        _show(frontend, regions[:1])
        sock.sendall(b"here")
        assert connection.read(4) == b"here"
    program.close()


def _show(frontend: Frontend, regions: list[tuple[Region, int]]) -> None:
    payload = abi.MEMORY_HEADER.pack(len(regions), 0) + b"".join(
        abi.MEMORY_REGION.pack(at.gpa, at.size, at.hva, at.offset) for at, _ in regions
    )
    frontend._set(abi.SET_MEM_TABLE, payload, [fd for _, fd in regions])


def test_memory_of_another_process() -> None:
    with GuestMemory(4 << 20) as memory, GuestMemory(2 << 20) as plugged:
        low, high = Region(0, 1 << 20, 1 << 40, 0), Region(1 << 32, 3 << 20, 1 << 41, 1 << 20)
        foreign = ForeignMemory((low, high), (memory.fd, memory.fd))
        foreign.view(1 << 32, 6)[:] = b"shared"
        assert memory.read(1 << 20, 6) == b"shared"
        foreign.view(16, 4)[:] = b"view"
        assert memory.read(16, 4) == b"view"
        assert foreign.gpa_of((1 << 41) + 5) == (1 << 32) + 5
        for gpa, size in (
            (1 << 20, 1),
            ((1 << 20) - 1, 2),
            (1 << 45, 1),
            ((1 << 32) + (3 << 20), 1),
            (64, -32),
        ):
            with pytest.raises(MemoryFault):
                foreign.view(gpa, size)
        with pytest.raises(MemoryFault):
            foreign.gpa_of((1 << 40) + (1 << 20))
        before = foreign.view(16, 4)
        foreign.show((low, Region(1 << 33, 1 << 20, 1 << 42, 0)), (memory.fd, plugged.fd))
        foreign.view(1 << 33, 3)[:] = b"new"
        assert (plugged.read(0, 3), bytes(before)) == (b"new", b"view")
        with pytest.raises(MemoryFault):
            foreign.view(1 << 32, 1)
        with pytest.raises(HostError, match="behind the end"):
            foreign.show((Region(0, 8 << 20, 0, 0),), (memory.fd,))
