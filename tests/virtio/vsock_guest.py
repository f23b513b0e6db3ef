"""A guest's socket driver on the mock: it answers for its queues, counts credits, and can lie about both."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from hostel.abi import virtio as abi
from hostel.virtio.vsock import RX, TX, Vsock
from virtio.rig import PATIENCE, Driver, Rig

CID = 7
HOST = abi.VSOCK_CID_HOST
HEADER = abi.VSOCK_HDR.size
PORT = 5000
"""Of the host, in most tests; the guest's ports are GUEST_PORT and up."""
GUEST_PORT = 1024
WINDOW = 256 << 10
BOTH = abi.VSOCK_SHUTDOWN_RCV | abi.VSOCK_SHUTDOWN_SEND


class Packet(msgspec.Struct, frozen=True):
    op: int
    src_port: int = GUEST_PORT
    dst_port: int = PORT
    data: bytes = b""
    flags: int = 0
    buf_alloc: int = WINDOW
    fwd_cnt: int = 0
    src_cid: int = CID
    dst_cid: int = HOST
    type: int = abi.VSOCK_TYPE_STREAM
    len: int | None = None

    def pack(self) -> bytes:
        size = len(self.data) if self.len is None else self.len
        ports = (self.src_cid, self.dst_cid, self.src_port, self.dst_port)
        return abi.VSOCK_HDR.pack(
            *ports, size, self.type, self.op, self.flags, self.buf_alloc, self.fwd_cnt
        )


def unpack(raw: bytes) -> Packet:
    src_cid, dst_cid, src_port, dst_port, size, kind, op, flags, room, forwarded = (
        abi.VSOCK_HDR.unpack_from(raw)
    )
    data = raw[HEADER:]
    assert size == len(data)
    return Packet(
        op, src_port, dst_port, data, flags, room, forwarded, src_cid, dst_cid, kind, size
    )


class Connection:
    """The guest's end: what came, and how much more may be sent."""

    def __init__(self, guest: Guest, guest_port: int, host_port: int) -> None:
        self.guest = guest
        self.guest_port, self.host_port = guest_port, host_port
        self.window = WINDOW
        self.data = bytearray()
        self.received = 0
        self.consumed = 0
        self.sent = 0
        self.room = 0
        self.forwarded = 0
        self.told = 0
        self.parts: list[int] = []
        """The sizes that ``write_some`` sent."""
        self.seen: list[int] = []
        """Operations, in order, without the data's."""
        self.ends = 0
        self.lies = False
        """What is sent is not counted."""

    def send_packet(self, op: int, data: bytes = b"", flags: int = 0) -> None:
        self.told = self.consumed
        self.guest.send(
            Packet(
                op,
                self.guest_port,
                self.host_port,
                data,
                flags,
                self.window,
                self.consumed & 0xFFFF_FFFF,
            )
        )

    @property
    def credit(self) -> int:
        return self.room - ((self.sent - self.forwarded) & 0xFFFF_FFFF)

    def write(self, data: bytes) -> None:
        while data:
            self.guest.until(lambda: self.credit > 0)
            data = data[self.write_some(data) :]

    def write_some(self, data: bytes) -> int:
        """As the credit allows now; how many bytes that were."""
        done = 0
        while done < len(data) and self.credit > 0:
            part = data[done : done + min(self.credit, 65536)]
            self.send_packet(abi.VSOCK_OP_RW, part)
            self.sent += len(part)
            done += len(part)
        self.parts.append(done)
        return done

    def shutdown(self, flags: int) -> None:
        self.send_packet(abi.VSOCK_OP_SHUTDOWN, flags=flags)

    def take(self) -> bytes:
        """What came; it leaves the guest's room."""
        data = bytes(self.data)
        self.data.clear()
        self.consumed += len(data)
        if self.consumed - self.told >= self.window // 2:
            self.send_packet(abi.VSOCK_OP_CREDIT_UPDATE)
        return data

    def read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            self.guest.until(lambda: bool(self.data))
            got += self.take()
        return got

    def hear(self, packet: Packet) -> None:
        self.room, self.forwarded = packet.buf_alloc, packet.fwd_cnt
        assert self.lies or (self.sent - self.forwarded) & 0xFFFF_FFFF <= self.room
        if packet.op != abi.VSOCK_OP_RW:
            self.seen.append(packet.op)
        if packet.op == abi.VSOCK_OP_SHUTDOWN:
            self.ends |= packet.flags
        self.data += packet.data
        self.received += len(packet.data)
        assert self.received - self.consumed <= self.window, "the device overran our room"


