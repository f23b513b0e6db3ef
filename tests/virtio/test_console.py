"""The console device with real sockets behind its ports."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from hostel.abi import virtio as abi
from hostel.virtio.console import OUTBOX, Console, Port
from virtio.rig import EVENT_INDEX, Driver, Rig, eventually, wait_fd

MULTIPORT = 1 << abi.CONSOLE_F_MULTIPORT
HVC_IN, HVC_OUT, CONTROL_IN, CONTROL_OUT, AGENT_IN, AGENT_OUT = range(6)


class Guest:
    """A driver of the console, and the host's ends of its ports."""

    def __init__(self, rig: Rig, transport: str = "pci", *, features: int = 0) -> None:
        self.hvc, hvc = socket.socketpair()
        self.agent, agent = socket.socketpair()
        for sock in (self.hvc, self.agent):
            sock.settimeout(10)
        self.ports = [Port("hvc0", hvc.detach(), console=True), Port("agent", agent.detach())]
        self.console = Console(rig.loop, self.ports)
        self.driver: Driver = rig.seat(transport, self.console)
        self.driver.start(MULTIPORT | features, size=64, heap=1 << 20)
        self.control: list[tuple[int, int, int, bytes]] = []

    def close(self) -> None:
        self.hvc.close()
        self.agent.close()

    def offer(self, index: int, count: int = 16, size: int = 4096) -> None:
        for _ in range(count):
            self.driver.queues[index].add([], [size])
        self.driver.kick(index)

    def tell(self, port: int, event: int, value: int = 1) -> None:
        self.driver.request(CONTROL_OUT, [abi.CONSOLE_CONTROL.pack(port, event, value)])

    def hear(self) -> list[tuple[int, int, int, bytes]]:
        """New control messages: port, event, value, the rest."""
        self.driver.rig.loop.run_sync(lambda: None)
        return [
            (*abi.CONSOLE_CONTROL.unpack_from(done.data), done.data[8:])
            for done in self.driver.queues[CONTROL_IN].completed()
        ]

    def open_agent(self) -> None:
        self.tell(1, abi.CONSOLE_PORT_OPEN)

    def send(self, index: int, data: bytes) -> None:
        """As Linux does: buffers of at most 32 KiB; waits for the device to take each."""
        for at in range(0, len(data), 1 << 15):
            self.driver.request(index, [data[at : at + (1 << 15)]])


@pytest.fixture(params=["pci", "mmio"])
def guest(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Guest]:
    guest = Guest(rig, request.param)
    yield guest
    guest.close()


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def test_ports_are_introduced(guest: Guest) -> None:
    guest.offer(CONTROL_IN)
    guest.tell(0, abi.CONSOLE_DEVICE_READY)
    assert guest.hear() == [(n, abi.CONSOLE_PORT_ADD, 1, b"") for n in (0, 1)]
    guest.tell(0, abi.CONSOLE_PORT_READY)
    assert guest.hear() == [
        (0, abi.CONSOLE_CONSOLE_PORT, 1, b""),
        (0, abi.CONSOLE_RESIZE, 1, b"\x50\0\x19\0"),
        (0, abi.CONSOLE_PORT_NAME, 1, b"hvc0"),
        (0, abi.CONSOLE_PORT_OPEN, 1, b""),
    ]
    guest.tell(1, abi.CONSOLE_PORT_READY)
    assert guest.hear() == [
        (1, abi.CONSOLE_PORT_NAME, 1, b"agent"),
        (1, abi.CONSOLE_PORT_OPEN, 1, b""),
    ]


def test_guest_to_host(guest: Guest) -> None:
    guest.send(HVC_OUT, b"boot")
    assert receive(guest.hvc, 4) == b"boot"
    data = os.urandom(100_000)
    sender = threading.Thread(target=guest.send, args=(AGENT_OUT, data))
    sender.start()
    assert receive(guest.agent, len(data)) == data
    sender.join()


def test_host_to_guest_waits_until_the_port_is_open(guest: Guest) -> None:
    guest.offer(AGENT_IN)
    guest.agent.sendall(b"hello")
    guest.driver.rig.loop.run_sync(lambda: None)
    assert not guest.driver.queues[AGENT_IN].completed(), "a guest drops what it has not opened for"
    guest.open_agent()
    assert guest.driver.wait(AGENT_IN)[0].data == b"hello"
    guest.tell(1, abi.CONSOLE_PORT_OPEN, 0)
    guest.agent.sendall(b"again")
    guest.driver.rig.loop.run_sync(lambda: None)
    assert not guest.driver.queues[AGENT_IN].completed()


