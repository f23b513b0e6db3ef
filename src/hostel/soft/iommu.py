"""An IOMMU: the MMU of devices (VT-d specification rev. 4; AMD's and ARM's SMMU do the same).

::

    source-id bus:dev.fn ─► root table [bus] ─► context table [dev.fn] ─► domain, second-level table
    DMA address ───────────────────────────────► 3 or 4 levels, R and W a page ─► host-physical address

A device names itself with every access; it cannot lie, the bus adds its source-id. What it was not
given is a fault: the access does nothing, and is recorded. Tables are cached (contexts by source-id,
translations by domain) until software invalidates them: a mapping that is taken away stays usable until
then, which is why a driver must invalidate before it reuses the page.

The tables lie in ``memory``: host-physical for the host's IOMMU, a machine's own for one that a guest
programs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import msgspec

from hostel.errors import MemoryFault

from .paging.tree import LARGE_PAGE, PAGE_SHIFTS, TableTree
from .paging.walk import ADDRESS, PHYSICAL_BITS, bits
from .physical import PAGE, PhysicalMemory

PRESENT, READ, WRITE = 1, 1, 2
_ABOVE = bits(63, PHYSICAL_BITS)
_ROOT_RESERVED = bits(11, 1) | _ABOVE, bits(63, 0)
_CONTEXT_RESERVED = bits(11, 4) | _ABOVE, bits(7, 7) | bits(63, 24)
"""Of the lower and the upper half (§9.1, §9.3)."""
_ENTRY_RESERVED = bits(11, 11) | bits(51, PHYSICAL_BITS) | bits(62, 62)
"""Of a second-level entry (§9.8): bits 11 and 62 are those of snoop control and of device TLBs, which are not
here; bits 63 and 61:52 are ignored."""
_MAX_FAULTS = 16
"""Fault recording registers; one more sets the overflow (§7.3.1)."""
_IOTLB_SIZE, _CONTEXTS = 256, 64


class DmaFault(IntEnum):
    """Reasons (VT-d §7.1.3, table 25: legacy mode)."""

    ROOT_NOT_PRESENT = 1
    CONTEXT_NOT_PRESENT = 2
    CONTEXT_INVALID = 3
    BEYOND_WIDTH = 4
    WRITE_DENIED = 5
    READ_DENIED = 6
    TABLE_ACCESS = 7
    ROOT_ACCESS = 8
    CONTEXT_ACCESS = 9
    ROOT_RESERVED = 10
    CONTEXT_RESERVED = 11
    TABLE_RESERVED = 12


class Fault(msgspec.Struct, frozen=True):
    """A fault record (§7.3.1)."""

    source: int
    address: int
    """Of the page."""
    reason: DmaFault
    is_write: bool


class Refusal(Exception):
    """The access was stopped; ``fault`` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"DMA refused: {fault}")
        self.fault = fault


class Memory(Protocol):
    """Where tables are, and what a device reaches when it is let through."""

    def read(self, address: int, size: int, /) -> bytes: ...
    def write(self, address: int, data: bytes, /) -> None: ...


class IommuStatistics(msgspec.Struct):
    translations: int = 0
    iotlb_hits: int = 0
    context_hits: int = 0
    references: int = 0
    """Table entries read."""
    faults: int = 0
    invalidations: int = 0


class _Context(msgspec.Struct, frozen=True):
    domain: int
    table: int
    levels: int
    through: bool
    """Pass-through: addresses are host-physical as they come (translation type 2)."""
    quiet: bool
    """Faults are not recorded (FPD)."""


class _Page(msgspec.Struct, frozen=True):
    frame: int
    size: int
    rights: int


