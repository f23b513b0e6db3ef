"""Our vhost-user backend behind our vhost-user frontend: a guest's sockets served through both."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.errors import HostError, MemoryFault
from hostel.memory import ForeignMemory, GuestMemory, Region
from hostel.virtio.vhost_user import VhostUserDevice
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
        abi.HEADER.pack(abi.SET_VRING_NUM, 1, 0),
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


def test_memory_of_another_process() -> None:
    with GuestMemory(4 << 20) as memory:
        regions = (Region(0, 1 << 20, 0, 0), Region(1 << 32, 3 << 20, 0, 1 << 20))
        foreign = ForeignMemory(memory.fd, regions)
        foreign.write(1 << 32, b"shared")
        assert memory.read(1 << 20, 6) == b"shared"
        foreign.view(16, 4)[:] = b"view"
        assert memory.read(16, 4) == b"view"
        for gpa, size in (
            (1 << 20, 1),
            ((1 << 20) - 1, 2),
            (1 << 45, 1),
            ((1 << 32) + (3 << 20), 1),
        ):
            with pytest.raises(MemoryFault):
                foreign.view(gpa, size)
        with pytest.raises(HostError):
            foreign.hva(0)
        with pytest.raises(HostError, match="behind the end"):
            ForeignMemory(memory.fd, (Region(0, 8 << 20, 0, 0),))