def test_console_input_needs_no_open(guest: Guest) -> None:
    guest.hvc.sendall(b"ls\n")
    guest.offer(HVC_IN, 1)
    assert guest.driver.wait(HVC_IN)[0].data == b"ls\n"


def test_input_fills_buffers_in_order(guest: Guest) -> None:
    guest.open_agent()
    data = os.urandom(10_000)
    guest.agent.sendall(data)
    guest.offer(AGENT_IN, 5)
    done = guest.driver.wait(AGENT_IN, 3)
    assert [one.written for one in done] == [4096, 4096, 10_000 - 8192]
    assert b"".join(one.data for one in done) == data
    guest.agent.sendall(b"more")
    assert guest.driver.wait(AGENT_IN)[0].data == b"more", "buffers left over are used next"


def test_a_full_socket_stops_the_guest_and_nothing_is_lost(guest: Guest) -> None:
    queue = guest.driver.queues[AGENT_OUT]
    data = os.urandom(64 << 14)
    for at in range(0, len(data), 1 << 14):
        queue.add([data[at : at + (1 << 14)]])
    guest.driver.kick(AGENT_OUT)
    assert eventually(lambda: guest.ports[1].pending is not None)
    taken = len(queue.completed())
    assert taken < 64
    cpu = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - cpu < 0.15, "waiting costs nothing"
    assert not queue.completed()
    assert receive(guest.agent, len(data)) == data
    assert len(guest.driver.wait(AGENT_OUT, 64 - taken)) == 64 - taken


def test_the_host_hangs_up(guest: Guest) -> None:
    guest.offer(CONTROL_IN)
    guest.open_agent()
    guest.offer(AGENT_IN)
    guest.agent.close()
    assert eventually(lambda: not guest.ports[1].connected)
    assert guest.hear() == [(1, abi.CONSOLE_PORT_OPEN, 0, b"")]
    guest.send(AGENT_OUT, b"into the void")
    assert not guest.driver.needs_reset
    guest.send(HVC_OUT, b"alive")
    assert receive(guest.hvc, 5) == b"alive"


def test_the_host_hangs_up_under_a_full_socket(guest: Guest) -> None:
    for _ in range(64):
        guest.driver.queues[AGENT_OUT].add([bytes(1 << 14)])
    guest.driver.kick(AGENT_OUT)
    assert eventually(lambda: guest.ports[1].pending is not None)
    guest.agent.close()
    guest.driver.wait(AGENT_OUT, 1)
    assert eventually(lambda: guest.ports[1].pending is None)


def test_last_words_of_the_host_arrive_before_the_end(guest: Guest) -> None:
    guest.offer(CONTROL_IN)
    guest.open_agent()
    guest.agent.sendall(b"bye")
    guest.agent.close()
    assert guest.ports[1].connected, "the guest has not read yet"
    guest.offer(AGENT_IN, 2)
    assert guest.driver.wait(AGENT_IN)[0].data == b"bye"
    assert eventually(lambda: not guest.ports[1].connected)


def test_resize_reaches_a_multiport_guest(guest: Guest) -> None:
    guest.offer(CONTROL_IN)
    guest.console.resize(132, 43)
    assert wait_fd(guest.driver.config_fd())
    assert guest.driver.config(0, 4) == 132 | 43 << 16
    assert guest.hear() == [(0, abi.CONSOLE_RESIZE, 1, b"\x84\0\x2b\0")]


def test_control_messages_wait_for_room_and_are_bounded(guest: Guest) -> None:
    """A guest that asks and never listens: after some answers its questions are left where they are."""
    asked = answered = 0
    for _ in range(4):
        for _ in range(30):
            guest.driver.queues[CONTROL_OUT].add([abi.CONSOLE_CONTROL.pack(0, 0, 1)])
        guest.driver.kick(CONTROL_OUT)
        guest.driver.rig.loop.run_sync(lambda: None)
        taken = len(guest.driver.queues[CONTROL_OUT].completed())
        asked += taken
        if taken < 30:
            break
    assert asked == OUTBOX // 2, "two answers each"
    for _ in range(5):
        guest.driver.kick(CONTROL_OUT)
        guest.console.loop.run_sync(lambda: None)
    assert len(guest.console._outbox) == OUTBOX, "however often it is kicked"
    for _ in range(12):
        guest.offer(CONTROL_IN, 10, 64)
        answered += len(guest.hear())
    assert answered == 2 * 60
    assert not guest.console._outbox


