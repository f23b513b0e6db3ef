"""The Python data plane of disks under a driver of our own: what one core does, without a guest.

The driver is another process that shares the guest's memory and the eventfds, as a vCPU does; it offers a
request anew as soon as it is done. The peer is what Python can do at best with the same file in the same
run: a loop of preadv or pwritev, one for each request. Both on a file in the page cache (BENCH_DIR: where),
so that what is measured is the plane and not a disk. On a host that others use too, read what is per core.

Keys of ``rows``: ``{hostel,loop}_{read,write}_{seq,rand}_d{1,32}_{mb_per_s,per_s}``, and the same with
``_per_core_``: divided by the CPU seconds that the device's process used. Keys of ``ratios``:
``{read,write}_{seq,rand}_d{1,32}[_per_core]_vs_loop``. BENCH_CACHE: the disk's cache mode.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from _common import ratio, report, rows

from hostel.abi import virtio as abi
from hostel.memory import GuestMemory
from hostel.spec import CacheMode
from hostel.virtio.block import Block
from hostel.virtio.device import QueueWiring
from hostel.vmm.loop import EventLoop

MIB = 1 << 20
SIZE = 256 * MIB
RING = 256
SECONDS = float(os.environ.get("BENCH_SECONDS", "0.7"))
CACHE: CacheMode = msgspec.convert(os.environ.get("BENCH_CACHE", "writeback"), CacheMode)
RUNS = int(os.environ.get("BENCH_RUNS", "3"))
DESC, AVAIL, USED, HEADERS, STATUS, DATA = (
    *(0x100000, 0x110000, 0x120000),
    *(0x130000, 0x140000, 0x200000),
)
KINDS = {"seq": MIB, "rand": 4096}
DEPTHS = (1, 32)
TYPES = {"read": abi.BLK_T_IN, "write": abi.BLK_T_OUT}


class Case:
    """One kind of load; its name is part of a row's key."""

    def __init__(self, operation: str, kind: str, depth: int) -> None:
        self.operation, self.kind, self.depth = operation, kind, depth
        self.size = KINDS[kind]
        self.name = f"{operation}_{kind}_d{depth}"
        self.unit = "mb_per_s" if kind == "seq" else "per_s"

    def offsets(self, count: int = 4096) -> list[int]:
        if self.kind == "seq":
            return [at * self.size % SIZE for at in range(count)]
        dice = random.Random(1)
        return [dice.randrange(SIZE // self.size) * self.size for _ in range(count)]

    def figure(self, requests: int, seconds: float) -> float:
        each = self.size / 1e6 if self.kind == "seq" else 1
        return requests * each / seconds


class Driver:
    """A guest's driver with ``depth`` requests of three descriptors each, in a process of its own."""

    def __init__(self, memory: GuestMemory, case: Case, kick: int, call: int) -> None:
        self.memory, self.case = memory, case
        self.kick, self.call = kick, call
        self.avail = memory.view(AVAIL, 6 + 2 * RING).cast("H")
        self.used = memory.view(USED, 6 + 8 * RING)
        self.headers = memory.view(HEADERS, 16 * RING)
        flags = abi.DESC_F_NEXT | (abi.DESC_F_WRITE if case.operation == "read" else 0)
        for slot in range(case.depth):
            at, data = 3 * slot, DATA + slot * case.size
            entries = (
                (HEADERS + 16 * slot, 16, abi.DESC_F_NEXT, at + 1),
                (data, case.size, flags, at + 2),
                (STATUS + slot, 1, abi.DESC_F_WRITE, 0),
            )
            for index, entry in enumerate(entries):
                memory.write(DESC + 16 * (at + index), abi.DESC.pack(*entry))

    def run(self, seconds: float) -> int:
        """Requests done."""
        kind, offsets = TYPES[self.case.operation], self.case.offsets()
        header, unpack = struct.Struct("<IIQ"), struct.Struct("<I").unpack_from
        avail, used, headers = self.avail, self.used, self.headers
        used_index = used[:4].cast("H")
        free, offered, done = list(range(self.case.depth)), 0, 0
        end, running = time.monotonic() + seconds, True
        while running or offered != done:
            for slot in free if running else ():
                sector = offsets[offered % len(offsets)] // 512
                header.pack_into(headers, 16 * slot, kind, 0, sector)
                avail[2 + offered % RING] = 3 * slot
                offered += 1
            free.clear()
            avail[1] = offered & 0xFFFF
            if not used_index[0] & abi.USED_F_NO_NOTIFY:
                os.eventfd_write(self.kick, 1)
            while used_index[1] == done & 0xFFFF:
                select.select([self.call], [], [])
                os.eventfd_read(self.call)
            while done & 0xFFFF != used_index[1]:
                free.append(unpack(used, 4 + 8 * (done % RING))[0] // 3)
                done += 1
            running = time.monotonic() < end
        assert bytes(self.memory.view(STATUS, self.case.depth)) == bytes(self.case.depth)
        return done


def drive(pipe: Connection, memory: GuestMemory, case: Case, kick: int, call: int) -> None:
    driver = Driver(memory, case, kick, call)
    pipe.send(0)
    pipe.recv()
    pipe.send(driver.run(SECONDS))


def hostel(case: Case, path: Path) -> tuple[float, float]:
    """The figure by the clock, and by the CPU seconds that the device took."""
    with GuestMemory(256 * MIB) as memory:
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        ours, theirs = get_context("fork").Pipe()
        child = get_context("fork").Process(target=drive, args=(theirs, memory, case, kick, call))
        child.start()  # before there is any thread
        ours.recv()
        loop = EventLoop()
        loop.start()
        block = Block(loop, str(path), name="disk", cache=CACHE)
        wiring = QueueWiring(0, RING, DESC, AVAIL, USED, kick, call)
        block.activate(memory, 1 << abi.BLK_F_FLUSH | 1 << abi.F_VERSION_1, [wiring])
        cpu, clock = time.process_time(), time.monotonic()
        ours.send(0)
        requests = ours.recv()
        used, passed = time.process_time() - cpu, time.monotonic() - clock
        child.join()
        block.close()
        loop.stop()
        os.close(kick)
        os.close(call)
    return case.figure(requests, passed), case.figure(requests, used)


def plain_loop(case: Case, path: Path) -> tuple[float, float]:
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if CACHE == "none" else 0))
    buffer = [mmap.mmap(-1, case.size)]
    call: Callable[..., int] = os.preadv if case.operation == "read" else os.pwritev
    offsets, requests = case.offsets(), 0
    cpu, clock = time.process_time(), time.monotonic()
    while (passed := time.monotonic() - clock) < SECONDS:
        for offset in offsets[:16]:
            call(fd, buffer, offset)
        offsets = offsets[16:] + offsets[:16]
        requests += 16
    used = time.process_time() - cpu
    os.close(fd)
    return case.figure(requests, passed), case.figure(requests, used)


def main() -> None:
    cases = [Case(op, kind, depth) for op in TYPES for kind in KINDS for depth in DEPTHS]
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR", "/var/tmp")) as folder:
        path = Path(folder, "disk.img")
        path.write_bytes(bytes(SIZE))
        for _ in range(RUNS):
            for case in cases:
                for name, work in (("hostel", hostel), ("loop", plain_loop)):
                    figure, per_core = work(case, path)
                    key = f"{name}_{case.name}"
                    samples.setdefault(f"{key}_{case.unit}", []).append(figure)
                    samples.setdefault(f"{key}_per_core_{case.unit}", []).append(per_core)
    ratios = {
        f"{case.name}{core}_vs_loop": ratio(
            samples, f"hostel_{case.name}{core}_{case.unit}", f"loop_{case.name}{core}_{case.unit}"
        )
        for case in cases
        for core in ("", "_per_core")
    }
    report("block_plane", rows(samples), ratios, cache=CACHE)


if __name__ == "__main__":
    main()
