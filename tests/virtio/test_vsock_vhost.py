"""The kernel's plane of sockets on the real /dev/vhost-vsock, from the driver's side."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from hostel.abi import virtio as abi
from hostel.errors import HostError, QueueError
from hostel.virtio import vsock_vhost
from hostel.virtio.vsock_vhost import EVENT, RX, TX, VhostVsock, claim
from virtio.rig import EVENT_INDEX, Rig, eventually
from virtio.vsock_guest import BOTH, CID, PORT, Guest

pytestmark = pytest.mark.linux_kvm


FRESH = itertools.count(20_000)
"""The kernel remembers a connection for some seconds after a guest that never said goodbye to it."""


class KernelGuest(Guest):
    def __init__(self, rig: Rig, transport: str, *, features: int = 0) -> None:
        self.rig = rig
        vhost, cid = claim(CID)
        assert cid == CID
        self.kernel = VhostVsock(rig.loop, vhost, cid)
        self.driver = rig.seat(transport, self.kernel)
        self.buffer, self.features, self.size, self.filled = 4096, features, 128, True
        self.start()


@pytest.fixture(params=["pci", "mmio"])
def guest(rig: Rig, request: pytest.FixtureRequest) -> KernelGuest:
    return KernelGuest(rig, request.param, features=EVENT_INDEX)


@pytest.fixture
def door() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.bind((socket.VMADDR_CID_ANY, PORT))
        listener.listen()
        listener.settimeout(10)
        yield listener


def test_the_guest_connects(guest: KernelGuest, door: socket.socket) -> None:
    assert guest.driver.config(0, 8) == CID
    connection = guest.connect(next(FRESH))
    assert connection.seen == [abi.VSOCK_OP_RESPONSE]
    sock, address = door.accept()
    with sock:
        assert address == (CID, connection.guest_port)
        connection.write(b"from the guest")
        assert sock.recv(100) == b"from the guest"
        sock.sendall(bytes(100_000))
        assert connection.read(100_000) == bytes(100_000)
        connection.shutdown(BOTH)
        assert sock.recv(1) == b""


def test_the_host_connects(guest: KernelGuest) -> None:
    guest.listening.add(22)
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.settimeout(10)
        thread = threading.Thread(target=sock.connect, args=((CID, 22),))
        thread.start()
        guest.until(lambda: guest.connections)
        thread.join()
        sock.sendall(b"hello")
        assert guest.accepted().read(5) == b"hello"


def test_a_guest_that_starts_anew(guest: KernelGuest, door: socket.socket) -> None:
    guest.connect(next(FRESH))
    door.accept()[0].close()
    guest.driver.set_status(0)
    guest.start()
    assert guest.connect(next(FRESH)).seen == [abi.VSOCK_OP_RESPONSE]
    door.accept()[0].close()


def test_each_guest_has_an_address_of_its_own(
    guest: KernelGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    vhost, cid = claim(CID)
    assert cid == CID + 1
    vhost.close()
    monkeypatch.setattr(vsock_vhost, "LAST_CID", CID + 1)
    with pytest.raises(HostError, match="no vsock address is free"):
        claim(CID)


def test_after_a_snapshot(guest: KernelGuest, door: socket.socket) -> None:
    connection = guest.connect(next(FRESH))
    sock, _ = door.accept()
    with sock:
        connection.write(b"before")
        assert sock.recv(10) == b"before"
        state = guest.driver.transport.save()
        places = {index: (avail, used) for index, avail, used in state["device"]["queues"]}
        assert places[TX] == (2, 2)
        guest.driver.transport.load(state)
        guest.driver.queues[EVENT].add([], [4])
        guest.driver.kick(EVENT)
        assert guest.driver.wait(EVENT)[0].data == bytes(4)
    assert guest.connect(next(FRESH)).seen == [abi.VSOCK_OP_RESPONSE]


def test_a_broken_chain_stops_the_device(guest: KernelGuest) -> None:
    faults: list[object] = []
    guest.kernel.on_fault = lambda _, error: faults.append(error)
    queue = guest.driver.queues[TX]
    queue.set_descriptor(0, 1 << 45, 44)
    queue.offer(0)
    guest.driver.kick(TX)
    assert eventually(lambda: guest.driver.needs_reset)
    assert isinstance(faults[0], QueueError)
    guest.start()
    assert guest.connect(next(FRESH)).seen == [abi.VSOCK_OP_RST]


def test_a_driver_without_a_queue(guest: KernelGuest) -> None:
    guest.driver.set_status(0)
    guest.driver.start(indexes=(RX, EVENT))
    assert guest.driver.needs_reset
