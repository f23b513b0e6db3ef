"""The Python plane of sockets under a driver of our own: what one core carries, without a guest.

::

    driver (a process) ── rings, eventfds ──► the device (this process) ── Unix socket ──► program (a process)

The driver does as Linux does: packets of up to 64 KiB to the host, receive buffers of 4 KiB, 256 KiB of
room. The peer is what Python can do at best between the same two programs: a loop of ``recv_into`` and
``send`` from one Unix socket to another, 64 KiB at a time.

Keys of ``rows``: ``{hostel,loop}_{to_host,to_guest}_mb_per_s``, and the same with ``_per_core_``: divided by
the CPU seconds that this process used. Keys of ``ratios``: ``{to_host,to_guest}_vs_loop``.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from _common import ratio, report, rows

from hostel.abi import virtio as abi
from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.vsock import EVENT, RX, TX, Vsock
from hostel.vmm.loop import EventLoop

MIB = 1 << 20
TOTAL = int(os.environ.get("BENCH_MIB", "256")) * MIB
RUNS = int(os.environ.get("BENCH_RUNS", "3"))
RING = 128
CID, PORT, GUEST_PORT = 3, 5000, 1024
HEADER = abi.VSOCK_HDR.size
PACKET, BUFFER, ROOM = 65536, 4096, 256 << 10
SLOTS = 16
"""Packets under way to the host."""
BASES = {RX: 0x10000, TX: 0x20000, EVENT: 0x30000}
TX_HEADERS, TX_DATA, RX_DATA = 0x40000, 0x100000, 0x400000
HEADERS = struct.Struct("<QQIIIHHIII")
CONTEXT = get_context("fork")


class Ring:
    """The driver's end of one queue, at fixed places."""

    def __init__(self, memory: GuestMemory, index: int) -> None:
        base = BASES[index]
        self.wiring = QueueWiring(
            index,
            RING,
            base,
            base + 0x1000,
            base + 0x2000,
            *(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)),
        )
        self.memory = memory
        self.avail = memory.view(base + 0x1000, 6 + 2 * RING).cast("H")
        self.used = memory.view(base + 0x2000, 6 + 8 * RING)
        self.used_index = self.used[:4].cast("H")
        self.offered = self.done = 0

    def describe(self, at: int, address: int, size: int, flags: int, following: int = 0) -> None:
        entry = abi.DESC.pack(address, size, flags, following)
        self.memory.write(self.wiring.desc + 16 * at, entry)

    def offer(self, head: int) -> None:
        self.avail[2 + self.offered % RING] = head
        self.offered += 1

    def kick(self) -> None:
        self.avail[1] = self.offered & 0xFFFF
        if not self.used_index[0] & abi.USED_F_NO_NOTIFY:
            os.eventfd_write(self.wiring.kick, 1)

    def take(self) -> list[int]:
        """Heads of what the device has used."""
        heads = []
        while self.done & 0xFFFF != self.used_index[1]:
            heads.append(struct.unpack_from("<I", self.used, 4 + 8 * (self.done % RING))[0])
            self.done += 1
        return heads

    def wait(self) -> None:
        if self.done & 0xFFFF == self.used_index[1]:
            select.select([self.wiring.call], [], [])
            os.eventfd_read(self.wiring.call)


