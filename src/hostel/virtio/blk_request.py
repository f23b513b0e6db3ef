"""One request of a block device (virtio 1.2 §5.2.6): taken apart, checked, and done on the host.

A guest may cut header, data and status into buffers as it likes, and ask for anything. What is not on
the disk is refused before the first byte is touched; only a request without a whole header or without
room for a status is a ``QueueError``: it cannot be answered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import msgspec

from hostel.abi import virtio as abi
from hostel.errors import QueueError

from .blk_file import DiskFile
from .plane import ServedQueue
from .queue import Chain, take, total

SECTOR = abi.BLK_SECTOR
RANGE_SECTORS = 1 << 21
RANGES = 16
"""Discard and write-zeroes: at most 1 GiB in a range and this many ranges in a request."""
_HEADER = abi.BLK_OUTHDR.size
_unpack_header = abi.BLK_OUTHDR.unpack


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
    size: int
    """Bytes that a read or a write moves."""
    through: bool = False
    """A write that has to be on the medium before it is answered."""

    def finish(self, status: int, written: int) -> None:
        """``written``: bytes to the guest before the status."""
        self.status[0] = status
        self.queue.push(self.chain, written + 1)


class Refused(Exception):
    """The request is answered with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


def parse(queue: ServedQueue, chain: Chain) -> Request:
    """16 bytes of header first, one byte of status last."""
    out, into = chain.readable, chain.writable
    if out and into and len(out[0]) == _HEADER and len(into[-1]) == 1:  # as every driver does it
        kind, _, sector = _unpack_header(out.pop(0))
        status = into.pop()
    else:
        head, out = take(out, _HEADER)
        if total(head) < _HEADER:
            raise QueueError(f"a block request with a header of {total(head)} bytes")
        into, last = take(into, total(into) - 1)
        if not last:
            raise QueueError("a block request without room for its status")
        kind, _, sector = _unpack_header(b"".join(head))
        status = last[0]
    size = 0
    if kind == abi.BLK_T_IN:
        size = chain.size - _HEADER - 1 - total(out) if out else chain.size - _HEADER - 1
    elif kind == abi.BLK_T_OUT:
        size = chain.size - _HEADER - 1 - total(into) if into else chain.size - _HEADER - 1
    return Request(queue, chain, kind, sector, out, into, status, size)


def perform(disk: DiskFile, request: Request, serial: bytes) -> tuple[int, int]:
    """The status, and how many bytes for the guest are new. ``OSError`` where the host fails."""
    try:
        if request.kind == abi.BLK_T_GET_ID:
            return abi.BLK_S_OK, _get_id(request, serial)
        handler = _HANDLERS.get(request.kind)
        if handler is None:
            raise Refused(abi.BLK_S_UNSUPP)
        return abi.BLK_S_OK, handler(disk, request)
    except Refused as refused:
        return refused.status, 0


def status_of(error: OSError) -> int:
    return abi.BLK_S_UNSUPP if error.errno == errno.EOPNOTSUPP else abi.BLK_S_IOERR


def is_on_disk(disk: DiskFile, sector: int, length: int) -> bool:
    return length % SECTOR == 0 and sector * SECTOR + length <= disk.size


def _span(disk: DiskFile, sector: int, length: int) -> int:
    """Where ``length`` bytes from ``sector`` begin, if they are all there."""
    if not is_on_disk(disk, sector, length):
        raise Refused(abi.BLK_S_IOERR)
    return sector * SECTOR


def _read(disk: DiskFile, request: Request) -> int:
    disk.read(request.into, _span(disk, request.sector, request.size))
    return request.size


def _write(disk: DiskFile, request: Request) -> int:
    _check_writable(disk)
    offset = _span(disk, request.sector, request.size)
    disk.write(request.out, offset, through=request.through)
    return 0


def _check_writable(disk: DiskFile) -> None:
    if disk.read_only:
        raise Refused(abi.BLK_S_IOERR)


def _flush(disk: DiskFile, request: Request) -> int:
    disk.flush()
    return 0


def _get_id(request: Request, serial: bytes) -> int:
    """20 bytes, not terminated if they are full."""
    into, _ = take(request.into, abi.BLK_ID_BYTES)
    done = 0
    for buffer in into:
        buffer[:] = serial[done : done + len(buffer)]
        done += len(buffer)
    return done


def _discard(disk: DiskFile, request: Request) -> int:
    for offset, length, flags in _ranges(disk, request):
        if flags:
            raise Refused(abi.BLK_S_UNSUPP)
        disk.discard(offset, length)
    return 0


def _write_zeroes(disk: DiskFile, request: Request) -> int:
    for offset, length, flags in _ranges(disk, request):
        if flags & ~abi.BLK_WRITE_ZEROES_FLAG_UNMAP:
            raise Refused(abi.BLK_S_UNSUPP)
        disk.write_zeroes(offset, length, unmap=bool(flags))
    if request.through:
        disk.flush()
    return 0


def _ranges(disk: DiskFile, request: Request) -> list[tuple[int, int, int]]:
    """The ranges of a discard or write-zeroes, all checked before the first is done."""
    _check_writable(disk)
    size = total(request.out)
    if not size or size % abi.BLK_RANGE.size or size > RANGES * abi.BLK_RANGE.size:
        raise Refused(abi.BLK_S_IOERR)
    data, ranges = b"".join(request.out), []
    for at in range(0, size, abi.BLK_RANGE.size):
        sector, count, flags = abi.BLK_RANGE.unpack_from(data, at)
        if not 0 < count <= RANGE_SECTORS:
            raise Refused(abi.BLK_S_IOERR)
        ranges.append((_span(disk, sector, count * SECTOR), count * SECTOR, flags))
    return ranges


_HANDLERS: dict[int, Callable[[DiskFile, Request], int]] = {
    abi.BLK_T_IN: _read,
    abi.BLK_T_OUT: _write,
    abi.BLK_T_FLUSH: _flush,
    abi.BLK_T_DISCARD: _discard,
    abi.BLK_T_WRITE_ZEROES: _write_zeroes,
}
