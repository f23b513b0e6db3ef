"""Linear memory of the guest, for what the core does itself: descriptors, stacks, string operands.

Each access is translated by the ``Mmu`` like one of the processor's, and written in a way that the translated
blocks of overwritten code are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Access, Translation

Translate = Callable[[int, Access, bool], Translation]


class LinearMemory:
    def __init__(
        self,
        physical: PhysicalMemory,
        translate: Translate,
        store: Callable[[int, bytes], None],
    ) -> None:
        self._physical = physical
        self._translate = translate
        self._store = store

    def _parts(
        self, address: int, size: int, access: Access, user: bool
    ) -> Iterator[tuple[int, int]]:
        """(HPA, bytes) a page; a later page is looked at only when it is needed."""
        while size:
            offset = address % PAGE
            count = min(size, PAGE - offset)
            yield self._translate(address, access, user).frame + offset, count
            address, size = address + count, size - count

    def read_bytes(
        self, address: int, size: int, user: bool, access: Access = Access.READ
    ) -> bytes:
        parts = self._parts(address, size, access, user)
        return b"".join(self._physical.read(hpa, count) for hpa, count in parts)

    def read(self, address: int, size: int, user: bool = False) -> int:
        return int.from_bytes(self.read_bytes(address, size, user), "little")

    def write(self, address: int, size: int, value: int, user: bool = False) -> None:
        """All pages are asked for before the first byte is written: a fault leaves nothing half done."""
        data = value.to_bytes(size, "little")
        for hpa, count in list(self._parts(address, size, Access.WRITE, user)):
            self._store(hpa, data[:count])
            data = data[count:]
