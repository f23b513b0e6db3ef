"""Sockets in user space: connections both ways, credit to the byte, half-closes, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from virtio.rig import EVENT_INDEX, Rig, eventually
from virtio.vsock_guest import BOTH, Guest, Program, client

RST, RESPONSE, SHUTDOWN = abi.VSOCK_OP_RST, abi.VSOCK_OP_RESPONSE, abi.VSOCK_OP_SHUTDOWN
SEND, RECEIVE = abi.VSOCK_SHUTDOWN_SEND, abi.VSOCK_SHUTDOWN_RCV


@pytest.fixture
def guest(rig: Rig, tmp_path: Path) -> Guest:
    return Guest(rig, tmp_path)


@pytest.fixture
def program(guest: Guest) -> Iterator[Program]:
    program = Program(guest)
    yield program
    program.close()


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_the_guest_connects(rig: Rig, tmp_path: Path, transport: str, features: int) -> None:
    guest = Guest(rig, tmp_path, transport=transport, features=features)
    assert guest.driver.config(0, 8) == 7
    program = Program(guest)
    connection = guest.connect()
    assert connection.seen == [RESPONSE]
    with program.accept() as sock:
        connection.write(b"from the guest")
        assert sock.recv(100) == b"from the guest"
        sock.sendall(b"from the host")
        assert connection.read(13) == b"from the host"
    guest.until(lambda: connection.ends == BOTH)
    program.close()


def test_the_host_connects(guest: Guest) -> None:
    guest.listening.add(22)
    with client(guest, 22) as sock:
        sock.sendall(b"at once")
        guest.until(lambda: guest.connections and guest.accepted().data)
        connection = guest.accepted()
        assert sock.recv(100) == b"OK %d\n" % connection.host_port
        assert connection.take() == b"at once"
        connection.write(b"answer")
        assert sock.recv(100) == b"answer"


def test_nobody_listens(guest: Guest) -> None:
    assert guest.connect().seen == [RST]
    with client(guest, 22) as sock:
        while not eventually(lambda: guest.device.counters["refused"] >= 0 and guest.pump(), 0.1):
            pass
        assert sock.recv(100) == b""
    guest.settle()
    assert len(guest.device.streams) == 0
