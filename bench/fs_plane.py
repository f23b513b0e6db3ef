"""Our file server beside virtiofsd, both under a driver of our own in the same run, without a guest.

The driver is this process: it mounts the same directory, in the page cache, from either server over
vhost-user, as a guest's kernel does, and keeps ``depth`` requests under way. What it costs itself is the
same for both. CPU seconds are the server's.

Keys of ``rows``: ``{ours,virtiofsd}_{lookup,getattr,open}_d{1,16}_per_s``, ``…_{read,write}_mb_per_s``
(1 MiB each, depth 1), and ``…_cpu_us``: the server's time for one request. Keys of ``ratios``:
``WHAT_vs_virtiofsd``, more is better, and ``WHAT_cpu_vs_virtiofsd``, less is better.
"""

from __future__ import annotations

import os
import select
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Literal

from _common import ratio, report, rows

from hostel.abi import fuse as abi
from hostel.host.process import Helper
from hostel.host.runtime import Runtime
from hostel.host.shares import Served, share
from hostel.memory import GuestMemory
from hostel.virtio import vhost_user
from hostel.virtio.mock import DriverQueue

MIB = 1 << 20
RUNS = int(os.environ.get("BENCH_RUNS", "5"))
COUNT = int(os.environ.get("BENCH_COUNT", "3000"))
FILES = 200
Server = Literal["virtiofsd", "python"]
NAMES: dict[str, Server] = {"ours": "python", "virtiofsd": "virtiofsd"}
Request = tuple[int, int, bytes, int]
"""Operation, node, body, room for the answer."""


class Mount:
    """One server, mounted."""

    def __init__(self, path: Path, helper: Helper) -> None:
        self.helper = helper
        self._memory = GuestMemory(32 * MIB)
        self._queues = [
            DriverQueue(self._memory, at, 64, heap=heap)
            for at, heap in ((0, MIB), (2 * MIB, 24 * MIB))
        ]
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        front = self._frontend = vhost_user.Frontend(vhost_user.connect(path, "server"), "bench")
        front.set_features(front.get_features() & ~(1 << 29))  # no event index: fewer things to do
        front.set_owner()
        front.set_mem_table(self._memory)
        for index, queue in enumerate(self._queues):
            hva = self._memory.hva
            front.set_vring_num(index, queue.size)
            front.set_vring_base(index, 0)
            front.set_vring_addr(
                index, desc=hva(queue.desc), used=hva(queue.used), avail=hva(queue.avail)
            )
            front.set_vring_call(index, self._fds[2 * index + 1])
            front.set_vring_kick(index, self._fds[2 * index])
            front.set_vring_enable(index, True)
        body = abi.INIT_IN.pack(7, 31, MIB, 0x3FFF_FFFF & ~abi.SETXATTR_EXT).ljust(64, b"\0")
        self.ask((abi.INIT, 0, body, 4096))

    def close(self) -> None:
        self._frontend.close()
        for fd in self._fds:
            os.close(fd)
        self._memory.close()

    def run(self, requests: Iterator[Request], depth: int) -> list[bytes]:
        """All of them, ``depth`` under way; the answers as they come."""
        queue, answers, under_way = self._queues[1], list[bytes](), 0
        while True:
            for request in islice(requests, depth - under_way):
                self._offer(queue, request)
                under_way += 1
            if not under_way:
                return answers
            if queue.wants_kick:
                os.eventfd_write(self._fds[2], 1)
            while not (done := queue.completed()):
                self._wait()
            under_way -= len(done)
            answers += [one.data for one in done]

    def _wait(self) -> None:
        if not select.select([self._fds[3]], [], [], 10)[0]:
            raise TimeoutError(self.helper.last_lines() or "no answer")
        os.eventfd_read(self._fds[3])

    def ask(self, request: Request) -> bytes:
        (answer,) = self.run(iter([request]), 1)
        _, error, _ = abi.OUT_HEADER.unpack_from(answer)
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer[abi.OUT_HEADER.size :]

    def _offer(self, queue: DriverQueue, request: Request) -> None:
        operation, node, body, room = request
        size = abi.IN_HEADER.size + len(body)
        header = abi.IN_HEADER.pack(size, operation, 2, node, 0, 0, 1, 0)
        split = abi.WRITE_IN.size if operation == abi.WRITE else len(body)
        parts = [part for part in (header, body[:split], body[split:]) if part]
        queue.add(parts, [abi.OUT_HEADER.size, room])


