"""Block (virtio 1.2 §5.2): a raw file or block device as a disk, served in this process.

::

    kick ─► the disk's own thread: pop, take apart ─┬─ in the page cache: preadv, pwritev ─► push, interrupt
                                                    ├─ reads, writes ─► io_uring ─► push, interrupt
                                                    └─ flush, discard … ─► workers ─► push, interrupt

Guest data is never copied here: the kernel moves it between the file and guest memory. A disk has a
thread of its own, so that what it does at once holds up nothing but itself; several large copies at a
time are the workers'. Workers also do what io_uring did not do at the first go, and everything where
the host has none. Queues take turns (``plane.BATCH``).

A disk with rates stops taking requests while it is in debt (``limit.py``); a timer kicks it then.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from hostel.abi import virtio as abi
from hostel.errors import HostError
from hostel.spec import CacheMode, Limits
from hostel.vmm.loop import EventLoop

from .blk_file import DiskFile
from .blk_request import (
    RANGE_SECTORS,
    RANGES,
    SECTOR,
    Request,
    is_on_disk,
    parse,
    perform,
    status_of,
)
from .limit import Limiter
from .plane import BATCH, QueueDevice, ServedQueue
from .queue import MAX_BUFFERS
from .uring import Uring

QUEUE_SIZE = 256
SEGMENTS = QUEUE_SIZE - 2
"""A header and a status go with them."""
SEGMENT_SIZE = 4 << 20
AT_ONCE = 64 << 10
"""Bytes that are copied where they were asked for; more is spread over threads, and so over pCPUs."""
ALONE = 2 << 20
"""The same for a request that comes alone: another thread gains it nothing. Linux has 1,280 KiB at most."""
AHEAD = 8
"""Chains that are taken from a ring at a time."""
WORKERS = 4


class Block(QueueDevice):
    """Owns the open disk and its threads; ``ImageError`` if the disk cannot be used."""

    device_id = abi.ID_BLOCK

    def __init__(
        self,
        loop: EventLoop,
        path: str,
        *,
        name: str,
        read_only: bool = False,
        serial: str = "",
        queues: int = 1,
        cache: CacheMode = "writeback",
        limits: Limits | None = None,
        workers: int = WORKERS,
    ) -> None:
        """``loop`` hears of what goes wrong on the disk's own one."""
        self.disk = DiskFile(path, read_only=read_only, cache=cache)
        super().__init__(EventLoop(partial(_tell, loop)))
        self.name = name
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self.features = _features(read_only, queues)
        self.last_error = ""
        self._serial = serial.encode()[: abi.BLK_ID_BYTES].ljust(abi.BLK_ID_BYTES, b"\0")
        self._cache = cache
        self._write_cache = cache != "writethrough"
        self._limiter = Limiter(limits or Limits())
        self._limited = self._limiter.active
        self._ahead = 1 if self._limited else AHEAD
        self._jobs: SimpleQueue[Request | None] = SimpleQueue()
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._uring: Uring | None = None
        self._under_way: dict[int, tuple[Request, int]] = {}
        """What io_uring has, by token: the request and its size."""
        self._token = 0
        self._in_flight = 0
        self._crowded = False
        """Something came while the last large request was copied where it was asked for."""
        self._draining = False
        self._idle = threading.Condition(self.lock)
        self._describe()
        self.loop.start()

    # -- config space -------------------------------------------------------------------------

    def _describe(self) -> None:
        """§5.2.4; fields of features that we do not offer stay 0."""
        self.config = abi.BLK_CONFIG.pack(
            self.disk.size // SECTOR,
            SEGMENT_SIZE,
            SEGMENTS,
            b"",
            SECTOR,
            *(self.disk.block_exponent, 0, 1, 0),
            *(self._write_cache, 0),
            len(self.queue_sizes),
            *(RANGE_SECTORS, RANGES, 8),
            *(RANGE_SECTORS, RANGES, 1),
            b"",
            *(0, 0, 0),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """The write cache is all that a driver may set (§5.2.5). On a vCPU: takes no lock."""
        if offset == abi.BLK_CONFIG.offsets["wce"] and len(data) == 1:
            self._write_cache = bool(data[0] & 1)
            self._describe()

    def refresh(self) -> None:
        """The file or device has grown or shrunk: tell the guest."""
        self.disk.refresh()
        self._describe()
        self.config_changed()

    def resize(self, size: int) -> None:
        """Make the disk ``size`` bytes large, and tell the guest."""
        try:
            self.disk.resize(size)
        except OSError as error:
            raise HostError(f"disk {self.disk.path} keeps its size: {error.strerror}") from None
        self.refresh()

    # -- the disk's own thread ----------------------------------------------------------------

    def serve(self, queue: ServedQueue) -> None:
        if self._draining or (self._limited and self._limiter.take(0, 0)):  # a timer is set
            return
        for chains in queue.batches(self._ahead):
            alone = len(chains) == 1 and not (self._in_flight or self._crowded)
            most = ALONE if alone else AT_ONCE
            for chain in chains:
                request = parse(queue, chain)
                if request.kind != abi.BLK_T_IN:
                    request.through = self._is_through()
                if not self._answer_at_once(request, most):
                    self._hand_on(request)
            if self._limited and (wait := self._limiter.take(request.size)):
                self.loop.call_later(wait, self._resume)
                break
        self._submit()
        queue.interrupt()

    def _hand_on(self, request: Request) -> None:
        self._in_flight += 1
        self._crowded = False
        if not self._put(request, request.size):
            self._jobs.put(request)

    def _is_through(self) -> bool:
        """§5.2.6.2: without a write cache, or for a driver that knows of none, a completed write is safe."""
        if self._cache == "unsafe":
            return False
        knows = self.driver_features & (1 << abi.BLK_F_FLUSH | 1 << abi.BLK_F_CONFIG_WCE)
        return not (self._write_cache and knows)

    def _answer_at_once(self, request: Request, most: int) -> bool:
        """What the page cache gives or takes: copying is cheaper than waking a worker."""
        size, disk = request.size, self.disk
        if not 0 < size <= most or not is_on_disk(disk, request.sector, size):
            return False
        if request.kind == abi.BLK_T_IN:
            if not disk.read_cached(request.into, request.sector * SECTOR, size):
                return False
            written = size
        else:
            if request.through or disk.read_only or not disk.is_cached:
                return False
            if not disk.write_cached(request.out, request.sector * SECTOR, size):
                return False
            written = 0
        if size > AT_ONCE:
            self._crowded = any(queue.has_more() for queue in self.queues.values())
        request.finish(abi.BLK_S_OK, written)
        return True

    # -- io_uring -----------------------------------------------------------------------------

    def _put(self, request: Request, size: int) -> bool:
        """Whether io_uring takes it. What it may not do well, the workers do: they know every error."""
        uring, disk = self._uring, self.disk
        if uring is None or not size or not is_on_disk(disk, request.sector, size):
            return False
        write = request.kind == abi.BLK_T_OUT
        if (write and disk.read_only) or len(self._under_way) >= uring.capacity:
            return False
        if disk.is_cached and size > AT_ONCE and not request.through:
            return False
        self._token += 1
        self._under_way[self._token] = request, size
        uring.put(
            write,
            disk.data_fd,
            request.sector * SECTOR,
            request.out if write else request.into,
            flags=os.RWF_DSYNC if request.through and write else 0,
            token=self._token,
        )
        return True

    def _submit(self) -> None:
        if self._uring is not None and self._uring.waiting:
            for _ in range(self._uring.submit()):
                self._jobs.put(self._under_way.popitem()[1][0])

    def _reap(self) -> None:
        """Some of it is done. On the disk's thread."""
        with self.lock:
            assert self._uring is not None
            for token, result in self._uring.reap():
                request, size = self._under_way.pop(token)
                if result != size:  # cut short, misaligned, an error: once more, with care
                    self._jobs.put(request)
                    continue
                request.finish(abi.BLK_S_OK, size if request.kind == abi.BLK_T_IN else 0)
                self._in_flight -= 1
            for queue in self.queues.values():
                queue.interrupt()
            self._idle.notify_all()

    def _open_uring(self) -> None:
        with contextlib.suppress(OSError):  # none here
            self._uring = Uring(4 * BATCH, BATCH * MAX_BUFFERS)
            self.loop.add(self._uring.eventfd, self._reap, edge=True)

    def _resume(self) -> None:
        """The debt is paid."""
        with self.lock:
            for queue in self.queues.values():
                queue.kick_self()

    def started(self) -> None:
        if self._uring is None:
            self._open_uring()
        while len(self._threads) < self._workers:
            name = f"hostel-{self.name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stopping(self) -> None:
        self._drain()

    def _drain(self) -> None:
        """Wait for what the workers have. The lock is free meanwhile, but nothing new is taken."""
        self._draining = True
        self._idle.wait_for(lambda: self._in_flight == 0)
        self._draining = False

    def reset(self) -> None:
        super().reset()
        self._write_cache = self._cache != "writethrough"
        self._describe()

    def save(self) -> dict[str, Any]:
        with self.lock:
            self._drain()
            for queue in self.queues.values():
                queue.kick_self()  # a kick that came while we drained was not served
            return super().save()

    def close(self) -> None:
        super().close()
        self.loop.stop()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._uring is not None:
            self._uring.close()
            self._uring = None
        self.disk.close()

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "last_error": self.last_error}

    # -- workers ------------------------------------------------------------------------------

    def _work(self) -> None:
        while (request := self._jobs.get()) is not None:
            status, written = self._answer(request)
            with self._idle:
                request.finish(status, written)
                request.queue.interrupt()
                self._in_flight -= 1
                self._idle.notify_all()
            del request  # its views keep guest memory mapped

    def _answer(self, request: Request) -> tuple[int, int]:
        try:
            return perform(self.disk, request, self._serial)
        except OSError as error:
            self.last_error = f"{self.disk.path}: {error.strerror}"
            return status_of(error), 0


def _features(read_only: bool, queues: int) -> int:
    bits: Sequence[int] = (
        abi.BLK_F_SIZE_MAX,
        abi.BLK_F_SEG_MAX,
        abi.BLK_F_BLK_SIZE,
        abi.BLK_F_FLUSH,
        abi.BLK_F_TOPOLOGY,
        abi.BLK_F_CONFIG_WCE,
    )
    more = (abi.BLK_F_RO,) if read_only else (abi.BLK_F_DISCARD, abi.BLK_F_WRITE_ZEROES)
    several = (abi.BLK_F_MQ,) if queues > 1 else ()
    own: int = sum(1 << bit for bit in (*bits, *more, *several))
    return QueueDevice.features | own


def _tell(loop: EventLoop, error: Exception) -> None:
    """An error of the disk's loop is raised on the machine's, which knows what to do with it."""

    def again() -> None:
        raise error

    loop.call_soon(again)
