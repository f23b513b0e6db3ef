"""Sockets in user space: connections both ways, half-closes, life cycle."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.errors import HostError
from hostel.virtio.vsock import EVENT, Vsock
from virtio.rig import EVENT_INDEX, Rig, eventually
from virtio.vsock_guest import BOTH, GUEST_PORT, Guest, Program, client

RST, RESPONSE = abi.VSOCK_OP_RST, abi.VSOCK_OP_RESPONSE
SEND, RECEIVE = abi.VSOCK_SHUTDOWN_SEND, abi.VSOCK_SHUTDOWN_RCV


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
    assert len(guest.device.streams) == 0


def test_the_guest_refuses(guest: Guest) -> None:
    with client(guest, 22) as sock:
        guest.until(lambda: guest.refused)
        assert sock.recv(100) == b""
    assert eventually(lambda: len(guest.device.streams) == 0)


def test_what_is_said_at_the_door(guest: Guest) -> None:
    for line in (b"HELLO\n", b"CONNECT \n", b"CONNECT 4294967296\n", b"x" * 40, b"\n"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(guest.path))
            sock.sendall(line)
            with contextlib.suppress(ConnectionResetError):  # closed with bytes of ours unread
                assert sock.recv(10) == b""
    guest.listening.add(22)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(guest.path))
        for piece in (b"CONN", b"ECT 2", b"2\nrest"):
            sock.sendall(piece)
            guest.settle()
        guest.until(lambda: guest.connections and guest.accepted().data)
        assert guest.accepted().take() == b"rest"


def test_nobody_is_let_in_without_a_driver(rig: Rig, tmp_path: Path) -> None:
    guest = Guest(rig, tmp_path)
    guest.driver.set_status(0)
    with client(guest, 22) as sock:
        assert sock.recv(10) == b""


def test_a_guest_that_does_not_answer(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostel.virtio.vsock.CONNECT_SECONDS", 0.05)
    guest.silent = True
    with client(guest, 22) as sock:
        assert sock.recv(10) == b""
    guest.until(lambda: guest.ops().get(RST))
    assert len(guest.device.streams) == 0


# --- Half-closes -------------------------------------------------------------------------------


def test_the_guest_ends_first(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        connection.write(b"question")
        connection.shutdown(SEND)
        assert sock.recv(100) == b"question"
        assert sock.recv(100) == b""
        sock.sendall(b"answer")
        assert connection.read(6) == b"answer"
        assert connection.ends == 0
    guest.until(lambda: connection.ends == BOTH)
    connection.shutdown(BOTH)
    guest.until(lambda: connection.seen[-1] == RST)
    assert len(guest.device.streams) == 0


def test_the_host_ends_first(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert connection.read(8) == b"question"
        guest.until(lambda: connection.ends == SEND)
        connection.write(b"answer")
        assert sock.recv(100) == b"answer"
    guest.until(lambda: connection.ends == BOTH)


def test_the_guest_stops_reading(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        connection.shutdown(RECEIVE)
        guest.settle()
        with pytest.raises(BrokenPipeError):
            sock.sendall(b"nobody")
        connection.write(b"still heard")
        assert sock.recv(100) == b"still heard"


def test_the_host_stops_reading(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        sock.shutdown(socket.SHUT_RD)
        connection.write(b"nobody")
        guest.until(lambda: connection.ends == RECEIVE)
        sock.sendall(b"still heard")
        assert connection.read(11) == b"still heard"


def test_the_guest_closes(guest: Guest, program: Program) -> None:
    """What it sent before arrives, however late it is read."""
    connection = guest.connect()
    data = os.urandom(300_000)
    with program.accept() as sock:
        sent = connection.write_some(data)
        connection.shutdown(BOTH)
        guest.until(lambda: connection.seen[-1] == RST)
        guest.connect()  # the same ports again
        got = b""
        while part := sock.recv(65536):
            got += part
        assert got == data[:sent]
        assert sent > 200_000
    program.accept().close()


def test_what_the_host_wrote_before_it_closed(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    data = os.urandom(100_000)
    with program.accept() as sock:
        sock.sendall(data)
    assert connection.read(len(data)) == data
    guest.until(lambda: connection.ends == BOTH)


def test_a_reset_by_the_guest(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        connection.send_packet(RST)
        assert sock.recv(10) == b""
        with pytest.raises(BrokenPipeError):
            sock.sendall(b"x")
    assert len(guest.device.streams) == 0


# --- Life cycle --------------------------------------------------------------------------------


def test_after_a_snapshot_connections_are_gone(guest: Guest, program: Program) -> None:
    guest.connect()
    with program.accept() as sock:
        guest.settle()
        state = guest.driver.transport.save()
        guest.driver.transport.load(state)
        assert sock.recv(10) == b""
        guest.driver.queues[EVENT].add([], [4])
        guest.driver.kick(EVENT)
        (event,) = guest.driver.wait(EVENT)
        assert event.data == bytes(4)
    guest.connections.clear()
    guest.connect(GUEST_PORT + 5)
    program.accept().close()


def test_a_reset_ends_all(guest: Guest, program: Program) -> None:
    guest.connect()
    with program.accept() as sock:
        guest.driver.set_status(0)
        assert sock.recv(10) == b""
        guest.start()
        guest.connect()
        program.accept().close()


def test_statistics(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        connection.write(b"12345")
        sock.sendall(b"123")
        connection.read(3)
        found = guest.device.statistics()
    assert found["streams"] == found["opened"] == 1
    assert (found["bytes_in"], found["bytes_out"], found["cid"]) == (5, 3, 7)


def test_a_socket_left_by_another_is_replaced(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "vsock.sock").touch()
    guest = Guest(rig, tmp_path)
    guest.listening.add(1)
    with client(guest, 1):
        guest.until(lambda: guest.connections)
    rig.unseat(guest.driver)
    assert not guest.path.exists()
    with pytest.raises(HostError, match="cannot listen at"):
        Vsock(rig.loop, tmp_path / "no" / "vsock.sock", cid=7)
