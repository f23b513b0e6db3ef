"""Linear memory of the guest, for what the core does itself: descriptors, stacks, string operands.

Each page is translated by the ``Mmu`` like for an access of the processor's, and kept until the core is told
to flush: deliveries of exceptions touch the same pages over and over. A store to a page that code was
fetched from drops the blocks translated from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Access, Translation

from .coherence import Coherence

Translate = Callable[[int, Access, bool], Translation]


class LinearMemory:
    def __init__(
        self,
        physical: PhysicalMemory,
        translate: Translate,
        coherence: Coherence,
    ) -> None:
        self._physical = physical
        self._translate = translate
        self._coherence = coherence
        self._known: dict[tuple[int, Access, bool], int] = {}

    def flush(self) -> None:
        self._known.clear()

    def _frame(self, address: int, access: Access, user: bool) -> int:
        key = address // PAGE, access, user
        frame = self._known.get(key)
        if frame is None:
            frame = self._known[key] = self._translate(address, access, user).frame
        return frame

    def _parts(
        self, address: int, size: int, access: Access, user: bool
    ) -> Iterator[tuple[int, int]]:
        """(HPA, bytes) a page; a later page is looked at only when it is needed."""
        while size:
            offset = address % PAGE
            count = min(size, PAGE - offset)
            yield self._frame(address, access, user) + offset, count
            address, size = address + count, size - count

    def read(self, address: int, size: int, user: bool = False) -> int:
        offset = address % PAGE
        if offset + size <= PAGE:
            hpa = self._frame(address, Access.READ, user) + offset
            return int.from_bytes(self._physical.view(hpa, size), "little")
        parts = self._parts(address, size, Access.READ, user)
        data = b"".join(self._physical.read(hpa, count) for hpa, count in parts)
        return int.from_bytes(data, "little")

    def write(self, address: int, size: int, value: int, user: bool = False) -> None:
        self.write_bytes(address, value.to_bytes(size, "little"), user)

    def write_bytes(self, address: int, data: bytes, user: bool = False) -> None:
        """All pages are asked for before the first byte is written: a fault leaves nothing half done."""
        for hpa, count in list(self._parts(address, len(data), Access.WRITE, user)):
            self._physical.write(hpa, data[:count])
            if hpa & ~(PAGE - 1) in self._coherence:
                self._coherence.wrote(hpa, count)
            data = data[count:]
