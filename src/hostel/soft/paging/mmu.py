"""The memory management unit of one physical processor: TLB first, then a walk in one dimension or two.

::

    without EPT   CR3 → tables in host-physical memory (a shadow's) → HPA            ≤ 4 references
    with EPT      CR3 → tables in guest-physical memory → GPA, and each entry's
                  GPA, and the last, through the EPT → HPA                           ≤ 24 references

- Order of a two-dimensional walk: the guest's entries (each through the EPT: a violation may come at
  any), the guest's rights (#PF), the EPT's rights for the final GPA, and only then accessed and dirty bits.
- With paging off the linear address is the GPA (unrestricted guest), or the HPA if there is no EPT.
- What a core is given it may keep: so ``Translation.writable`` is False while a dirty bit must be set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Access, Controls, EptFault, PageFault, Secondary, Translation
from hostel.soft.state import CR4_PGE, CpuState

from .nested import EXECUTE as EPT_EXECUTE
from .nested import FINAL, LINEAR_VALID, WRITE, EptMemory, EptPage, EptWalker, pointers_of
from .tlb import Invept, Invvpid, Tlb, TlbEntry
from .walk import ADDRESS, Asked, Walk, asked, mark, permits, walk


class MmuStatistics(msgspec.Struct):
    translations: int = 0
    """Times the core asked."""
    walks: int = 0
    walks_2d: int = 0
    """of these in two dimensions."""
    references: int = 0
    """Table entries read, in both dimensions."""
    longest: int = 0
    """References of the longest walk."""
    page_faults: int = 0
    ept_faults: int = 0


class WalkTrace(NamedTuple):
    """One walk that led to a page, for who draws it."""

    address: int
    page: Walk
    ept: EptPage | None
    """The final step through the EPT."""
    references: int


class PagingMmu:
    """Implements ``silicon.Mmu``."""

    def __init__(self, physical: PhysicalMemory, *, tlb_size: int = 1536) -> None:
        self.physical = physical
        self.tlb = Tlb(tlb_size)
        self.statistics = MmuStatistics()
        self.on_walk: Callable[[WalkTrace], None] | None = None

    def translate(
        self, state: CpuState, controls: Controls, address: int, access: Access, user: bool
    ) -> Translation:
        self.statistics.translations += 1
        vpid, root = _tag(controls)
        ask = asked(state, access, user)
        entry = self.tlb.look_up(vpid, root, address)
        if entry is not None:
            granted = _grant(entry, state, address, ask)
            if granted is not None:
                self.tlb.statistics.hits += 1
                return granted
        self.tlb.statistics.misses += 1
        try:
            entry = self._walk(state, controls, address, ask)
        except (PageFault, EptFault) as fault:
            self._count_fault(fault)
            self.tlb.drop(vpid, root, address)
            raise
        shared = entry.page.is_global and bool(state.cr4 & CR4_PGE)
        self.tlb.insert(vpid, root, address, entry, shared)
        granted = _grant(entry, state, address, ask)
        assert granted is not None, "a walk that succeeds permits the access it was made for"
        return granted

    def _walk(self, state: CpuState, controls: Controls, address: int, ask: Asked) -> TlbEntry:
        if controls.secondary & Secondary.EPT:
            return self._walk_2d(state, controls.ept_pointer, address, ask)
        page = walk(self.physical, state, address, ask)
        page = mark(self.physical, page, ask.access)
        self._count_walk(address, page, None, len(page.steps))
        dirty = page.format is None or page.dirty
        return _entry(page, page.address, page.size, dirty, executes=True)

    def _walk_2d(self, state: CpuState, pointer: int, address: int, ask: Asked) -> TlbEntry:
        walker = EptWalker(self.physical, pointer, address)
        memory = EptMemory(walker)
        page = walk(memory, state, address, ask)
        final = walker.translate(page.address, ask.access, LINEAR_VALID | FINAL)
        references = memory.references + walker.references
        page = mark(memory, page, ask.access)
        self.statistics.walks_2d += 1
        self._count_walk(address, page, final, references)
        writes = (page.format is None or page.dirty) and final.dirty and bool(final.rights & WRITE)
        size = final.size if page.format is None else min(page.size, final.size)
        return _entry(page, final.address, size, writes, bool(final.rights & EPT_EXECUTE))

    def _count_walk(self, address: int, page: Walk, ept: EptPage | None, references: int) -> None:
        statistics = self.statistics
        statistics.walks += 1
        statistics.references += references
        statistics.longest = max(statistics.longest, references)
        if self.on_walk is not None:
            self.on_walk(WalkTrace(address, page, ept, references))

    def _count_fault(self, fault: PageFault | EptFault) -> None:
        if isinstance(fault, PageFault):
            self.statistics.page_faults += 1
        else:
            self.statistics.ept_faults += 1

    def pointers(self, controls: Controls, cr3: int) -> list[int]:
        return pointers_of(self.physical, controls, cr3)

    # --- Invalidation ---

    def invalidate(self, controls: Controls, address: int) -> None:
        self.tlb.invlpg(_tag(controls)[0], address)

    def flush(self, controls: Controls, *, keep_global: bool) -> None:
        self.tlb.flush(_tag(controls)[0], keep_global=keep_global)

    def invvpid(self, type: int, vpid: int, address: int = 0) -> None:
        """The instruction, once its operands were found good."""
        self.tlb.invvpid(Invvpid(type), vpid, address)

    def invept(self, type: int, pointer: int = 0) -> None:
        self.tlb.invept(Invept(type), pointer & ADDRESS)


def _tag(controls: Controls) -> tuple[int, int]:
    """Without the control "enable VPID" all is VPID 0, and VM entries and exits flush that (§28.3.3.1)."""
    vpid = controls.vpid if controls.secondary & Secondary.VPID else 0
    root = controls.ept_pointer & ADDRESS if controls.secondary & Secondary.EPT else 0
    return vpid, root


def _entry(page: Walk, hpa: int, size: int, writes: bool, executes: bool) -> TlbEntry:
    if size == 1 << 22:
        size = 1 << 21
    return TlbEntry(hpa & -size, size, page, writes, executes)


def _grant(entry: TlbEntry, state: CpuState, address: int, ask: Asked) -> Translation | None:
    """What a core may do with the page at this privilege; None if that is not what it asks for."""
    page = entry.page
    _, user, override = ask
    readable = permits(page, state, Asked(Access.READ, user, override))
    writable = entry.writes and permits(page, state, Asked(Access.WRITE, user, override))
    executable = entry.executes and permits(page, state, Asked(Access.FETCH, user, override))
    if not (readable, writable, executable)[ask.access]:
        return None
    frame = entry.hpa + (address & entry.size - 1 & -PAGE)
    return Translation(frame, writable, executable, readable)
