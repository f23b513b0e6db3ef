"""The receive ring: where frames from the port go (8254x SDM §3.2), and which ones (§10.1 – 10.3).

A frame that finds too few descriptors is held until the driver offers more; meanwhile nobody reads the
port. That is what the card's own memory does for a while, and then frames are lost: here the
network's queue decides.
"""

from __future__ import annotations

import zlib

from hostel.abi import e1000 as abi
from hostel.memory import GuestMemory

from .counters import FCS, Counters
from .ring import Ring

_SHORTEST = 60
_LONGEST = 1522 - FCS
"""Without long packet enable (§13.4.22, LPE), a VLAN's tag included."""
_SIZES = (2048, 1024, 512, 256)
_BROADCAST = b"\xff" * 6


class Receiver:
    def __init__(self, registers: dict[int, int], memory: GuestMemory, counters: Counters) -> None:
        self._registers = registers
        self._memory = memory
        self._counters = counters
        self._ring = Ring(registers, abi.RDBAL, memory)

    def put(self, frame: memoryview, *, checked: bool) -> bool:
        """Give the driver a frame, unless it does not want it. False: there is no room, offer it again.
        ``checked``: the host has seen that TCP's or UDP's checksum is right."""
        if not self._wanted(frame):
            return True
        data, tag = self._untag(frame)
        data = data.ljust(_SHORTEST, b"\0")
        if not self._registers.get(abi.RCTL, 0) & abi.RCTL_SECRC:
            data += zlib.crc32(data).to_bytes(FCS, "little")
        size = self._buffer_size
        if self._ring.size and (self._ring.size - 1) * size < len(data):
            self._counters.count(abi.MPC)  # it never fits
            return True
        if self._ring.ready * size < len(data):
            return False
        status = abi.RX_DD | (abi.RX_TCPCS if checked else abi.RX_IXSM)
        if tag is not None:
            status |= abi.RX_VP
        for start in range(0, len(data), size):
            last = abi.RX_EOP if start + size >= len(data) else 0
            self._store(data[start : start + size], status | last, tag or 0)
        self._counters.received(frame)
        return True

    @property
    def causes(self) -> int:
        """Of an interrupt after a batch: frames came; descriptors run short (§13.4.22, RDMTS)."""
        threshold = self._ring.size >> 1 + (
            self._registers.get(abi.RCTL, 0) >> abi.RCTL_RDMTS_SHIFT & 3
        )
        return abi.INT_RXT0 | (abi.INT_RXDMT0 if self._ring.ready <= threshold else 0)

    def _store(self, data: bytes, status: int, tag: int) -> None:
        """The descriptor is written after what it describes, in one piece."""
        at = self._ring.address
        address = self._memory.read_u64(at)
        self._memory.write(address, data)
        self._memory.write(at, abi.RX_DESC.pack(address, len(data), 0, status, 0, tag))
        self._ring.advance()

    @property
    def _buffer_size(self) -> int:
        control = self._registers.get(abi.RCTL, 0)
        size = _SIZES[control >> abi.RCTL_BSIZE_SHIFT & 3]
        return size * 16 if control & abi.RCTL_BSEX and size != _SIZES[0] else size

    def _untag(self, frame: memoryview) -> tuple[bytes, int | None]:
        """§10.3: the tag goes into the descriptor."""
        tagged = self._tag(frame) if self._registers.get(abi.CTRL, 0) & abi.CTRL_VME else None
        if tagged is None:
            return bytes(frame), None
        return bytes(frame[:12]) + bytes(frame[16:]), tagged

    def _tag(self, frame: memoryview) -> int | None:
        if len(frame) < 18 or int.from_bytes(frame[12:14], "big") != self._registers.get(
            abi.VET, 0
        ):
            return None
        return int.from_bytes(frame[14:16], "big")

    # -- filters --------------------------------------------------------------------------------

    def _wanted(self, frame: memoryview) -> bool:
        control = self._registers.get(abi.RCTL, 0)
        if not control & abi.RCTL_EN or len(frame) < 14:
            return False
        if len(frame) > _LONGEST and not control & (abi.RCTL_LPE | abi.RCTL_SBP):
            self._counters.count(abi.ROC)
            return False
        if control & abi.RCTL_VFE and (tag := self._tag(frame)) is not None:
            word = self._registers.get(abi.VFTA + 4 * (tag >> 5 & 0x7F), 0)
            if not word >> (tag & 0x1F) & 1:
                return False
        return self._wants_address(bytes(frame[:6]), control)

    def _wants_address(self, address: bytes, control: int) -> bool:
        if address == _BROADCAST and control & abi.RCTL_BAM:
            return True
        if control & (abi.RCTL_MPE if address[0] & 1 else abi.RCTL_UPE):
            return True
        return self._is_listed(address) or bool(
            address[0] & 1 and self._is_hashed(address, control)
        )

    def _is_listed(self, address: bytes) -> bool:
        low, high = int.from_bytes(address[:4], "little"), int.from_bytes(address[4:], "little")
        registers = self._registers
        return any(
            registers.get(abi.RAL + at, 0) == low
            and registers.get(abi.RAH + at, 0) & (abi.RAH_AV | 0xFFFF) == abi.RAH_AV | high
            for at in range(0, 8 * abi.RA_COUNT, 8)
        )

    def _is_hashed(self, address: bytes, control: int) -> bool:
        """§13.5.1: twelve bits of the address, which ones RCTL.MO says, choose a bit of the table."""
        shift = (4, 3, 2, 0)[control >> abi.RCTL_MO_SHIFT & 3]
        value = int.from_bytes(address[4:], "little") >> shift & 0xFFF
        return bool(self._registers.get(abi.MTA + 4 * (value >> 5), 0) >> (value & 0x1F) & 1)
