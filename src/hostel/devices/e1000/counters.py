"""The statistics registers: they count, and forget what was read (8254x SDM §13.7)."""

from __future__ import annotations

from collections import Counter

from hostel.abi import e1000 as abi

from .offload import Buffer

_MAX = 0xFFFF_FFFF
_WIDE = {abi.GORCL, abi.GOTCL, abi.TORL, abi.TOTL}
"""64 bits: the low half here, the high half in the next register, whose reading clears both."""
_SIZES = (64, 127, 255, 511, 1023)
FCS = 4


class Counters:
    def __init__(self) -> None:
        self.values: Counter[int] = Counter()

    def read(self, register: int) -> int:
        """Counters of 32 bits stick at their maximum (§13.7)."""
        if register in _WIDE:
            return self.values[register] & _MAX
        if register - 4 in _WIDE:
            return self.values.pop(register - 4, 0) >> 32 & _MAX
        return min(self.values.pop(register, 0), _MAX)

    def count(self, register: int) -> None:
        self.values[register] += 1

    def received(self, frame: Buffer) -> None:
        size = len(frame) + FCS
        self._frame(size, (abi.GPRC, abi.TPR), (abi.GORCL, abi.TORL), abi.PRC64)
        if frame[0] & 1:
            self.values[abi.BPRC if bytes(frame[:6]) == b"\xff" * 6 else abi.MPRC] += 1

    def sent(self, head: Buffer, size: int) -> None:
        """``size`` bytes that begin with ``head``."""
        self._frame(size + FCS, (abi.GPTC, abi.TPT), (abi.GOTCL, abi.TOTL), abi.PTC64)
        if head[0] & 1:
            self.values[abi.BPTC if bytes(head[:6]) == b"\xff" * 6 else abi.MPTC] += 1

    def _frame(
        self, size: int, packets: tuple[int, int], octets: tuple[int, int], sizes: int
    ) -> None:
        values = self.values
        for register in packets:
            values[register] += 1
        for register in octets:
            values[register] += size
        values[sizes + 4 * sum(size > limit for limit in _SIZES)] += 1
