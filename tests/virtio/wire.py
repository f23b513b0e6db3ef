"""The other end of a NIC whose port is a stream: what passt is to it."""

from __future__ import annotations

import fcntl
import socket
import termios
from contextlib import ExitStack

from hostel.spec import Limits
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, LENGTH, StreamPort
from hostel.virtio.net_python import UNLIMITED, PythonPlane
from virtio.netns import GUEST_MAC
from virtio.rig import Driver, Rig

RX, TX, CONTROL = 0, 1, 2
PLAIN = bytes(HEADER)


class Wire:
    """Frames, each with its length before it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(len(one).to_bytes(LENGTH, "big") + one for one in frames))

    def receive(self) -> bytes:
        return self._read(int.from_bytes(self._read(LENGTH), "big"))

    def readable(self) -> int:
        """Bytes that have come and were not read."""
        count = fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4))
        return int.from_bytes(count, "little")

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "the port hung up"
            data += part
        return data


class StreamNics:
    """Makes NICs with a wire at their first pair of queues; ``close`` unplugs them all."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._open = ExitStack()
        self.close = self._open.close

    def __call__(
        self, transport: str = "pci", *, pairs: int = 1, mtu: int = 0, limits: Limits = UNLIMITED
    ) -> tuple[Driver, Wire]:
        ports, wires = [], []
        for _ in range(pairs):
            ours, theirs = socket.socketpair()
            ports.append(StreamPort(ours))
            wires.append(Wire(self._open.enter_context(theirs)))
        plane = PythonPlane(ports, limits)
        device = Net(self.rig.loop, plane, mac=GUEST_MAC, mtu=mtu, pairs=pairs)
        return self.rig.seat(transport, device), wires[0]


def offer(driver: Driver, count: int, size: int = 2048) -> None:
    for _ in range(count):
        driver.queues[RX].add([], [size])
    driver.kick(RX)


def send(driver: Driver, *frames: bytes, header: bytes = PLAIN) -> None:
    for one in frames:
        driver.queues[TX].add([header + one])
    driver.kick(TX)


def received(driver: Driver) -> bytes:
    """The next frame, without its header."""
    return driver.wait(RX)[0].data[HEADER:]


def command(
    driver: Driver, group: int, number: int, data: bytes = b"", queue: int = CONTROL
) -> int:
    """The answer to a control command."""
    return driver.request(queue, [bytes((group, number)), *([data] if data else [])], [1]).data[0]
