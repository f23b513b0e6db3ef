"""io_uring (io_uring_setup(2)): reads and writes that wait for the medium, without a thread for each.

::

    put, put, put … submit ── one system call ──► kernel ──► eventfd ──► reap: (token, result) …

Rules:

* One thread at a time. The submission ring is used like a list: ``submit`` empties it.
* The buffers belong to the kernel from ``submit`` on until their result is reaped.
* No more than ``capacity`` may be under way: the completion ring then never overflows.

Memory order: the kernel looks at the submission ring in the system call only. Of the completion ring
we load the tail before the entries and store the head after them, which x86 keeps in this order.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence

from hostel.abi import io_uring as abi

_NEEDED = abi.FEAT_SINGLE_MMAP | abi.FEAT_NODROP | abi.FEAT_SUBMIT_STABLE

_libc = ctypes.CDLL(None, use_errno=True)
_addressof, _from_buffer = ctypes.addressof, ctypes.c_char.from_buffer


class Uring:
    """``OSError`` where the host has none: an old kernel, or one that forbids it."""

    def __init__(self, entries: int, buffers: int) -> None:
        """``buffers``: the most that one ``submit`` may hold, of all its requests."""
        params = bytearray(abi.PARAMS.size)
        pointer = (ctypes.c_char * len(params)).from_buffer(params)
        self.fd = _call(abi.SYS_SETUP, entries, pointer)
        try:
            fields = abi.PARAMS.unpack(params)
            if fields[5] & _NEEDED != _NEEDED:
                raise OSError(errno.ENOSYS, "this kernel's io_uring is too old")
            self._map(fields[0], fields[1], abi.SQ_OFFSETS.unpack(fields[8]), fields[9])
            self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            os.close(self.fd)
            raise
        number = ctypes.c_int(self.eventfd)
        _call(abi.SYS_REGISTER, self.fd, abi.REGISTER_EVENTFD, ctypes.byref(number), 1)
        self._iovecs = mmap.mmap(-1, abi.IOVEC.size * buffers)
        self._iovecs_at = _addressof(_from_buffer(self._iovecs))
        self._iovecs_used = 0
        self._tail = 0
        self.waiting = 0

    def _map(self, entries: int, results: int, sq: Sequence[int], cq_offsets: bytes) -> None:
        cq = abi.CQ_OFFSETS.unpack(cq_offsets)
        self.capacity, self._sq_mask, self._cq_mask = results, entries - 1, results - 1
        size = max(sq[6] + 4 * entries, cq[5] + abi.CQE.size * results)
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._rings = mmap.mmap(self.fd, size, offset=abi.OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, abi.SQE.size * entries, offset=abi.OFF_SQES)
        self._words = memoryview(self._rings).cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq[1] // 4, cq[0] // 4, cq[1] // 4
        self._cqes = cq[5]
        for index in range(entries):
            self._words[sq[6] // 4 + index] = index

    def close(self) -> None:
        """With nothing under way."""
        self._words.release()
        for area in (self._rings, self._sqes):
            area.close()
        os.close(self.eventfd)
        os.close(self.fd)

    def put(
        self,
        write: bool,
        fd: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        flags: int,
        token: int,
    ) -> None:
        """Add a request, to be told by its ``token``."""
        if len(buffers) == 1:
            code = abi.OP_WRITE if write else abi.OP_READ
            address, length = _address(buffers[0]), len(buffers[0])
        else:
            code = abi.OP_WRITEV if write else abi.OP_READV
            address, length = self._vector(buffers), len(buffers)
        at = abi.SQE.size * (self._tail & self._sq_mask)
        abi.SQE.pack_into(
            self._sqes, at, code, 0, 0, fd, offset, address, length, flags, token, 0, 0, 0, 0, b""
        )
        self._tail = self._tail + 1 & 0xFFFF_FFFF
        self.waiting += 1

    def submit(self) -> int:
        """Hand all of it over. How many of the last ones the kernel did not take: they are forgotten."""
        self._words[self._sq_tail] = self._tail
        while self.waiting:
            try:
                self.waiting -= _call(abi.SYS_ENTER, self.fd, self.waiting, 0, 0, None, 0)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                break
        left, self.waiting, self._iovecs_used = self.waiting, 0, 0
        self._tail = self._tail - left & 0xFFFF_FFFF
        self._words[self._sq_tail] = self._tail
        return left

    def reap(self) -> Iterator[tuple[int, int]]:
        """Token and result (bytes, or a negative errno) of what has been done."""
        words, at = self._words, self._words[self._cq_head]
        while at != words[self._cq_tail]:
            place = self._cqes + abi.CQE.size * (at & self._cq_mask)
            token, result, _ = abi.CQE.unpack_from(self._rings, place)
            at = at + 1 & 0xFFFF_FFFF
            words[self._cq_head] = at
            yield token, result

    def _vector(self, buffers: Sequence[memoryview]) -> int:
        first = self._iovecs_used
        for index, buffer in enumerate(buffers, first):
            entry = abi.IOVEC.size * index
            abi.IOVEC.pack_into(self._iovecs, entry, _address(buffer), len(buffer))
        self._iovecs_used += len(buffers)
        return self._iovecs_at + abi.IOVEC.size * first


def _address(buffer: memoryview) -> int:
    return _addressof(_from_buffer(buffer))


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
