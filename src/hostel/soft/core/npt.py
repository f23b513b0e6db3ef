"""Nested page tables (APM vol. 2 §15.25) that a core by intercept makes from an EPT, as it needs them.

::

    EPT    R W X at bits 0–2, memory type, A/D at 8 and 9         the hypervisor's, in VMX's format
    NPT    an ordinary 4-level table, every entry with U          what QEMU's walker reads

The entries have other bits, so the core keeps a copy of its own, like a TLB: filled on a nested page
fault, forgotten on a flush. A page is writable in the copy only once the EPT's dirty bit is set, if the
EPT keeps dirty bits.

No entry has NX: QEMU's walker follows a null pointer when it meets NX on a page that holds a guest table, and
any page may. What may not be executed is in a map of bits by host-physical page, which our stub asks.
"""

from __future__ import annotations

import mmap
from struct import Struct

from hostel.soft.paging.nested import EXECUTE, WRITE, EptPage
from hostel.soft.physical import PAGE

_P, _W, _U, _A, _D, _LARGE = 1, 2, 4, 0x20, 0x40, 0x80
_TABLE = _P | _W | _U | _A
_LARGE_SIZE = 2 << 20
_SHIFTS = 39, 30, 21
_INDEX = 511 << 3
_U64 = Struct("<Q")


class NestedTables:
    """Frames of ``memory``, which the core sees at ``hpa``."""

    def __init__(self, memory: memoryview, hpa: int, no_execute: mmap.mmap) -> None:
        self._memory, self._hpa, self._no_execute = memory, hpa, no_execute
        self._marked: list[int] = []
        self.fills = 0
        self.clear()

    @property
    def root(self) -> int:
        return self._hpa

    def clear(self) -> None:
        self._used = 1
        self._memory[:PAGE] = bytes(PAGE)
        for page in self._marked:
            self._no_execute[page >> 3] &= ~(1 << (page & 7))
        self._marked.clear()

    def fill(self, gpa: int, page: EptPage) -> None:
        """Map the page of ``gpa``: large if the EPT's is; the whole copy is forgotten if it is full."""
        if (self._used + 3) * PAGE > len(self._memory):
            self.clear()
        self.fills += 1
        large = page.size >= _LARGE_SIZE
        size = _LARGE_SIZE if large else PAGE
        table = 0
        for shift in _SHIFTS[: 2 if large else 3]:
            table = self._down(table + (gpa >> shift - 3 & _INDEX))
        leaf = page.address & -size | _P | _U | _A | (_LARGE if large else 0)
        if page.rights & WRITE and page.dirty:
            leaf |= _W | _D
        if not page.rights & EXECUTE:
            self._mark(page.address & -size, size)
        _U64.pack_into(self._memory, table + (gpa >> (21 if large else 12) - 3 & _INDEX), leaf)

    def _mark(self, hpa: int, size: int) -> None:
        for page in range(hpa // PAGE, (hpa + size) // PAGE):
            self._no_execute[page >> 3] |= 1 << (page & 7)
            self._marked.append(page)

    def _down(self, at: int) -> int:
        """The table that an entry leads to; a new one if there is none, or a large page."""
        entry: int = _U64.unpack_from(self._memory, at)[0]
        if entry & _P and not entry & _LARGE:
            return (entry & ~0xFFF) - self._hpa
        table = self._used * PAGE
        self._used += 1
        self._memory[table : table + PAGE] = bytes(PAGE)
        _U64.pack_into(self._memory, at, self._hpa + table | _TABLE)
        return table