class Guest:
    """Keeps the rx queue filled; ``pump`` looks at what came."""

    def __init__(
        self,
        rig: Rig,
        directory: Path,
        *,
        transport: str = "pci",
        buffer: int = 4096,
        features: int = 0,
        size: int = 128,
        filled: bool = True,
    ) -> None:
        self.rig = rig
        self.path = directory / "vsock.sock"
        self.device = Vsock(rig.loop, self.path, cid=CID)
        self.driver: Driver = rig.seat(transport, self.device)
        self.buffer = buffer
        self.features = features
        self.size = size
        self.filled = filled
        self.start()

    def start(self) -> None:
        self.connections: dict[tuple[int, int], Connection] = {}
        self.strays: list[Packet] = []
        """Packets that belong to no connection of ours."""
        self.listening: set[int] = set()
        self.silent = False
        """Requests are not answered."""
        self.refused = 0
        self.driver.start(self.features, size=self.size, heap=(2 << 20) - (16 << 10))
        if self.filled:
            self.fill()

    def fill(self) -> None:
        """Room in the rx queue."""
        for _ in range(self.size):
            self.driver.queues[RX].add([], [HEADER + self.buffer], indirect=True)
        self.kick(RX)

    def kick(self, index: int) -> None:
        """As a driver does: only if the device wants it (§2.7.10)."""
        if self.driver.queues[index].wants_kick:
            self.driver.kick(index)

    # -- packets ------------------------------------------------------------------------------

    def send(self, packet: Packet) -> None:
        queue = self.driver.queues[TX]
        self.driver.queues[TX].completed()
        while len(queue._free) < 2 and not self.driver.needs_reset:
            self.pump()  # a device whose answers find no room takes nothing more
            self.wait(TX, 0.01)
            queue.completed()
        if self.driver.needs_reset:
            return
        queue.add([packet.pack(), packet.data] if packet.data else [packet.pack()])
        self.kick(TX)

    def wait(self, index: int, patience: float = PATIENCE) -> bool:
        call = self.driver.call_fd(index)
        if not select.select([call], [], [], patience)[0]:
            return False
        os.eventfd_read(call)
        return True

    def pump(self) -> bool:
        """Whether anything came."""
        queue = self.driver.queues[RX]
        done = queue.completed()
        for one in done:
            queue.add([], [HEADER + self.buffer], indirect=True)
            self.hear(unpack(one.data))
        if done:
            self.kick(RX)
        return bool(done)

    def hear(self, packet: Packet) -> None:
        assert (packet.dst_cid, packet.buf_alloc >= 0) == (CID, True)
        key = (packet.dst_port, packet.src_port)
        connection = self.connections.get(key)
        if packet.op == abi.VSOCK_OP_REQUEST and packet.dst_port in self.listening:
            connection = self.connections[key] = Connection(self, *key)
            connection.hear(packet)
            connection.send_packet(abi.VSOCK_OP_RESPONSE)
        elif packet.op == abi.VSOCK_OP_REQUEST and not self.silent:
            self.refused += 1
            self.send(Packet(abi.VSOCK_OP_RST, *key))
        elif connection is None:
            self.strays.append(packet)
        else:
            connection.hear(packet)

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            if not self.pump() and not condition():
                assert self.wait(RX), f"nothing came; {self.device.fault}"

    def settle(self) -> None:
        """Until the device has seen all that was sent, and all its answers have come."""
        for _ in range(3):
            self.rig.loop.run_sync(lambda: None)
            self.pump()

    # -- connections --------------------------------------------------------------------------

    def connect(
        self, guest_port: int = GUEST_PORT, host_port: int = PORT, *, window: int = WINDOW
    ) -> Connection:
        connection = Connection(self, guest_port, host_port)
        connection.window = window
        self.connections[guest_port, host_port] = connection
        connection.send_packet(abi.VSOCK_OP_REQUEST)
        self.until(lambda: connection.seen)
        return connection

    def accepted(self) -> Connection:
        """The last one that the host made."""
        return list(self.connections.values())[-1]

    def ops(self) -> dict[int, int]:
        counts: dict[int, int] = defaultdict(int)
        for packet in self.strays:
            counts[packet.op] += 1
        return dict(counts)


class Program:
    """A program of the host: a listener at a port, or a client of the guest's."""

    def __init__(self, guest: Guest, port: int = PORT) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{guest.path}_{port}")
        self.listener.listen(4096)
        self.listener.settimeout(PATIENCE)

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(PATIENCE)
        return sock

    def close(self) -> None:
        self.listener.close()


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Room for some thousand descriptors in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 16384), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def client(guest: Guest, port: int) -> socket.socket:
    """It has asked for the guest's port; the answer is still to come."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(guest.path))
    sock.sendall(b"CONNECT %d\n" % port)
    return sock
