"""The Python plane of a NIC without a guest: frames a second and Gbit/s that one core moves.

::

    small frames   64 bytes       send      the driver's ring ─► plane ─► tap (the host drops them)
    large ones     a 60 KB        receive   packet socket ─► tap ─► plane ─► the driver's ring
                   segment

The driver is no more than a ring that is offered again and again, so nearly all of the process's CPU time is
the plane's and the kernel's under it; the sender of received frames is another process. Rows are frames, or
Gbit, for each second of CPU time, as the host's other work may be anything. ``…_syscall_…``: the same frames
by a bare ``writev`` or ``readv`` in a loop, the most that any design in Python could reach; ``ratios``: how
much of it the plane reaches.

Needs /dev/net/tun and the right to make a network namespace.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from _common import ratio, report, rows

from hostel.abi import virtio
from hostel.abi import virtio_net as abi
from hostel.host.tap import open_tap
from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.net_control import guest_offloads
from hostel.virtio.net_port import HEADER, MAX_FRAME, TapPort
from hostel.virtio.net_python import PythonPlane

RUNS = int(os.environ.get("BENCH_RUNS", "5"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "0.5"))
TAP = "bench0"
SIZE = 256
BUFFER = 4096
ROOM = 1 << 16
GUEST, HOST = b"\x52\x54\0\0\0\1", b"\x52\x54\0\0\0\2"
CLONE_NEWNET = 0x4000_0000
SOL_PACKET, PACKET_VNET_HDR = 263, 15
FEATURES = 1 << virtio.F_VERSION_1 | 1 << virtio.RING_F_EVENT_IDX | 1 << abi.F_MRG_RXBUF


def ipv4_tcp(payload: int) -> bytes:
    """The headers of a segment that nobody waits for."""
    ip = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 0, 0, 64, 6, 0, bytes(4), b"\x0a\0\0\2"
    )
    total = sum(struct.unpack(">10H", ip))
    checksum = ~(total + (total >> 16)) & 0xFFFF
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 1000, 0, 0)
    return b"".join([ip[:10], checksum.to_bytes(2, "big"), ip[12:], tcp])


def small(to: bytes, sender: bytes) -> bytes:
    return bytes(HEADER) + to + sender + b"\x88\xb5" + bytes(50)


def large(to: bytes, sender: bytes) -> bytes:
    """One TCP segment of 60 KB, to be cut into packets of 1448 bytes by whoever needs them."""
    payload = 60_000
    flags = abi.HDR_F_NEEDS_CSUM
    header = abi.HDR.pack(flags, abi.HDR_GSO_TCPV4, 14 + 40, 1448, 14 + 20, 16, 0)
    return b"".join([header, to, sender, b"\x08\0", ipv4_tcp(payload), bytes(payload)])


class Ring:
    """A queue whose chains are offered again as soon as they come back; no driver is cheaper."""

    def __init__(self, memory: GuestMemory, index: int, frame: bytes = b"") -> None:
        base = (1 + index) << 20
        self.memory = memory
        self.wiring = QueueWiring(
            *(index, SIZE, base, base + 0x4000, base + 0x8000),
            *(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.eventfd(0, os.EFD_CLOEXEC)),
        )
        self.offered = 0
        for at in range(SIZE):
            self._buffer(at, (8 << 20) + at * ROOM, frame)
            memory.write_u16(self.wiring.avail + 4 + 2 * at, at)

    def _buffer(self, at: int, address: int, frame: bytes) -> None:
        self.memory.write(address, frame)
        flags, length = (0, len(frame)) if frame else (virtio.DESC_F_WRITE, BUFFER)
        entry = virtio.DESC.pack(address, length, flags, 0)
        self.memory.write(self.wiring.desc + virtio.DESC.size * at, entry)

    def offer(self, count: int) -> None:
        """So many more, to be told of when half of the ring is used; kick if the device asks for it."""
        before, self.offered = self.offered, self.offered + count
        memory, wiring = self.memory, self.wiring
        memory.write_u16(wiring.avail + 4 + 2 * SIZE, (self.offered - SIZE // 2 - 1) & 0xFFFF)
        memory.write_u16(wiring.avail + 2, self.offered & 0xFFFF)
        event = memory.read_u16(wiring.used + 4 + 8 * SIZE)
        if (self.offered - event - 1) & 0xFFFF < self.offered - before:
            os.eventfd_write(wiring.kick, 1)

    def run(self, seconds: float) -> None:
        """A driver's life: offer, wait until half of it came back, offer that again."""
        self.offer(SIZE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while (self.offered - self.memory.read_u16(self.wiring.used + 2)) & 0xFFFF > SIZE // 2:
                os.eventfd_read(self.wiring.call)
            self.offer(SIZE // 2)

    def close(self) -> None:
        os.close(self.wiring.kick)
        os.close(self.wiring.call)


@contextmanager
def sending(frame: bytes) -> Iterator[None]:
    """Another process that sends this frame into the tap as fast as it can."""
    child = os.fork()
    if child == 0:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind((TAP, 0))
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        data = frame[: HEADER - 2] + frame[HEADER:]
        while os.getppid() != 1:
            with suppress(OSError):  # the tap's queue is full
                sock.send(data)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Result(NamedTuple):
    frames: float
    bits: float
    """Each for a second of this process's CPU time."""


def per_cpu(work: Callable[[], tuple[int, int]]) -> Result:
    """``work`` gives frames and bytes."""
    start = time.process_time()
    frames, size = work()
    spent = time.process_time() - start
    return Result(frames / spent, 8 * size / spent)


def plane_sends(fd: int, frame: bytes) -> Result:
    return per_cpu(lambda: through_plane(fd, 1, frame))


def plane_receives(fd: int, frame: bytes) -> Result:
    with sending(frame):
        return per_cpu(lambda: through_plane(fd, 0))


def through_plane(fd: int, index: int, frame: bytes = b"") -> tuple[int, int]:
    with GuestMemory(64 << 20) as memory:
        ring = Ring(memory, index, frame)
        plane = PythonPlane([TapPort(os.dup(fd))])
        plane.set_offloads(guest_offloads(plane.features))
        plane.start(memory, FEATURES, [ring.wiring], [(0, 0)], 1)
        ring.run(SECONDS)
        count = plane.statistics()["pairs_served"]["0"]["transmit" if index else "receive"]
        plane.close()
        ring.close()
        return count["frames"], count["bytes"]


def bare_send(fd: int, frame: bytes) -> Result:
    buffers = [memoryview(frame)]

    def work() -> tuple[int, int]:
        count, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            for _ in range(64):
                os.writev(fd, buffers)
            count += 64
        return count, count * (len(frame) - HEADER)

    return per_cpu(work)


def bare_receive(fd: int, frame: bytes) -> Result:
    buffers = [memoryview(bytearray(MAX_FRAME))]

    def work() -> tuple[int, int]:
        count, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            for _ in range(64):
                while True:
                    with suppress(BlockingIOError):
                        os.readv(fd, buffers)
                        break
                    select.select([fd], [], [])
            count += 64
        return count, count * (len(frame) - HEADER)

    with sending(frame):
        return per_cpu(work)


def make_namespace() -> int:
    """A tap in a network namespace of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise SystemExit("net_plane: no right to make a network namespace: run it as root")
    for command in (
        f"ip tuntap add {TAP} mode tap",
        f"sysctl -qw net.ipv6.conf.{TAP}.disable_ipv6=1",
        f"ip link set {TAP} address {HOST.hex(':')} up",
    ):
        subprocess.run(command.split(), check=True)
    return open_tap(TAP)[0]


def main() -> None:
    fd = make_namespace()
    TapPort(fd).set_offloads(guest_offloads(-1))
    work: dict[str, Callable[[], Result]] = {}
    for size, make in (("small", small), ("large", large)):
        out, into = make(HOST, GUEST), make(GUEST, HOST)
        work |= {
            f"send_{size}": partial(plane_sends, fd, out),
            f"send_{size}_syscall": partial(bare_send, fd, out),
            f"receive_{size}": partial(plane_receives, fd, into),
            f"receive_{size}_syscall": partial(bare_receive, fd, into),
        }
    results: dict[str, list[Result]] = {key: [] for key in work}
    for _ in range(RUNS):
        for key, once in work.items():
            results[key].append(once())
    samples = {
        f"{key}_frames_per_s": [one.frames for one in got]
        for key, got in results.items()
        if "small" in key
    }
    samples |= {
        f"{key}_gbit_per_s": [one.bits / 1e9 for one in got]
        for key, got in results.items()
        if "large" in key
    }
    ratios = {
        f"{way}_{size}_vs_syscall": ratio(
            samples, f"{way}_{size}_{unit}", f"{way}_{size}_syscall_{unit}"
        )
        for way in ("send", "receive")
        for size, unit in (("small", "frames_per_s"), ("large", "gbit_per_s"))
    }
    report("net_plane", rows(samples, "per CPU second"), ratios)


if __name__ == "__main__":
    main()
