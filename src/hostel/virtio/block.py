"""Block (virtio 1.2 §5.2): a raw file or block device as a disk.

::

    kick ─► event loop: pop, check the frame ─► jobs ─► worker threads: preadv, pwritev, fdatasync …
    interrupt ◄──────────────── push, under the lock ◄─┘

The event loop never waits for the disk (it answers small reads that the page cache holds, and nothing
else); up to ``workers`` requests do. What the guest asks for is
checked against the disk's size before anything is touched, and answered with a status: only a request
without a header or without room for a status, which cannot be answered, stops the device.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import msgspec

from hostel.abi import virtio as abi
from hostel.errors import HostError, QueueError
from hostel.vmm.loop import EventLoop

from .blk_file import DiskFile
from .plane import QueueDevice, ServedQueue
from .queue import Chain, take, total

QUEUE_SIZE = 256
SEGMENTS = QUEUE_SIZE - 2
"""A header and a status go with them."""
SEGMENT_SIZE = 4 << 20
RANGE_SECTORS = 1 << 21
RANGES = 16
"""Discard and write-zeroes: at most 1 GiB in a range and this many ranges in a request."""
AT_ONCE = 64 << 10
"""Bytes that the event loop may copy itself."""

SECTOR = abi.BLK_SECTOR


class Request(msgspec.Struct):
    """A chain, taken apart."""

    queue: ServedQueue
    chain: Chain
    kind: int
    sector: int
    out: list[memoryview]
    """From the guest."""
    into: list[memoryview]
    """To the guest, the status not included."""
    status: memoryview


class _Refused(Exception):
    """The request is answered with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


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
        workers: int = 4,
    ) -> None:
        super().__init__(loop)
        self.name = name
        self.disk = DiskFile(path, read_only=read_only)
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self.features = _features(read_only, queues)
        self.last_error = ""
        self._serial = serial.encode()[: abi.BLK_ID_BYTES].ljust(abi.BLK_ID_BYTES, b"\0")
        self._jobs: SimpleQueue[Request | None] = SimpleQueue()
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._in_flight = 0
        self._draining = False
        self._idle = threading.Condition(self.lock)
        self._describe()

    def _describe(self) -> None:
        """The config space (§5.2.4); fields of features that we do not offer stay 0."""
        self.config = abi.BLK_CONFIG.pack(
            self.disk.size // SECTOR,
            SEGMENT_SIZE,
            SEGMENTS,
            b"",
            SECTOR,
            *(0, 0, 0, 0, 0, 0),
            len(self.queue_sizes),
            *(RANGE_SECTORS, RANGES, 8),
            *(RANGE_SECTORS, RANGES, 1),
            b"",
            *(0, 0, 0),
        )

    def refresh(self) -> None:
        """The file or device has grown or shrunk: tell the guest."""
        with self.lock:
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

    # -- event loop ---------------------------------------------------------------------------

    def serve(self, queue: ServedQueue) -> None:
        if self._draining:
            return
        for chain in queue.chains():
            request = _parse(queue, chain)
            if not self._answer_at_once(request):
                self._in_flight += 1
                self._jobs.put(request)
        queue.interrupt()

    def _answer_at_once(self, request: Request) -> bool:
        """A small read from the page cache: copying is cheaper than waking a worker."""
        length = total(request.into)
        if (
            request.kind != abi.BLK_T_IN
            or length > AT_ONCE
            or not self._is_on_disk(request.sector, length)
        ):
            return False
        if not self.disk.read_cached(request.into, request.sector * SECTOR):
            return False
        request.status[0] = abi.BLK_S_OK
        request.queue.push(request.chain, length + 1)
        return True

    def started(self) -> None:
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

    def save(self) -> dict[str, Any]:
        with self.lock:
            self._drain()
            for queue in self.queues.values():
                queue.kick_self()  # a kick that came while we drained was not served
            return super().save()

    def close(self) -> None:
        super().close()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self.disk.close()

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "last_error": self.last_error}

    # -- workers ------------------------------------------------------------------------------

    def _work(self) -> None:
        while (request := self._jobs.get()) is not None:
            request.status[0], written = self._answer(request)
            with self._idle:
                request.queue.push(request.chain, written)
                request.queue.interrupt()
                self._in_flight -= 1
                self._idle.notify_all()
            del request  # its views keep guest memory mapped

    def _answer(self, request: Request) -> tuple[int, int]:
        """The status, and how many bytes of the chain are new."""
        handler = _HANDLERS.get(request.kind)
        try:
            if handler is None:
                raise _Refused(abi.BLK_S_UNSUPP)
            return abi.BLK_S_OK, handler(self, request) + 1
        except _Refused as refused:
            return refused.status, 1
        except OSError as error:
            self.last_error = f"{self.disk.path}: {error.strerror}"
            unsupported = error.errno == errno.EOPNOTSUPP
            return abi.BLK_S_UNSUPP if unsupported else abi.BLK_S_IOERR, 1

    def _span(self, sector: int, length: int) -> int:
        """Where on the disk ``length`` bytes from ``sector`` begin, if they are all there."""
        if not self._is_on_disk(sector, length):
            raise _Refused(abi.BLK_S_IOERR)
        return sector * SECTOR

    def _is_on_disk(self, sector: int, length: int) -> bool:
        return length % SECTOR == 0 and sector * SECTOR + length <= self.disk.size

    def _read(self, request: Request) -> int:
        length = total(request.into)
        self.disk.read(request.into, self._span(request.sector, length))
        return length

    def _write(self, request: Request) -> int:
        self._writable()
        offset = self._span(request.sector, total(request.out))
        # A driver without FLUSH counts on a completed write being safe (§5.2.6.2).
        through = not self.driver_features >> abi.BLK_F_FLUSH & 1
        self.disk.write(request.out, offset, through=through)
        return 0

    def _writable(self) -> None:
        if self.disk.read_only:
            raise _Refused(abi.BLK_S_IOERR)

    def _flush(self, request: Request) -> int:
        self.disk.flush()
        return 0

    def _get_id(self, request: Request) -> int:
        """§5.2.6: 20 bytes, not terminated if they are full."""
        into, _ = take(request.into, abi.BLK_ID_BYTES)
        done = 0
        for buffer in into:
            buffer[:] = self._serial[done : done + len(buffer)]
            done += len(buffer)
        return done

    def _discard(self, request: Request) -> int:
        for offset, length, flags in self._ranges(request):
            if flags:
                raise _Refused(abi.BLK_S_UNSUPP)
            self.disk.discard(offset, length)
        return 0

    def _write_zeroes(self, request: Request) -> int:
        for offset, length, flags in self._ranges(request):
            if flags & ~abi.BLK_WRITE_ZEROES_FLAG_UNMAP:
                raise _Refused(abi.BLK_S_UNSUPP)
            self.disk.write_zeroes(offset, length, unmap=bool(flags))
        return 0

    def _ranges(self, request: Request) -> list[tuple[int, int, int]]:
        """The ranges of a discard or write-zeroes, all checked before the first is done."""
        self._writable()
        size = total(request.out)
        if not size or size % abi.BLK_RANGE.size or size > RANGES * abi.BLK_RANGE.size:
            raise _Refused(abi.BLK_S_IOERR)
        data, ranges = b"".join(request.out), []
        for at in range(0, size, abi.BLK_RANGE.size):
            sector, count, flags = abi.BLK_RANGE.unpack_from(data, at)
            if not 0 < count <= RANGE_SECTORS:
                raise _Refused(abi.BLK_S_IOERR)
            ranges.append((self._span(sector, count * SECTOR), count * SECTOR, flags))
        return ranges