class Driver:
    """One connection to the host, which is opened at once."""

    def __init__(self, memory: GuestMemory, rx: Ring, tx: Ring) -> None:
        self.memory, self.rx, self.tx = memory, rx, tx
        self.room = self.forwarded = self.sent = self.received = self.told = 0
        self.free = list(range(0, 2 * SLOTS, 2))
        for at in range(RING):
            rx.describe(at, RX_DATA + at * (HEADER + BUFFER), HEADER + BUFFER, abi.DESC_F_WRITE)
            rx.offer(at)
        rx.kick()
        self.packet(abi.VSOCK_OP_REQUEST, 0)
        while not self.room:
            rx.wait()
            self.hear()

    def packet(self, op: int, size: int) -> None:
        while not self.free:
            self.tx.wait()
            self.free = self.tx.take()
        head = self.free.pop()
        place = TX_HEADERS + head * 64
        fields = (CID, 2, GUEST_PORT, PORT, size, 1, op, 0, ROOM, self.received & 0xFFFF_FFFF)
        self.memory.write(place, HEADERS.pack(*fields))
        self.tx.describe(head, place, HEADER, abi.DESC_F_NEXT if size else 0, head + 1)
        if size:
            self.tx.describe(head + 1, TX_DATA + head * PACKET // 2, size, 0)
        self.tx.offer(head)
        self.tx.kick()
        self.sent += size
        self.told = self.received

    def hear(self) -> None:
        for head in self.rx.take():
            raw = self.memory.view(RX_DATA + head * (HEADER + BUFFER), HEADER)
            fields = HEADERS.unpack(raw)
            self.received += fields[4]
            self.room, self.forwarded = fields[8], fields[9]
            self.rx.offer(head)
        self.rx.kick()
        if self.received - self.told >= ROOM // 2:
            self.packet(abi.VSOCK_OP_CREDIT_UPDATE, 0)

    def to_host(self) -> None:
        while self.sent < TOTAL or (self.sent - self.forwarded) & 0xFFFF_FFFF >= ROOM // 2:
            credit = self.room - ((self.sent - self.forwarded) & 0xFFFF_FFFF)
            if credit and self.sent < TOTAL:
                self.packet(abi.VSOCK_OP_RW, min(credit, PACKET, TOTAL - self.sent))
            else:
                self.rx.wait()
                self.hear()

    def to_guest(self) -> None:
        while self.received < TOTAL:
            self.rx.wait()
            self.hear()


def drive(pipe: Connection, memory: GuestMemory, rx: Ring, tx: Ring, way: str) -> None:
    pipe.recv()
    driver = Driver(memory, rx, tx)
    pipe.send(0)
    getattr(driver, way)()
    pipe.send(0)


def program(pipe: Connection, listener: socket.socket, writes: bool) -> None:
    """The host's end."""
    sock, _ = listener.accept()
    pipe.recv()
    buffer, left = bytearray(1 << 18), TOTAL
    while left:
        part = memoryview(buffer)[: min(len(buffer), left)]
        left -= sock.send(part) if writes else sock.recv_into(part)
    pipe.send(0)
    pipe.recv()


def started(target: object, *arguments: object) -> tuple[BaseProcess, Connection]:
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=target, args=(theirs, *arguments))  # type: ignore[arg-type]
    child.start()
    return child, ours


def timed(*pipes: Connection) -> tuple[float, float]:
    """Start what waits at the pipes; MB by the clock, and by this process's CPU, when the last ends."""
    cpu, clock = time.process_time(), time.monotonic()
    for pipe in pipes:
        pipe.send(0)
    pipes[-1].recv()
    used, passed = time.process_time() - cpu, time.monotonic() - clock
    return TOTAL / 1e6 / passed, TOTAL / 1e6 / used


def hostel(way: str, folder: Path) -> tuple[float, float]:
    with GuestMemory(16 * MIB) as memory, listening(folder / f"vsock_{PORT}") as listener:
        rings = [Ring(memory, index) for index in (RX, TX, EVENT)]
        guest, guest_pipe = started(drive, memory, rings[RX], rings[TX], way)
        host, host_pipe = started(program, listener, way == "to_guest")
        loop = EventLoop()
        loop.start()
        device = Vsock(loop, folder / "vsock", cid=CID)
        device.activate(memory, 1 << abi.F_VERSION_1, [ring.wiring for ring in rings])
        guest_pipe.send(0)
        guest_pipe.recv()
        figures = timed(host_pipe) if way == "to_host" else timed(host_pipe, guest_pipe)
        host_pipe.send(0)
        device.close()
        for child in (guest, host):
            child.join()
        loop.stop()
        for ring in rings:
            os.close(ring.wiring.kick)
            os.close(ring.wiring.call)
    return figures


def plain_loop(way: str, folder: Path) -> tuple[float, float]:
    """The two programs are the same for both ways."""
    with listening(folder / "from") as one, listening(folder / "to") as other:
        children = [started(program, one, True), started(program, other, False)]
        ours, theirs = (socket.socket(socket.AF_UNIX) for _ in range(2))
        ours.connect(str(folder / "from"))
        theirs.connect(str(folder / "to"))
        buffer, left = bytearray(PACKET), TOTAL
        for _, pipe in children:
            pipe.send(0)
        cpu, clock = time.process_time(), time.monotonic()
        while left:
            size = ours.recv_into(buffer)
            theirs.sendall(memoryview(buffer)[:size])
            left -= size
        used, passed = time.process_time() - cpu, time.monotonic() - clock
        for child, pipe in children:
            pipe.send(0)
            child.join()
        ours.close()
        theirs.close()
    return TOTAL / 1e6 / passed, TOTAL / 1e6 / used


def listening(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def main() -> None:
    ways = ("to_host", "to_guest")
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS):
            for way in ways:
                for name, work in (("hostel", hostel), ("loop", plain_loop)):
                    clock, core = work(way, Path(folder))
                    samples.setdefault(f"{name}_{way}_mb_per_s", []).append(clock)
                    samples.setdefault(f"{name}_{way}_per_core_mb_per_s", []).append(core)
    ratios = {
        f"{way}_vs_loop": ratio(samples, f"hostel_{way}_mb_per_s", f"loop_{way}_mb_per_s")
        for way in ways
    }
    report("vsock_plane", rows(samples), ratios)


if __name__ == "__main__":
    main()
