"""One FUSE request, taken from a virtqueue, and its answer (virtio 1.2 §5.11.6).

::

    readable   header │ arguments │ names or data
    writable   header │ answer                       none where no answer is due (FORGET)

All of it is the guest's word. What cannot even be answered (no room, no header) is a ``FuseFault``: the
device stops. All else is an error number for the guest.
"""

from __future__ import annotations

import struct
from errno import EINVAL

from hostel.abi import fuse as abi
from hostel.abi.record import Record
from hostel.errors import QueueError
from hostel.virtio.queue import Chain, fill, take, total

from .nodes import refuse

MOST_BODY = 1 << 17
"""Bytes of arguments and names: two names, or an attribute of 64 KiB, are the most there is."""

_WRITE_ARGUMENTS = abi.IN_HEADER.size + abi.WRITE_IN.size


class FuseFault(QueueError):
    """What the guest sent is no FUSE request at all."""


class Request:
    """``body`` is all behind the header, but for the data of a WRITE, which stay in ``data``."""

    __slots__ = ("body", "data", "gid", "node", "opcode", "room", "uid", "unique", "writable")

    def __init__(self, chain: Chain) -> None:
        readable = chain.readable
        self.data: list[memoryview] = []
        first = readable[0] if readable else b""
        if len(first) < abi.IN_HEADER.size:
            first, readable = self._gather(chain)
        size, self.opcode, self.unique, self.node, self.uid, self.gid, _, _ = (
            abi.IN_HEADER.unpack_from(first)
        )
        self.writable = chain.writable
        self.room = total(chain.writable)
        self.body = b""
        if self.opcode == abi.WRITE:
            head, self.data = take(readable, _WRITE_ARGUMENTS)
            self.body = b"".join(head)[abi.IN_HEADER.size :]
        elif size != total(readable) or size > MOST_BODY:
            self.opcode = 0  # no operation: refused
        else:
            self.body = b"".join(readable)[abi.IN_HEADER.size :]

    def _gather(self, chain: Chain) -> tuple[memoryview, list[memoryview]]:
        """A driver may cut a request as it likes (§2.7.4)."""
        if not abi.IN_HEADER.size <= total(chain.readable):
            raise FuseFault("a FUSE request without a whole header")
        if total(chain.readable) > MOST_BODY << 4:
            raise FuseFault("a FUSE request in too many bytes")
        whole = memoryview(b"".join(chain.readable))
        return whole, [whole]

    # -- arguments ----------------------------------------------------------------------------

    def arguments(self, record: Record) -> tuple[int, ...]:
        try:
            return record.unpack_from(self.body)
        except struct.error:
            return refuse(EINVAL)

    def name(self, offset: int = 0) -> bytes:
        """The only string from ``offset`` on."""
        (name,) = self.names(offset, 1)
        return name

    def names(self, offset: int, count: int) -> list[bytes]:
        """Strings, each with its zero byte, and nothing behind them."""
        parts = self.body[offset:].split(b"\0")
        if len(parts) != count + 1 or parts[-1]:
            refuse(EINVAL)
        return parts[:-1]

    # -- the answer ---------------------------------------------------------------------------

    @property
    def most(self) -> int:
        """Bytes that there is room for behind the answer's header."""
        return self.room - abi.OUT_HEADER.size

    def space(self, size: int) -> list[memoryview]:
        """Where ``size`` bytes of an answer go, or as many as there is room for."""
        _, behind = take(self.writable, abi.OUT_HEADER.size)
        return take(behind, size)[0]

    def answer(self, body: bytes, error: int = 0) -> int:
        """Write it; how many bytes it took."""
        size = abi.OUT_HEADER.size + len(body)
        if size > self.room:
            if self.room < abi.OUT_HEADER.size:
                raise FuseFault("no room for the answer to a FUSE request")
            return self.answer(b"", EINVAL)
        fill(self.writable, abi.OUT_HEADER.pack(size, -error, self.unique) + body)
        return size

    def answer_in_place(self, size: int) -> int:
        """``size`` bytes are in ``space`` already."""
        whole = abi.OUT_HEADER.size + size
        fill(self.writable, abi.OUT_HEADER.pack(whole, 0, self.unique))
        return whole
