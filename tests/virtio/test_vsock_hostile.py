"""A hostile driver of the socket device: it may lose its connections or its device, and nothing else.

Each case of the table is what the driver sends; while the device lives, a connection beside it must still
carry bytes both ways.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.virtio import vsock
from hostel.virtio.vsock import EVENT, RX, TX
from virtio.rig import Rig, eventually
from virtio.vsock_guest import (
    BOTH,
    CID,
    GUEST_PORT,
    HEADER,
    HOST,
    PORT,
    WINDOW,
    Connection,
    Guest,
    Packet,
    Program,
    client,
)

REQUEST, RESPONSE, RST = abi.VSOCK_OP_REQUEST, abi.VSOCK_OP_RESPONSE, abi.VSOCK_OP_RST
RW, SHUTDOWN = abi.VSOCK_OP_RW, abi.VSOCK_OP_SHUTDOWN
UPDATE, ASK = abi.VSOCK_OP_CREDIT_UPDATE, abi.VSOCK_OP_CREDIT_REQUEST


@pytest.fixture
def bystander(guest: Guest, program: Program) -> Iterator[tuple[Connection, socket.socket]]:
    connection = guest.connect(9000)
    with program.accept() as sock:
        yield connection, sock


@contextlib.contextmanager
def unharmed(bystander: tuple[Connection, socket.socket]) -> Iterator[None]:
    yield
    connection, sock = bystander
    connection.write(b"ping")
    assert sock.recv(4, socket.MSG_WAITALL) == b"ping"
    sock.sendall(b"pong")
    assert connection.read(4) == b"pong"
    assert not connection.guest.driver.needs_reset


STRAYS: dict[str, tuple[Packet, bool]] = {
    "data of no connection": (Packet(RW, data=b"x"), True),
    "the end of no connection": (Packet(SHUTDOWN, flags=BOTH), True),
    "credit of no connection": (Packet(ASK), True),
    "an answer to nobody": (Packet(RESPONSE), True),
    "an operation that is none": (Packet(0), True),
    "an operation that is not known": (Packet(0xFFFF), True),
    "a reset of no connection": (Packet(RST), False),
    "a type that is none": (Packet(REQUEST, type=0), True),
    "a type that was not offered": (Packet(REQUEST, type=2), True),
    "a type that is not known": (Packet(REQUEST, type=0xFFFF), True),
    "a reset of a type that is not known": (Packet(RST, type=9), False),
    "to another guest": (Packet(REQUEST, dst_cid=8), True),
    "to itself": (Packet(REQUEST, dst_cid=CID), True),
    "to everybody": (Packet(REQUEST, dst_cid=2**64 - 1), True),
    "from the host": (Packet(REQUEST, src_cid=HOST), False),
    "from another guest": (Packet(REQUEST, src_cid=8), False),
    "from everybody": (Packet(RW, src_cid=2**64 - 1, data=b"x"), False),
    "from another, into a connection": (Packet(RST, src_port=9000, src_cid=8), False),
}


@pytest.mark.parametrize("case", STRAYS)
def test_packets_of_no_connection(
    guest: Guest, bystander: tuple[Connection, socket.socket], case: str
) -> None:
    packet, answered = STRAYS[case]
    with unharmed(bystander):
        guest.send(packet)
        guest.settle()
    assert len(guest.device.streams) == 1
    assert [stray.op for stray in guest.strays] == [RST] * answered
    for stray in guest.strays:
        assert (stray.src_port, stray.dst_port) == (packet.dst_port, packet.src_port)
        assert (stray.src_cid, stray.type) == (packet.dst_cid, packet.type)


ENDINGS: dict[str, list[Packet]] = {
    "a second request": [Packet(REQUEST)],
    "an answer to a connection that is there": [Packet(RESPONSE)],
    "an operation that is none": [Packet(0)],
    "an operation that is not known": [Packet(8)],
    "data behind the end": [Packet(SHUTDOWN, flags=2), Packet(RW, data=b"x")],
    "all flags, and more": [Packet(SHUTDOWN, flags=0xFFFF_FFFF)],
    "more than the credit": [Packet(RW, data=bytes(65536))] * 12,
}


@pytest.mark.parametrize("case", ENDINGS)
def test_what_ends_a_connection(
    guest: Guest, program: Program, bystander: tuple[Connection, socket.socket], case: str
) -> None:
    connection = guest.connect()
    connection.lies = True
    with program.accept() as sock, unharmed(bystander):
        for packet in ENDINGS[case]:
            guest.send(packet)
        guest.until(lambda: RST in connection.seen)
        assert len(guest.device.streams) == 1
        assert guest.device.streams.held <= WINDOW
        while sock.recv(1 << 20):
            pass


HARMLESS: dict[str, Packet] = {
    "no flags": Packet(SHUTDOWN, flags=0),
    "flags that are none": Packet(SHUTDOWN, flags=0xFFFF_FFFC),
    "no bytes": Packet(RW),
    "data where none belongs": Packet(UPDATE, data=b"data"),
    "more bytes than it says": Packet(RW, data=b"", len=0),
    "a count that is far ahead": Packet(UPDATE, fwd_cnt=1 << 31),
    "a count that is just ahead": Packet(UPDATE, fwd_cnt=1),
    "a count that is behind": Packet(UPDATE, fwd_cnt=0xFFFF_FFFF),
    "all the room there is": Packet(UPDATE, buf_alloc=0xFFFF_FFFF),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_a_connection_survives(
    guest: Guest, program: Program, bystander: tuple[Connection, socket.socket], case: str
) -> None:
    connection = guest.connect()
    with program.accept() as sock, unharmed(bystander):
        guest.send(HARMLESS[case])
        guest.settle()
        sock.sendall(b"still here")
        assert connection.read(10) == b"still here"
        connection.write(b"and here")
        assert sock.recv(100) == b"and here"


def test_a_guest_without_room_is_asked_once(guest: Guest, program: Program) -> None:
    connection = guest.connect(window=0)
    with program.accept() as sock:
        sock.sendall(b"waiting")
        guest.until(lambda: ASK in connection.seen)
        guest.settle()
        assert connection.seen == [RESPONSE, ASK]
        assert not connection.data
        for window in (3, 0, 2, 7):
            connection.window = connection.consumed + window
            connection.send_packet(UPDATE)
            guest.settle()
            guest.settle()
        assert connection.data == b"waiting"


BROKEN: dict[str, tuple[list[bytes], list[int]]] = {
    "half a header": ([bytes(HEADER // 2)], []),
    "a header but for a byte": ([bytes(HEADER - 1)], []),
    "nothing to read": ([], [HEADER]),
    "a header to be written": ([bytes(4)], [4096]),
    "a longer packet than the chain": ([Packet(RW, data=b"abc", len=4).pack(), b"abc"], []),
    "a packet of 4 GiB": ([Packet(RW, len=0xFFFF_FFFF).pack(), b"abc"], []),
    "a length for what is to be written": ([Packet(RW, len=8).pack()], [8]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_chain_stops_the_device(guest: Guest, program: Program, case: str) -> None:
    guest.connect()
    readable, writable = BROKEN[case]
    with program.accept() as sock:
        guest.driver.queues[TX].completed()
        guest.driver.queues[TX].add(readable, writable)
        guest.driver.kick(TX)
        assert eventually(lambda: guest.driver.needs_reset)
        assert sock.recv(10) == b""
    guest.start()
    guest.connect()
    program.accept().close()


@pytest.mark.parametrize("size", [1, HEADER - 1, HEADER])
def test_a_receive_buffer_without_room(rig: Rig, tmp_path: Path, size: int) -> None:
    guest = Guest(rig, tmp_path, buffer=size - HEADER)
    program = Program(guest)
    guest.send(Packet(REQUEST))
    if size == HEADER:  # enough for an answer
        with program.accept() as sock:
            sock.sendall(b"but not for data")
            assert eventually(lambda: guest.driver.needs_reset)
    assert eventually(lambda: guest.driver.needs_reset)
    program.close()


def test_a_packet_in_many_pieces(guest: Guest, program: Program) -> None:
    """§2.7.4: the cuts mean nothing."""
    connection = guest.connect()
    with program.accept() as sock:
        raw = Packet(RW, data=b"in pieces").pack() + b"in pieces and what is behind it"
        guest.driver.queues[TX].completed()
        guest.driver.queues[TX].add([raw[at : at + 1] for at in range(len(raw))], indirect=True)
        guest.driver.kick(TX)
        assert sock.recv(100) == b"in pieces"
        connection.sent += 9
        connection.write(b".")
        assert sock.recv(100) == b"."


def test_receive_buffers_in_many_pieces(rig: Rig, tmp_path: Path) -> None:
    guest = Guest(rig, tmp_path, size=128)
    program = Program(guest)
    guest.driver.start(size=128, heap=1 << 20)
    queue = guest.driver.queues[RX]
    for cut in (1, 10, 43, 45, 60):
        queue.add([], [cut, *[7] * 9, 100], indirect=True)
    guest.driver.kick(RX)
    connection = Connection(guest, GUEST_PORT, PORT)
    connection.send_packet(REQUEST)
    data = os.urandom(300)
    with program.accept() as sock:
        sock.sendall(data)
        done = guest.driver.wait(RX, 4)
        assert b"".join(one.data[HEADER:] for one in done) == data
    program.close()


def test_receive_buffers_with_something_to_read(rig: Rig, tmp_path: Path) -> None:
    guest = Guest(rig, tmp_path, filled=False)
    program = Program(guest)
    for _ in range(8):
        guest.driver.queues[RX].add([bytes(1000)], [HEADER + 100], indirect=True)
    guest.driver.kick(RX)
    guest.send(Packet(REQUEST))
    data = os.urandom(350)
    with program.accept() as sock:
        sock.sendall(data)
        done = guest.driver.wait(RX, 5)
        assert b"".join(one.data[HEADER:] for one in done) == data
    program.close()


# --- Floods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packet", [Packet(REQUEST, dst_port=1), Packet(RW, data=b"x")])
def test_answers_that_nobody_takes(rig: Rig, tmp_path: Path, packet: Packet) -> None:
    """The device stops to listen; it does not pile them up. When there is room again it goes on."""
    guest = Guest(rig, tmp_path, filled=False)
    queue = guest.driver.queues[TX]
    sent = 0
    while sent < 3 * vsock.OUTBOX:
        queue.completed()
        with contextlib.suppress(IndexError):
            queue.add([packet.pack(), packet.data] if packet.data else [packet.pack()])
            sent += 1
            continue
        guest.driver.kick(TX)
        rig.loop.run_sync(lambda: None)
        if len(guest.device._outbox) >= vsock.OUTBOX:
            break
    for _ in range(10):
        guest.driver.kick(TX)
        rig.loop.run_sync(lambda: None)
    assert len(guest.device._outbox) == vsock.OUTBOX
    guest.fill()
    guest.until(lambda: guest.ops().get(RST, 0) == sent)


def test_connections_without_number(
    guest: Guest,
    program: Program,
    bystander: tuple[Connection, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hostel.virtio.vsock_table.MAX_STREAMS", 20)
    with contextlib.ExitStack() as stack, unharmed(bystander):
        seen = [guest.connect(GUEST_PORT + n).seen[0] for n in range(40)]
        assert seen == [RESPONSE] * 19 + [RST] * 21
        socks = [stack.enter_context(program.accept()) for _ in range(19)]
        with client(guest, 22) as refused:
            assert refused.recv(10) == b""
        socks[0].close()
        guest.until(lambda: guest.connections[GUEST_PORT, PORT].ends == BOTH)
        guest.connections[GUEST_PORT, PORT].shutdown(BOTH)
        guest.until(lambda: guest.connections[GUEST_PORT, PORT].seen[-1] == RST)
        assert guest.connect(GUEST_PORT + 99).seen == [RESPONSE]


def test_a_program_that_does_not_accept(
    guest: Guest, program: Program, bystander: tuple[Connection, socket.socket]
) -> None:
    """Its queue fills up, and then the guest is refused: nothing waits for it."""
    program.listener.listen(3)
    with unharmed(bystander):
        seen = [guest.connect(GUEST_PORT + n).seen[0] for n in range(8)]
        assert seen == [RESPONSE] * 4 + [RST] * 4


def test_no_descriptor_is_left(guest: Guest, program: Program) -> None:
    """Connections are refused, both ways, until there are some again."""
    with many_open():
        assert guest.connect().seen == [RST]
    guest.listening.add(22)
    with client(guest, 22):
        guest.until(lambda: (22, 1 << 30) in guest.connections)


@contextlib.contextmanager
def many_open() -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_small_packets_cost_no_more_than_their_bytes(guest: Guest, program: Program) -> None:
    connection = guest.connect()
    with program.accept():
        while connection.credit > 200:
            connection.write_some(bytes(connection.credit - 200))
            guest.settle()
        for _ in range(100):
            connection.write(b"x")
        guest.settle()
        assert guest.device.streams.held <= WINDOW


def test_an_event_that_does_not_fit(guest: Guest) -> None:
    state = guest.driver.transport.save()
    guest.driver.transport.load(state)
    guest.driver.queues[EVENT].add([b"read only"])
    guest.driver.kick(EVENT)
    assert guest.driver.wait(EVENT)[0].written == 0
