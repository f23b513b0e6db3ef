"""A tree of tables, four levels of 512 entries: what EPT, NPT and an IOMMU's second level have in common.

::

    root ─[address 47:39]─► table ─[38:30]─► table ─[29:21]─► table ─[20:12]─► page of 4 KiB
                                       └─ 1 GiB       └─ 2 MiB       an entry with bit 7 is a page

They differ in which bits an entry has beside address and bit 7. Who writes such a tree is here; the walkers,
which judge an entry, are the processor's (nested.py) and the IOMMU's (iommu.py). A page is never replaced
and never split: what is in the way has to be cleared first, and whole.
"""

from __future__ import annotations

from hostel.soft.physical import PAGE, PhysicalMemory

from .walk import ADDRESS

SHIFTS = (39, 30, 21, 12)
PAGE_SHIFTS = (30, 21, 12)
"""Sizes of pages, largest first."""
LARGE_PAGE = 1 << 7


class TableTree:
    """``present``: an entry with any of these bits is one. ``table``: the bits of one that leads on."""

    def __init__(self, physical: PhysicalMemory, *, present: int, table: int) -> None:
        self._physical = physical
        self._present, self._table = present, table
        self.frames = 0
        self.root = self._allocate()

    def _allocate(self) -> int:
        self.frames += 1
        return self._physical.allocate()

    def _release(self, table: int) -> None:
        self._physical.free(table)
        self.frames -= 1

    def place(self, address: int, target: int, bits: int, shift: int) -> bool:
        """Lead the page of ``1 << shift`` bytes around ``address`` to the one around ``target``; only the
        4 KiB, or 2 MiB, around them where smaller pages are in that place. False: one is there already."""
        table = self.root
        for level in SHIFTS:
            entry = table + (address >> level & 511) * 8
            value = self._physical.read_u64(entry)
            if value & self._present:
                if level == 12 or value & LARGE_PAGE:
                    return False
                table = value & ADDRESS
            elif level <= shift:
                large = LARGE_PAGE if level > 12 else 0
                self._physical.write_u64(entry, target & -(1 << level) | bits | large)
                return True
            else:
                table = self._allocate()
                self._physical.write_u64(entry, table | self._table)
        raise AssertionError("level 12 returns")

    def clear(self, start: int, end: int) -> int:
        """Take away the pages there, and the tables that are empty then; how many pages. ``ValueError`` where
        a page lies across an end: nothing was taken of that page."""
        return self._clear(self.root, 0, 0, start, end)

    def _clear(self, table: int, depth: int, base: int, start: int, end: int) -> int:
        size, cleared = 1 << SHIFTS[depth], 0
        first, last = max(start - base, 0) // size, min((end - base - 1) // size, 511)
        for index in range(first, last + 1):
            entry, at = table + index * 8, base + index * size
            value = self._physical.read_u64(entry)
            if not value & self._present:
                continue
            if depth < 3 and not value & LARGE_PAGE:
                below = value & ADDRESS
                cleared += self._clear(below, depth + 1, at, start, end)
                if any(self._physical.view(below, PAGE)):
                    continue
                self._release(below)
            elif at < start or at + size > end:
                raise ValueError(
                    f"a page of {size:#x} bytes at {at:#x} lies across {start:#x} … {end:#x}"
                )
            else:
                cleared += 1
            self._physical.write_u64(entry, 0)
        return cleared

    def free(self) -> None:
        """All frames; the tree is gone."""
        self._free(self.root, 0)

    def _free(self, table: int, depth: int) -> None:
        for index in range(512 if depth < 3 else 0):
            value = self._physical.read_u64(table + index * 8)
            if value & self._present and not value & LARGE_PAGE:
                self._free(value & ADDRESS, depth + 1)
        self._release(table)
