"""Nested paging: one table a machine, GPA → HPA; the guest's own tables are the guest's business.

::

    EPT violation at a GPA ──┬─ memory, and the slot lets it:  map its page, the largest that fits: RETRY
                             └─ no memory, or ROM written:     EMULATE (MMIO)

The guest loads CR3, changes its tables and takes its page faults without us. We pay once per page of
the machine, and the processor pays per TLB miss: a walk in two dimensions.

The same tables in two shapes: EPT (SDM vol. 3C §28.2.2) and NPT (APM vol. 2 §15.25), which is ordinary
4-level tables whose every access counts as a user's.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Access, PageFault, Secondary
from hostel.soft.state import CpuState

from .guest_map import GuestMap, Slot
from .nested import (
    EPTP_ACCESSED_DIRTY,
    EPTP_FOUR_LEVELS,
    EPTP_WRITE_BACK,
    EXECUTE,
    FINAL,
    READ,
    RIGHTS,
    WRITE,
    WRITE_BACK,
)
from .tree import PAGE_SHIFTS, TableTree
from .virtualizer import (
    RETRY,
    Do,
    Flush,
    FlushQueue,
    PagingStatistics,
    Registers,
    Scope,
    Setup,
    Verdict,
)
from .walk import PRESENT, USER, WRITABLE, asked, mark, walk


class _Shape(NamedTuple):
    """Bits of entries, but for the address and "large" (bit 7 in both)."""

    present: int
    """Any of these."""
    table: int
    page: int
    read_only: int


_EPT = _Shape(RIGHTS, RIGHTS, RIGHTS | WRITE_BACK, READ | EXECUTE | WRITE_BACK)
_NPT = _Shape(PRESENT, PRESENT | WRITABLE | USER, PRESENT | WRITABLE | USER, PRESENT | USER)


class EptPaging:
    """Of one machine. Implements ``MemoryVirtualizer``."""

    def __init__(
        self,
        physical: PhysicalMemory,
        guest_map: GuestMap,
        *,
        npt: bool = False,
        accessed_dirty: bool = False,
        large_pages: bool = True,
    ) -> None:
        self.physical = physical
        self.guest_map = guest_map
        self.statistics = PagingStatistics()
        self._shape = _NPT if npt else _EPT
        self._tree = TableTree(physical, present=self._shape.present, table=self._shape.table)
        self.root = self._tree.root
        self.statistics.frames = self._tree.frames
        self.vcpus: list[EptVcpu] = []
        self._page_shifts = PAGE_SHIFTS if large_pages else (12,)
        attributes = EPTP_WRITE_BACK | EPTP_FOUR_LEVELS | EPTP_ACCESSED_DIRTY * accessed_dirty
        self.pointer = self.root if npt else self.root | attributes
        guest_map.on_remove.append(self._forget)

    def vcpu(self) -> EptVcpu:
        vcpu = EptVcpu(self)
        self.vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        self.guest_map.on_remove.remove(self._forget)
        self._tree.free()
        self.statistics.frames = 0
        self.vcpus.clear()

    # --- Tables ---

    def fill(self, gpa: int, slot: Slot) -> None:
        """Map the page of a GPA, as large as the slot, the alignment and what is there let it be."""
        bits = self._shape.read_only if slot.read_only else self._shape.page
        shift = next(shift for shift in self._page_shifts if _fits(slot, gpa, 1 << shift))
        if self._tree.place(gpa, gpa - slot.gpa + slot.hpa, bits, shift):  # else another vCPU did
            self.statistics.fills += 1
            self.statistics.frames = self._tree.frames

    def _forget(self, slot: Slot) -> None:
        """The slot is gone: no entry may lead to it, no TLB may hold one that did. Pages never cross a
        slot's ends."""
        self.statistics.zapped += self._tree.clear(slot.gpa, slot.end)
        self.statistics.frames = self._tree.frames
        for vcpu in self.vcpus:
            vcpu.flushes.all(Scope.EPT)


def _fits(slot: Slot, gpa: int, size: int) -> bool:
    start = gpa & -size
    return slot.gpa <= start and start + size <= slot.end and (slot.hpa - slot.gpa) & size - 1 == 0


class EptVcpu:
    """Implements ``VcpuPaging``."""

    def __init__(self, machine: EptPaging) -> None:
        self._machine = machine
        self._map = machine.guest_map
        self._statistics = machine.statistics
        self.flushes = FlushQueue()
        self.setup = Setup(secondary=Secondary.EPT, ept_pointer=machine.pointer)

    def guest(self, state: CpuState) -> Registers:
        return Registers(state.cr0, state.cr3, state.cr4, state.efer)

    def load(self, wanted: Registers) -> Registers:
        """As the guest wants. A VM entry with a VPID forgets nothing by itself, so we say what to."""
        self._statistics.cr3_loads += 1
        self.flushes.all(Scope.CONTEXT)
        return wanted.settled()

    def on_page_fault(self, state: CpuState, address: int, code: int) -> Verdict:
        """Not asked for by ``setup``; whoever intercepts #PF for his own ends reflects it."""
        self._statistics.page_faults += 1
        self._statistics.reflected += 1
        return Verdict(Do.REFLECT, code=code)

    def on_ept_violation(
        self, state: CpuState, gpa: int, qualification: int, linear: int
    ) -> Verdict:
        self._statistics.violations += 1
        slot = self._map.find(gpa)
        if slot is not None and not (slot.read_only and qualification & WRITE):
            self._machine.fill(gpa, slot)
            return RETRY
        if not qualification & FINAL and (code := self._fetch_fault(state, linear)) is not None:
            self._statistics.reflected += 1
            return Verdict(Do.REFLECT, code=code)
        self._statistics.emulated += 1
        return Verdict(Do.EMULATE, gpa)

    def _fetch_fault(self, state: CpuState, linear: int) -> int | None:
        """A table of the guest's leads to no memory. Where the instruction itself is behind it there is
        nothing to emulate: reading all ones from there, the fetch faults."""
        start = state.cs.base + state.rip
        if not start <= linear < start + 15:
            return None
        try:
            self.translate(state, linear, Access.FETCH, state.cpl == 3)
        except PageFault as fault:
            return fault.code
        return None

    def on_invlpg(self, address: int) -> None:
        """Not asked for by ``setup``; but if it exits it must do what it does."""
        self._statistics.invlpgs += 1
        self.flushes.address(address)

    def translate(self, state: CpuState, address: int, access: Access, user: bool) -> int:
        page = walk(self._map, state, address, asked(state, access, user))
        mark(self._map, page, access)
        return page.address

    def wrote(self, gpa: int, size: int) -> None:
        """Nothing is made from the guest's tables."""

    def take_flush(self) -> Flush | None:
        return self.flushes.take()

    def close(self) -> None:
        self._machine.vcpus.remove(self)