def test_nonsense_on_the_control_queue(guest: Guest) -> None:
    guest.offer(CONTROL_IN)
    for message in (b"x", b"", bytes(8)[:7], abi.CONSOLE_CONTROL.pack(99, 3, 1), b"\xff" * 300):
        guest.driver.request(CONTROL_OUT, [message] if message else [], [] if message else [8])
    assert guest.hear() == []
    assert not guest.driver.needs_reset


def test_a_transmit_chain_with_no_bytes_is_given_back(guest: Guest) -> None:
    assert guest.driver.request(HVC_OUT, [], [16]).written == 0
    assert guest.driver.request(HVC_OUT, [b"ok"]).written == 0
    assert receive(guest.hvc, 2) == b"ok"


def test_a_receive_chain_without_room_is_given_back(guest: Guest) -> None:
    guest.driver.queues[HVC_IN].add([b"no room"])
    guest.offer(HVC_IN, 1)
    guest.hvc.sendall(b"x")
    done = guest.driver.wait(HVC_IN, 2)
    assert sorted(one.data for one in done) == [b"", b"x"]


def test_without_multiport_there_is_a_console(rig: Rig) -> None:
    ours, theirs = socket.socketpair()
    driver = rig.on_pci(Console(rig.loop, [Port("hvc0", theirs.detach(), console=True)]))
    driver.start(indexes=(0, 1))
    driver.request(1, [b"old style"])
    assert receive(ours, 9) == b"old style"
    ours.sendall(b"in")
    driver.queues[0].add([], [16])
    driver.kick(0)
    assert driver.wait(0)[0].data == b"in"
    ours.close()


def test_a_broken_ring_stops_the_console_until_reset(guest: Guest) -> None:
    guest.driver.queues[AGENT_OUT].offer(9999)
    guest.driver.kick(AGENT_OUT)
    assert wait_fd(guest.driver.config_fd())
    assert guest.driver.needs_reset
    guest.agent.sendall(b"x")
    guest.driver.start(MULTIPORT, size=64)
    guest.open_agent()
    guest.offer(AGENT_IN)
    assert guest.driver.wait(AGENT_IN)[0].data == b"x"


def test_state_with_a_half_written_chain(rig: Rig) -> None:
    guest = Guest(rig)
    data = os.urandom(64 << 14)
    for at in range(0, len(data), 1 << 14):
        guest.driver.queues[AGENT_OUT].add([data[at : at + (1 << 14)]])
    guest.driver.kick(AGENT_OUT)
    assert eventually(lambda: guest.ports[1].pending is not None)
    guest.driver.rig.loop.run_sync(lambda: None)
    state = json.loads(json.dumps(guest.driver.seat.save()))
    guest.driver.set_status(0)
    got = receive(guest.agent, guest.ports[1].bytes_out)
    guest.driver.transport.load(state["transport"])
    got += receive(guest.agent, len(data) - len(got))
    assert got == data
    guest.close()


@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_a_stream_both_ways_arrives_whole(rig: Rig, features: int) -> None:
    """Megabytes through the agent's port, with the other side working at the same time."""
    guest = Guest(rig, features=features)
    guest.open_agent()
    size = 8 << 20
    out = os.urandom(size)
    host_got, guest_got = hashlib.sha256(), hashlib.sha256()

    def host() -> None:
        left = size
        while left:
            part = guest.agent.recv(1 << 16)
            host_got.update(part)
            guest.agent.sendall(part)
            left -= len(part)

    thread = threading.Thread(target=host)
    thread.start()
    receive_queue, transmit_queue = guest.driver.queues[AGENT_IN], guest.driver.queues[AGENT_OUT]
    for _ in range(60):
        receive_queue.add([], [4096])
    sent = got = 0
    deadline = time.monotonic() + 60
    while got < size:
        assert time.monotonic() < deadline
        while sent < size and len(transmit_queue._chains) < 16:
            transmit_queue.add([out[sent : sent + (1 << 15)]])
            sent += 1 << 15
        if transmit_queue.wants_kick:
            guest.driver.kick(AGENT_OUT)
        transmit_queue.completed()
        for done in receive_queue.completed():
            guest_got.update(done.data)
            got += done.written
            receive_queue.add([], [4096])
        if receive_queue.wants_kick:
            guest.driver.kick(AGENT_IN)
    thread.join()
    whole = hashlib.sha256(out).digest()
    assert host_got.digest() == whole
    assert guest_got.digest() == whole
    guest.close()