class Iommu:
    """``root_table`` 0 is "translation off": every address is let through, as on a host without it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.root_table = 0
        self.faults: list[Fault] = []
        self.overflow = False
        self.statistics = IommuStatistics()
        self.on_entry: Callable[[str, int, int], None] | None = None
        """Called with every table entry read: which table's, where it is, what it holds."""
        self._contexts: OrderedDict[int, _Context] = OrderedDict()
        self._pages: OrderedDict[tuple[int, int], _Page] = OrderedDict()

    # --- Translation ---

    def translate(self, source: int, address: int, *, is_write: bool) -> tuple[int, int]:
        """The host-physical address, and how many bytes from there are contiguous. ``Refusal``."""
        if not self.root_table:
            return address, PAGE - address % PAGE
        self.statistics.translations += 1
        context = self._context(source, address, is_write)
        if context.through:
            return address, PAGE - address % PAGE
        page = self._page(source, context, address, is_write)
        if not page.rights & (WRITE if is_write else READ):
            reason = DmaFault.WRITE_DENIED if is_write else DmaFault.READ_DENIED
            raise self._refuse(source, address, is_write, reason, quiet=context.quiet)
        offset = address % page.size
        return page.frame + offset, page.size - offset

    def _context(self, source: int, address: int, is_write: bool) -> _Context:
        """§3.4: by root entry (bus) and context entry (device and function)."""
        if known := self._contexts.get(source):
            self.statistics.context_hits += 1
            self._contexts.move_to_end(source)
            return known

        def refuse(reason: DmaFault, quiet: bool = False) -> Refusal:
            return self._refuse(source, address, is_write, reason, quiet=quiet)

        root = self._pair("root", self.root_table + (source >> 8) * 16)
        if root is None:
            raise refuse(DmaFault.ROOT_ACCESS)
        if not root[0] & PRESENT:
            raise refuse(DmaFault.ROOT_NOT_PRESENT)
        if _reserved(root, _ROOT_RESERVED):
            raise refuse(DmaFault.ROOT_RESERVED)
        entry = self._pair("context", (root[0] & ADDRESS) + (source & 0xFF) * 16)
        if entry is None:
            raise refuse(DmaFault.CONTEXT_ACCESS)
        low, high = entry
        if not low & PRESENT:
            raise refuse(DmaFault.CONTEXT_NOT_PRESENT, bool(low & 2))
        if _reserved(entry, _CONTEXT_RESERVED):
            raise refuse(DmaFault.CONTEXT_RESERVED, bool(low & 2))
        kind, levels = low >> 2 & 3, (high & 7) + 2
        if kind not in (0, 2) or levels not in (3, 4):
            raise refuse(DmaFault.CONTEXT_INVALID, bool(low & 2))
        found = _Context(high >> 8 & 0xFFFF, low & ADDRESS, levels, kind == 2, bool(low & 2))
        self._contexts[source] = found
        if len(self._contexts) > _CONTEXTS:
            self._contexts.popitem(last=False)
        return found

    def _page(self, source: int, context: _Context, address: int, is_write: bool) -> _Page:
        key = context.domain, address // PAGE
        if known := self._pages.get(key):
            self.statistics.iotlb_hits += 1
            self._pages.move_to_end(key)
            return known
        found = self._walk(context, address)
        if isinstance(found, DmaFault):
            raise self._refuse(source, address, is_write, found, quiet=context.quiet)
        if found.rights:  # what is not present is not cached (§6.2.2, caching mode off)
            self._pages[key] = found
            if len(self._pages) > _IOTLB_SIZE:
                self._pages.popitem(last=False)
        return found

    def _walk(self, context: _Context, address: int) -> _Page | DmaFault:
        """§3.7: second-level translation; rights are those that every level gives."""
        if address >> 12 + 9 * context.levels:
            return DmaFault.BEYOND_WIDTH
        table, rights = context.table, READ | WRITE
        for level in range(context.levels, 0, -1):
            shift = 12 + 9 * (level - 1)
            entry = self._entry(f"level {level}", table + (address >> shift & 511) * 8)
            if entry is None:
                return DmaFault.TABLE_ACCESS
            if not entry & (READ | WRITE):
                return _Page(0, PAGE, 0)
            if _malformed(entry, level):
                return DmaFault.TABLE_RESERVED
            rights &= entry
            if level == 1 or entry & LARGE_PAGE:
                return _Page(entry & ADDRESS, 1 << shift, rights)
            table = entry & ADDRESS
        raise AssertionError("the last level returns")

    def _pair(self, table: str, address: int) -> tuple[int, int] | None:
        """An entry of two words, read at once."""
        found = self._read(table, address, 16)
        return None if found is None else (found & 2**64 - 1, found >> 64)

    def _entry(self, table: str, address: int) -> int | None:
        return self._read(table, address, 8)

    def _read(self, table: str, address: int, size: int) -> int | None:
        self.statistics.references += 1
        try:
            value = int.from_bytes(self._memory.read(address, size), "little")
        except MemoryFault:
            return None
        if self.on_entry:
            self.on_entry(table, address, value)
        return value

    def _refuse(
        self, source: int, address: int, is_write: bool, reason: DmaFault, *, quiet: bool
    ) -> Refusal:
        fault = Fault(source, address & -PAGE, reason, is_write)
        self.statistics.faults += 1
        if quiet:
            return Refusal(fault)
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(fault)
        else:
            self.overflow = True
        return Refusal(fault)

    def take_faults(self) -> list[Fault]:
        """What software does at a fault interrupt: read the records and clear them."""
        taken, self.faults, self.overflow = self.faults, [], False
        return taken

    # --- Invalidation (§6.5) ---

    def invalidate_contexts(self, source: int | None = None, domain: int | None = None) -> None:
        """Of one device, of one domain, or (neither) of all. Translations stay: invalidate those too."""
        self.statistics.invalidations += 1
        for one, context in list(self._contexts.items()):
            if source in (None, one) and domain in (None, context.domain):
                del self._contexts[one]

    def invalidate_iotlb(
        self, domain: int | None = None, address: int | None = None, pages: int = 1
    ) -> None:
        """Of all, of one domain, or of ``pages`` pages of a domain from ``address``."""
        self.statistics.invalidations += 1
        first = 0 if address is None else address // PAGE
        last = 1 << 52 if address is None else first + pages
        for key in list(self._pages):
            if domain in (None, key[0]) and first <= key[1] < last:
                del self._pages[key]


