"""Credit to the byte in both directions, large transfers, many connections, and who reads slowly."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.virtio.vsock_table import BUDGET, SMALL_WINDOW, WINDOW, Streams
from virtio.rig import EVENT_INDEX, Rig
from virtio.vsock_guest import (
    BOTH,
    GUEST_PORT,
    PORT,
    Connection,
    Guest,
    Program,
    many_files,
)

RST, RESPONSE = abi.VSOCK_OP_RST, abi.VSOCK_OP_RESPONSE


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_100_megabytes_both_ways(rig: Rig, tmp_path: Path, transport: str) -> None:
    guest = Guest(rig, tmp_path, transport=transport, features=EVENT_INDEX)
    program = Program(guest)
    connection = guest.connect()
    total, chunk = 100 << 20, os.urandom(1 << 20)
    digest = hashlib.sha256()
    for _ in range(total >> 20):
        digest.update(chunk)
    received = hashlib.sha256()
    with program.accept() as sock:
        writer = threading.Thread(target=sock.sendall, args=(chunk * (total >> 20),))
        writer.start()
        heard = hashlib.sha256()
        reader = threading.Thread(target=digest_of, args=(sock, total, received))
        reader.start()
        left = total
        while left or connection.consumed < total:
            left -= connection.write_some(chunk[:left])
            if left:
                guest.until(lambda: connection.data or connection.credit > 0)
            elif connection.consumed < total:
                guest.until(lambda: connection.data)
            heard.update(connection.take())
        writer.join(10)
        reader.join(10)
    assert heard.digest() == digest.digest()
    assert received.digest() == expected(chunk, connection)
    program.close()


def expected(chunk: bytes, connection: Connection) -> bytes:
    digest = hashlib.sha256()
    for part in connection.parts:
        digest.update(chunk[:part])
    return digest.digest()


def digest_of(sock: socket.socket, total: int, digest: hashlib._Hash) -> None:
    buffer = bytearray(1 << 18)
    while total:
        size = sock.recv_into(buffer)
        digest.update(memoryview(buffer)[:size])
        total -= size


@pytest.mark.parametrize("window", [1, 100, 4096, 70_000])
def test_any_window_of_the_guest(guest: Guest, program: Program, window: int) -> None:
    """``hear`` counts every byte against it."""
    connection = guest.connect(window=window)
    data = os.urandom(min(50 * window, 1 << 20))
    with program.accept() as sock:
        writer = threading.Thread(target=sock.sendall, args=(data,))
        writer.start()
        assert connection.read(len(data)) == data
        writer.join(5)


def test_counters_wrap(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept() as sock:
        stream = guest.device.streams.get(GUEST_PORT, PORT)
        assert stream
        start = (1 << 32) - 1000
        stream.received = stream.forwarded = stream.reported = start
        stream.sent = stream.acknowledged = start
        connection.sent = connection.consumed = connection.received = start
        connection.send_packet(abi.VSOCK_OP_CREDIT_REQUEST)
        guest.until(lambda: connection.seen[-1] == abi.VSOCK_OP_CREDIT_UPDATE)
        data = os.urandom(600_000)
        writer = threading.Thread(target=sock.sendall, args=(data,))
        writer.start()
        assert connection.read(len(data)) == data
        writer.join(5)
        reader = threading.Thread(target=connection.write, args=(data,))
        reader.start()
        got = b""
        while len(got) < len(data):
            got += sock.recv(65536)
        reader.join(5)
        assert got == data
        assert stream.received > 1 << 32


def test_a_thousand_connections(rig: Rig, tmp_path: Path) -> None:
    count = 1000
    with many_files(), contextlib.ExitStack() as stack:
        guest = Guest(rig, tmp_path)
        program = Program(guest)
        stack.callback(program.close)
        connections = [Connection(guest, GUEST_PORT + n, PORT) for n in range(count)]
        for connection in connections:
            guest.connections[connection.guest_port, PORT] = connection
            connection.send_packet(abi.VSOCK_OP_REQUEST)
            guest.pump()
        guest.until(lambda: all(c.seen for c in connections))
        assert all(c.seen == [RESPONSE] for c in connections)
        socks = [stack.enter_context(program.accept()) for _ in connections]
        for connection in connections:
            connection.write(b"%d" % connection.guest_port)
            guest.pump()
        assert [sock.recv(10) for sock in socks] == [b"%d" % (GUEST_PORT + n) for n in range(count)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%d" % number)
        guest.until(lambda: all(c.data for c in connections))
        assert [c.take() for c in connections] == [b"%d" % n for n in range(count)]
        for connection in connections:
            connection.shutdown(BOTH)
            guest.pump()
        guest.until(lambda: all(c.seen[-1] == RST for c in connections))
        assert len(guest.device.streams) == 0


def test_windows_shrink_as_they_become_many() -> None:
    with many_files(), contextlib.ExitStack() as stack:
        table = Streams()
        windows = []
        for number in range(600):
            ours, theirs = socket.socketpair()
            stack.callback(theirs.close)
            windows.append(table.add(ours, number, 1).window)
        assert windows[0] == WINDOW
        assert sorted(windows, reverse=True) == windows
        assert windows[-1] == SMALL_WINDOW
        assert sum(windows) < BUDGET + len(windows) * SMALL_WINDOW
        table.clear()
        ours, theirs = socket.socketpair()
        assert table.add(ours, 1, 1).window == WINDOW, "what was granted has come back"
        table.close()
        theirs.close()


def fill(guest: Guest, sock: socket.socket) -> None:
    """Until the guest's room and the socket's are full."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while sock.send(bytes(65536)):
            guest.settle()


def test_who_does_not_read_holds_nobody_up(guest: Guest, program: Program) -> None:
    """Neither the host's program nor the guest's; and no more is held than the credit says."""
    slow, fast = guest.connect(), guest.connect(GUEST_PORT + 1)
    with program.accept() as unread, program.accept() as sock:
        while slow.credit > 0:
            slow.write_some(bytes(65536))
            guest.settle()
        stream = guest.device.streams.get(GUEST_PORT, PORT)
        assert stream
        assert len(stream.held) <= stream.window == WINDOW
        fill(guest, unread)
        assert len(slow.data) == slow.window
        for _ in range(50):
            data = os.urandom(5000)
            fast.write(data)
            sock.sendall(data)
            assert fast.read(5000) == data
            assert sock.recv(5000, socket.MSG_WAITALL) == data
        sent = slow.sent
        got = 0
        unread.settimeout(5)
        while got < sent:
            got += len(unread.recv(1 << 20))
        guest.until(lambda: slow.credit > 0)