def work(mount: Mount) -> dict[str, tuple[Callable[[], Iterator[Request]], int, int]]:
    """What is measured: its requests, their number, the depth."""
    names = [b"file-%d\0" % at for at in range(FILES)]
    nodes = []
    for name in names:
        entry = mount.ask((abi.LOOKUP, abi.ROOT_ID, name, 4096))
        nodes.append(int(abi.ENTRY_OUT.unpack_from(entry)[0]))
    node = int(abi.ENTRY_OUT.unpack_from(mount.ask((abi.LOOKUP, 1, b"large\0", 4096)))[0])
    opened = mount.ask((abi.OPEN, node, abi.OPEN_IN.pack(os.O_RDWR, 0), 4096))
    handle = abi.OPEN_OUT.unpack_from(opened)[0]
    data = bytes(MIB)

    def lookups() -> Iterator[Request]:
        return ((abi.LOOKUP, abi.ROOT_ID, names[at % FILES], 256) for at in range(COUNT))

    def getattrs() -> Iterator[Request]:
        return ((abi.GETATTR, nodes[at % FILES], bytes(16), 256) for at in range(COUNT))

    def opens() -> Iterator[Request]:
        for at in range(COUNT // 2):
            yield abi.OPEN, nodes[at % FILES], bytes(8), 256
            yield abi.RELEASE, nodes[at % FILES], abi.RELEASE_IN.pack(handle + 1 + at, 0, 0, 0), 256

    def reads() -> Iterator[Request]:
        for at in range(256):
            yield abi.READ, node, abi.READ_IN.pack(handle, at % 16 * MIB, MIB, 0, 0, 0, 0), MIB

    def writes() -> Iterator[Request]:
        for at in range(256):
            body = abi.WRITE_IN.pack(handle, at % 16 * MIB, MIB, 0, 0, 0, 0) + data
            yield abi.WRITE, node, body, 256

    few = {f"{name}_d{depth}": (make, COUNT, depth) for depth in (1, 16) for name, make in (
        ("lookup", lookups), ("getattr", getattrs))}  # fmt: skip
    return few | {"open_d1": (opens, COUNT, 1), "read": (reads, 256, 1), "write": (writes, 256, 1)}


@contextmanager
def mounted(runtime: Path, name: str, tree: Path) -> Iterator[Mount]:
    wanted = Served(name, tree, False, cache="auto", server=NAMES[name])
    one = share(runtime, wanted, memory=1 << 29)
    try:
        mount = Mount(one.socket, one.helper)
        yield mount
        mount.close()
    finally:
        one.stop()


def measure(mount: Mount, name: str, samples: dict[str, list[float]]) -> None:
    for what, (make, count, depth) in work(mount).items():
        cpu, begun = float(mount.helper.usage()["cpu_seconds"]), time.perf_counter()
        mount.run(make(), depth)
        seconds = time.perf_counter() - begun
        used = float(mount.helper.usage()["cpu_seconds"]) - cpu
        key = f"{name}_{what}_" + ("mb_per_s" if what in ("read", "write") else "per_s")
        samples.setdefault(key, []).append(count / seconds)
        samples.setdefault(f"{name}_{what}_cpu_us", []).append(used / count * 1e6)


def main() -> None:
    samples: dict[str, list[float]] = {}
    place = os.environ.get("BENCH_DIR", "/dev/shm")
    with tempfile.TemporaryDirectory(dir=place) as directory, Runtime() as runtime:
        tree = Path(directory)
        for at in range(FILES):
            (tree / f"file-{at}").write_bytes(b"content")
        (tree / "large").write_bytes(bytes(16 * MIB))
        for _ in range(RUNS):
            for name in NAMES:
                with mounted(runtime.path, name, tree) as mount:
                    measure(mount, name, samples)
                (runtime.path / f"{name}.share").rmdir()
    ratios = {}
    for key in samples:
        if key.startswith("ours_"):
            what = key.removeprefix("ours_")
            short = what.removesuffix("_per_s").removesuffix("_mb").removesuffix("_us")
            ratios[f"{short}_vs_virtiofsd"] = ratio(samples, key, f"virtiofsd_{what}")
    report("fs_plane", rows(samples), ratios)


main()