def _reserved(entry: tuple[int, int], masks: tuple[int, int]) -> bool:
    return bool(entry[0] & masks[0] or entry[1] & masks[1])


def _malformed(entry: int, level: int) -> bool:
    """Whether bits are set that have to be clear in a second-level entry that is present (§9.8)."""
    if level == 4 and entry & LARGE_PAGE:
        return True  # no page of 512 GiB
    large = level > 1 and entry & LARGE_PAGE
    low = bits(11 + 9 * (level - 1), 12) if large else 0
    return bool(entry & (_ENTRY_RESERVED | low))


class Tables:
    """What the host's driver does: root, context and second-level tables in frames of their own."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self.root = memory.allocate()
        self._trees: dict[int, TableTree] = {}

    def domain(self) -> int:
        """An empty second-level table."""
        tree = TableTree(self._memory, present=READ | WRITE, table=READ | WRITE)
        self._trees[tree.root] = tree
        return tree.root

    def assign(self, source: int, domain: int, table: int) -> None:
        """Give a device to a domain; 4 levels, 48 bits."""
        at = self.root + (source >> 8) * 16
        if not self._memory.read_u64(at) & PRESENT:
            self._memory.write_u64(at, self._memory.allocate() | PRESENT)
        entry = (self._memory.read_u64(at) & ADDRESS) + (source & 0xFF) * 16
        self._memory.write_u64(entry + 8, domain << 8 | 2)
        self._memory.write_u64(entry, table | PRESENT)

    def remove(self, source: int) -> None:
        at = self._memory.read_u64(self.root + (source >> 8) * 16)
        if at & PRESENT:
            self._memory.write_u64((at & ADDRESS) + (source & 0xFF) * 16, 0)

    def map(
        self, table: int, address: int, hpa: int, size: int, rights: int = READ | WRITE
    ) -> None:
        """Map whole pages where none are, the largest that both addresses are aligned for."""
        end = address + size
        while address < end:
            shift = next(
                shift
                for shift in PAGE_SHIFTS
                if not (address | hpa) % (step := 1 << shift) and end - address >= step
            )
            if not self._trees[table].place(address, hpa, rights, shift):
                raise ValueError(f"there is a page at {address:#x}: unmap it first")
            address, hpa = address + step, hpa + step

    def unmap(self, table: int, address: int, size: int) -> None:
        """Then invalidate, before the memory is somebody else's."""
        self._trees[table].clear(address, address + size)