_HANDLERS: dict[int, Callable[[Block, Request], int]] = {
    abi.BLK_T_IN: Block._read,
    abi.BLK_T_OUT: Block._write,
    abi.BLK_T_FLUSH: Block._flush,
    abi.BLK_T_GET_ID: Block._get_id,
    abi.BLK_T_DISCARD: Block._discard,
    abi.BLK_T_WRITE_ZEROES: Block._write_zeroes,
}


def _features(read_only: bool, queues: int) -> int:
    bits: Sequence[int] = (
        abi.BLK_F_SIZE_MAX,
        abi.BLK_F_SEG_MAX,
        abi.BLK_F_BLK_SIZE,
        abi.BLK_F_FLUSH,
    )
    more = (abi.BLK_F_RO,) if read_only else (abi.BLK_F_DISCARD, abi.BLK_F_WRITE_ZEROES)
    several = (abi.BLK_F_MQ,) if queues > 1 else ()
    own: int = sum(1 << bit for bit in (*bits, *more, *several))
    return QueueDevice.features | own


def _parse(queue: ServedQueue, chain: Chain) -> Request:
    """§5.2.6: 16 bytes of header first, one byte of status last, however they are cut."""
    head, out = take(chain.readable, abi.BLK_OUTHDR.size)
    header = b"".join(head)
    if len(header) < abi.BLK_OUTHDR.size:
        raise QueueError(f"a block request with a header of {len(header)} bytes")
    into, status = take(chain.writable, total(chain.writable) - 1)
    if not status:
        raise QueueError("a block request without room for its status")
    kind, _, sector = abi.BLK_OUTHDR.unpack(header)
    return Request(queue, chain, kind, sector, out, into, status[0])
