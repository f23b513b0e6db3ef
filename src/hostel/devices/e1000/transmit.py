"""The transmit ring: descriptors become frames, frames go to the port (8254x SDM §3.3, §3.4).

::

    context   where headers are, for those that follow ─┐
    legacy    one piece of a frame                      ├─► pieces … EOP ─► _finish ─► outbox ─► port
    data      one piece, with checksums or segmentation ┘

What a piece holds is not copied: the port reads guest memory. A frame whose headers change is copied as
far as its headers go. Where the port can leave checksums and segments to the host's kernel it does.

A descriptor is done (written back, passed by the head) when all frames before it are in the port. If
the port has no room, the rest waits in ``outbox`` and no descriptor is looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hostel.abi import e1000 as abi
from hostel.abi import virtio_net
from hostel.memory import GuestMemory
from hostel.virtio.net_port import MAX_FRAME, NetPort

from . import offload
from .counters import Counters
from .offload import Buffer, Context
from .ring import Ring

BATCH = 256
"""Descriptors in one go; who has more comes again."""
_MAX_PIECES = 512
_MIN_FRAME, _SHORTEST = 14, 60
_LONGEST = 1 << 18
"""Bytes of a frame before segmentation. A longer one is dropped."""
_PLAIN = virtio_net.HDR.pack(0, virtio_net.HDR_GSO_NONE, 0, 0, 0, 0, 0)


class Transmitter:
    def __init__(
        self, registers: dict[int, int], memory: GuestMemory, port: NetPort, counters: Counters
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._port = port
        self._counters = counters
        self._ring = Ring(registers, abi.TDBAL, memory)
        self.connected: Callable[[], bool] = lambda: True
        """Whether there is a link; without one frames are sent nowhere."""
        self.pay: Callable[[int], None] = lambda size: None
        """Told the size of each frame that went."""
        self.waiting: Callable[[], bool] = lambda: False
        """Whether nothing more may go for now."""
        self.dropped = 0
        self.reset()

    def reset(self) -> None:
        self.context = Context()
        self._outbox: deque[Sequence[Buffer]] = deque()
        self._drop_frame()
        self._unfinished: tuple[int, int] | None = None

    def _drop_frame(self) -> None:
        self._pieces: list[Buffer] = []
        self._size = 0
        self._first = (0, 0)
        """Command and options of the frame's first data descriptor; what holds for all (§3.3.7)."""

    @property
    def blocked(self) -> bool:
        """The port has no room: call ``work`` when it has."""
        return bool(self._outbox)

    def work(self) -> tuple[int, bool]:
        """Serve the ring: the causes of an interrupt, and whether there is more to do at once."""
        causes = 0
        for _ in range(BATCH):
            if self._outbox and not self._flush():
                return causes, False
            if self._unfinished is not None:
                causes |= self._finish_descriptor(*self._unfinished)
            if self.waiting():
                return causes, False
            if not self._registers.get(abi.TCTL, 0) & abi.TCTL_EN or not self._ring.ready:
                return causes, False
            self._take(self._ring.read())
        return causes, True

    def _finish_descriptor(self, address: int, lower: int) -> int:
        """Report it, if that was asked for (RS), and let the driver have it back."""
        self._unfinished = None
        if lower & abi.TX_CMD_RS:
            self._memory.write(address + abi.TX_STATUS_OFFSET, bytes((abi.TX_DD,)))
        self._ring.advance()
        cause = abi.INT_TXDW if lower & abi.TX_CMD_RS else 0
        return cause | (0 if self._ring.ready else abi.INT_TXQE)

    def save(self) -> dict[str, Any]:
        return {
            "context": msgspec.structs.asdict(self.context),
            "pieces": b"".join(self._pieces).hex(),
            "size": self._size,
            "first": list(self._first),
            "outbox": [[bytes(piece).hex() for piece in frame] for frame in self._outbox],
            "unfinished": self._unfinished and list(self._unfinished),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.context = Context(**state["context"])
        pieces = bytes.fromhex(state["pieces"])
        self._pieces = [pieces] if pieces else []
        self._size = state["size"]
        self._first = (state["first"][0], state["first"][1])
        self._outbox.extend([bytes.fromhex(part) for part in frame] for frame in state["outbox"])
        unfinished = state["unfinished"]
        self._unfinished = (unfinished[0], unfinished[1]) if unfinished else None

    # -- descriptors ----------------------------------------------------------------------------

    def _take(self, descriptor: bytes) -> None:
        address, lower, _, options, special = abi.TX_DESC.unpack(descriptor)
        self._unfinished = (self._ring.address, lower)
        extended = lower & abi.TX_CMD_DEXT
        if extended and lower & abi.TX_DTYP_MASK != abi.TX_DTYP_DATA:
            self.context = Context.of(descriptor)
            return
        length = lower & (abi.TX_LENGTH_MASK if extended else abi.TX_LEGACY_LENGTH_MASK)
        if not self._pieces:
            self._first = (lower, options)
        self._add(address, length)
        if lower & abi.TX_CMD_EOP:
            self._finish(lower, options, special)
            self._drop_frame()

    def _add(self, address: int, length: int) -> None:
        self._size += length
        if length and self._size <= _LONGEST:
            self._pieces.append(self._memory.view(address, length))
            if len(self._pieces) > _MAX_PIECES:
                self._pieces = [b"".join(self._pieces)]

    # -- frames ---------------------------------------------------------------------------------

    def _finish(self, lower: int, css: int, special: int) -> None:
        if not _MIN_FRAME <= self._size <= _LONGEST or not self.connected():
            self.dropped += 1
            return
        command, options = self._first
        tag = special if lower & abi.TX_CMD_VLE else None
        if self._registers.get(abi.CTRL, 0) & abi.CTRL_VME == 0:
            tag = None
        if not command & abi.TX_CMD_DEXT:
            cso = lower >> 16 & 0xFF
            self._legacy((css, cso) if lower & abi.TX_CMD_IC else None, tag)
        elif command & abi.TX_CMD_TSE:
            self._large(options, tag)
        else:
            self._checked(options, tag)

    def _legacy(self, insert: tuple[int, int] | None, tag: int | None) -> None:
        """§3.3.3.3: one checksum, from CSS to the end, at CSO."""
        if insert is None:
            self._queue(_PLAIN, self._pieces, tag)
            return
        frame = bytearray(b"".join(self._pieces))
        offload.insert_checksum(frame, *insert, 0)
        self._queue(_PLAIN, [frame], tag)

    def _checked(self, options: int, tag: int | None) -> None:
        """A data descriptor's frame: IP's checksum, TCP's or UDP's, both or none."""
        context = self.context
        if not options:
            self._queue(_PLAIN, self._pieces, tag)
        elif options == abi.TX_POPTS_TXSM and not context.tucse and self._can(virtio_net.F_CSUM):
            header = offload.partial_checksum(context, _shift(tag))
            self._queue(header, self._pieces, tag)
        else:
            frame = bytearray(b"".join(self._pieces))
            if options & abi.TX_POPTS_IXSM:
                offload.insert_checksum(frame, context.ipcss, context.ipcso, context.ipcse)
            if options & abi.TX_POPTS_TXSM:
                offload.insert_checksum(frame, context.tucss, context.tucso, context.tucse)
            self._queue(_PLAIN, [frame], tag)

    def _large(self, options: int, tag: int | None) -> None:
        """A frame that is sent in segments."""
        frame, context = b"".join(self._pieces), self.context
        self._counters.count(abi.TSCTC)
        if self._kernel_can_cut(len(frame), options):
            head = bytearray(frame[: context.hdrlen])
            header = offload.large_frame(head, len(frame), context, _shift(tag))
            self._queue(header, [head, memoryview(frame)[context.hdrlen :]], tag)
            return
        before = len(self._outbox)
        for segment in offload.segments(frame, context, options):
            self._queue(_PLAIN, [segment], tag)
        self.dropped += len(self._outbox) == before

    def _kernel_can_cut(self, size: int, options: int) -> bool:
        context = self.context
        bit = virtio_net.F_HOST_TSO4 if context.ipv4 else virtio_net.F_HOST_TSO6
        return (
            context.tcp
            and self._can(bit)
            and bool(options & abi.TX_POPTS_TXSM)
            and context.hdrlen < size <= MAX_FRAME - virtio_net.HDR.size
            and size - context.ipcss <= 0xFFFF
            and context.mss > 0
            and offload.headers_fit(context)
        )

    def _can(self, feature: int) -> bool:
        return bool(self._port.features >> feature & 1)

    def _queue(self, header: bytes, pieces: Sequence[Buffer], tag: int | None) -> None:
        if tag is not None:
            pieces = offload.tagged(pieces, self._registers.get(abi.VET, 0), tag)
        size = sum(map(len, pieces))
        if size < _SHORTEST and self._registers[abi.TCTL] & abi.TCTL_PSP:
            pieces = [*pieces, bytes(_SHORTEST - size)]
        self._outbox.append([header, *pieces])

    def _flush(self) -> bool:
        """Whether all of the outbox went. What the host refuses of a frame is the frame's loss."""
        while self._outbox and not self.waiting():
            header, *pieces = self._outbox[0]
            size = sum(map(len, pieces))
            try:
                self._port.send([memoryview(piece) for piece in (header, *pieces)])
                self._counters.sent(b"".join(bytes(p[:6]) for p in pieces)[:6], size)
                self.pay(size)
            except BlockingIOError:
                return False
            except OSError:
                self.dropped += 1
            self._outbox.popleft()
        return not self._outbox


def _shift(tag: int | None) -> int:
    return 0 if tag is None else 4
