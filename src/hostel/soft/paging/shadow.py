"""Shadow paging: the hypervisor keeps, for each address space of the guest, a table of its own that leads
from linear addresses straight to host-physical memory; the processor walks that one only.

::

    guest CR3 ──→ guest tables (GPA)          what the guest believes; nobody's hardware reads them
                     ┊ walked by us on a #PF exit, copied entry by entry
    real CR3  ──→ shadow tables (HPA)         what the processor walks: one dimension

What exits, and what is done:

- *#PF*: walk the guest's tables as the processor would. They say no: it is the guest's own, reflect it.
  They say yes: the shadow was behind; set accessed and dirty bits in the guest's entries (no hardware
  does), fill in the path, retry.
- *A guest table is written*: shadowed tables are mapped read-only, so this is a #PF too. The table goes
  *out of sync* and becomes writable: a shadow may be as stale as a TLB may, and no longer. So no write is
  ever emulated, and a table that maps itself makes progress. One that is written again and again without
  being used is no longer taken for a table.
- *INVLPG*: entries of that address made from tables out of sync are compared again; and all that were
  made from upper levels out of sync, since INVLPG drops the paging-structure caches whole
  (SDM vol. 3A §4.10.4.1).
- *MOV to CR3* (and CR0, CR4, EFER where they bear on paging): all tables out of sync are compared and
  protected again; then the shadow of the new address space is taken, or begun.

Real registers differ from the guest's (``load``): CR0.PG and CR0.WP are always set, CR4.PAE and EFER.NXE
too, and EFER.LME is LMA. A guest that has paging off runs on an identity map, in real mode too (paged real
mode: APM vol. 2 §15.19). A 32-bit guest runs on PAE tables, which its registers do not show it.

*CR0.WP = 0.* A supervisor may then write a read-only page of a user's. The shadow has no entry that lets
the supervisor write and the user only read: it is given to the supervisor alone (W=1, U=0) until the user
comes (#PF, W=0, U=1), and so on. While it looks like a supervisor's page, SMEP would let the supervisor
execute it: so it is NX then. SMAP would let him read it with AC=0, and no bit mends that: so with SMAP such
a write is emulated instead.
"""

from __future__ import annotations

from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Access, PageFault, Primary
from hostel.soft.state import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    CpuState,
)

from .guest_map import GuestMap, Slot
from .shadow_tables import NO_SOURCE, Leaf, ShadowEntry, ShadowTables, Source, Space
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
from .walk import (
    ERROR_FETCH,
    ERROR_USER,
    ERROR_WRITE,
    GLOBAL,
    NO_EXECUTE,
    USER,
    WRITABLE,
    Asked,
    Walk,
    asked,
    format_of,
    mark,
    walk,
)

CR4_PCIDE = 1 << 17
_CR4_PAGING = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_LA57 | CR4_PCIDE
_CR4_SHADOW = CR4_SMEP | CR4_SMAP | CR4_PGE
"""These change what a shadow made from the same tables looks like, or must forget."""
_FLOOD = 3
"""Writes to a table, with no walk that used it between them, after which it is taken for plain memory."""
_PAGE_FAULT = 1 << 14
_PATH = 4
"""Frames that one fill may need."""


class ShadowPaging:
    """Of one machine. Implements ``MemoryVirtualizer``. ``quota``: frames for shadows, at most."""

    def __init__(self, physical: PhysicalMemory, guest_map: GuestMap, *, quota: int = 4096) -> None:
        self.guest_map = guest_map
        self.statistics = PagingStatistics()
        self.vcpus: list[ShadowVcpu] = []
        self.tables = ShadowTables(physical, guest_map, self.statistics, quota, self._flush)
        guest_map.on_remove.append(self._forget)

    def vcpu(self) -> ShadowVcpu:
        vcpu = ShadowVcpu(self)
        self.vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        self.guest_map.on_remove.remove(self._forget)
        for space in list(self.tables.spaces.values()):
            self.tables.drop(space)
        self.vcpus.clear()

    def _flush(self, linear: int) -> None:
        """Any processor that runs a vCPU of this machine may hold it."""
        for vcpu in self.vcpus:
            vcpu.flushes.address(linear)

    def _forget(self, slot: Slot) -> None:
        """A slot is gone. This is rare: begin again."""
        for space in self.tables.spaces.values():
            self.tables.clear(space)
        for vcpu in self.vcpus:
            vcpu.flushes.all(Scope.CONTEXT)


class ShadowVcpu:
    """Implements ``VcpuPaging``."""

    def __init__(self, machine: ShadowPaging) -> None:
        self._machine = machine
        self._map = machine.guest_map
        self._tables = machine.tables
        self._statistics = machine.statistics
        self._guest = Registers(0, 0, 0, 0)
        self.space: Space | None = None
        self.flushes = FlushQueue()
        self.setup = Setup(
            primary=Primary.CR3_LOAD | Primary.CR3_STORE | Primary.INVLPG,
            exception_bitmap=_PAGE_FAULT,
            cr0_mask=CR0_PG | CR0_WP,
            cr4_mask=_CR4_PAGING,
        )

    # --- Registers ---

    def guest(self, state: CpuState) -> Registers:
        """What the guest owns of CR0 and CR4 is in the state, the rest was told to ``load``."""
        mine, cr4_mine = self.setup.cr0_mask, self.setup.cr4_mask
        return Registers(
            self._guest.cr0 & mine | state.cr0 & ~mine,
            self._guest.cr3,
            self._guest.cr4 & cr4_mine | state.cr4 & ~cr4_mine,
            self._guest.efer,
        )

    def load(self, wanted: Registers) -> Registers:
        self._statistics.cr3_loads += 1
        before, self._guest = self._guest, wanted.settled()
        self._sync_all()
        self._switch()
        self.flushes.all(_scope(before, self._guest))
        return self._real()

    def _switch(self) -> None:
        format = format_of(self._guest)
        space = self._tables.use(_key(self._guest), format)
        space.users += 1
        self._leave()
        self.space = space

    def _leave(self) -> None:
        if self.space is not None:
            self.space.users -= 1
            self.space = None

    def _real(self) -> Registers:
        guest, space = self._guest, self.space
        assert space is not None, "load has chosen it"
        cr4 = (guest.cr4 | CR4_PAE) & ~(CR4_LA57 | CR4_PCIDE)
        if not guest.cr0 & CR0_PG:
            cr4 &= ~(CR4_SMEP | CR4_SMAP)  # the identity map is all a user's
        efer = guest.efer & ~(EFER_LME | EFER_LMA) | EFER_NXE
        if guest.efer & EFER_LMA:
            efer |= EFER_LME | EFER_LMA
        return Registers(guest.cr0 | CR0_PG | CR0_WP, space.root.frame, cr4, efer)

    # --- Page faults ---

    def on_page_fault(self, state: CpuState, address: int, code: int) -> Verdict:
        self._statistics.page_faults += 1
        access = Access.READ
        if code & ERROR_WRITE:
            access = Access.WRITE
        elif code & ERROR_FETCH:
            access = Access.FETCH
        ask = asked(state, access, bool(code & ERROR_USER))
        try:
            page = walk(self._map, self._guest, address, ask)
        except PageFault as fault:
            self._statistics.reflected += 1
            return Verdict(Do.REFLECT, code=fault.code)
        slot = self._map.find(page.address)
        write = access is Access.WRITE
        if slot is None or (write and (slot.read_only or self._must_emulate(page, ask))):
            self._statistics.emulated += 1
            return Verdict(Do.EMULATE, page.address)
        marked = mark(self._map, page, access)
        self._fill(address, marked, slot, ask)
        self._notice(page, marked)
        return RETRY

    def _notice(self, before: Walk, now: Walk) -> None:
        """Accessed and dirty bits change nothing of what an entry means; but where it is a PDPTE as well,
        they make it malformed. Shadows may be behind that as a TLB would be: until the next flush."""
        for old, new in zip(before.steps, now.steps, strict=True):
            if old is not new:
                self._tables.suspect(new.address >> 12)

    def _must_emulate(self, page: Walk, ask: Asked) -> bool:
        """A write that only CR0.WP=0 permits, to a user's page, under SMAP: see above."""
        return self._borrows(page, ask) and bool(self._guest.cr4 & CR4_SMAP)

    def _borrows(self, page: Walk, ask: Asked) -> bool:
        """A supervisor writes a user's read-only page."""
        return ask.access is Access.WRITE and page.user and not page.writable

    def _fill(self, address: int, page: Walk, slot: Slot, ask: Asked) -> None:
        self._tables.make_room(_PATH)
        if ask.access is Access.WRITE:
            self._break_flood(page.address >> 12)
        sources = _sources(page)
        self._tables.shadow_tables_of(sources.values())
        assert self.space is not None, "a guest that runs has loaded CR3"
        node = self.space.root
        level = self._leaf_level(page, slot)
        while node.level > level:
            node = self._tables.set_table(node, address, sources.get(node.level, NO_SOURCE))
        leaf = Leaf(page.address, self._bits(page, ask), ask.access is Access.WRITE)
        self._tables.set_page(node, address, sources.get(node.level, NO_SOURCE), leaf)

    def _leaf_level(self, page: Walk, slot: Slot) -> int:
        """Pages of 2 MiB where the guest's are as large, the memory is in one piece and none of it is
        a guest table; 1 GiB pages are made of such."""
        start = page.address & -(1 << 21)
        large = (
            (page.format is None or page.size >= 1 << 21)
            and slot.gpa <= start
            and start + (1 << 21) <= slot.end
            and not (slot.hpa - slot.gpa) & (1 << 21) - 1
            and not self._tables.has_tables_in(start)
        )
        return 2 if large else 1

    def _bits(self, page: Walk, ask: Asked) -> int:
        """Rights of the leaf. Writable only once the guest's dirty bit is set, so that we learn of it."""
        slot = self._map.find(page.address)
        read_only = slot is None or slot.read_only
        if page.format is None:
            return USER if read_only else USER | WRITABLE
        borrowed = self._borrows(page, ask)
        no_supervisor_fetch = borrowed and self._guest.cr4 & CR4_SMEP
        bits = 0 if page.executable and not no_supervisor_fetch else NO_EXECUTE
        if page.user and not borrowed:
            bits |= USER
        writable = page.writable or borrowed or not (page.user or self._guest.cr0 & CR0_WP)
        if writable and page.dirty and not read_only:
            bits |= WRITABLE
        if page.is_global and self._guest.cr4 & CR4_PGE:
            bits |= GLOBAL
        return bits

    def _break_flood(self, page: int) -> None:
        table = self._tables.tables.get(page)
        if table is not None and table.writes >= _FLOOD:
            for entry in list(table.entries):
                if entry in table.entries:
                    self._tables.zap(entry)

    # --- Staying in step with the guest's tables ---

    def on_invlpg(self, address: int) -> None:
        self._statistics.invlpgs += 1
        self.flushes.address(address)
        assert self.space is not None, "a guest that runs has loaded CR3"
        for entry in self._tables.path(self.space, address):
            if not self._behind(entry):
                continue
            self._statistics.syncs += 1
            if self._tables.sync_entry(entry):
                break  # those below went with it
        for table in list(self._tables.unsynced.values()):
            if any(entry.child is not None for entry in table.entries):
                self._tables.sync(table)

    def _behind(self, entry: ShadowEntry) -> bool:
        return entry.source is not None and entry.source >> 12 in self._tables.unsynced

    def _sync_all(self) -> None:
        for table in list(self._tables.unsynced.values()):
            self._tables.sync(table)
            if table.entries:
                self._tables.protect(table)

    def wrote(self, gpa: int, size: int) -> None:
        for page in range(gpa >> 12, (gpa + size - 1 >> 12) + 1):
            table = self._tables.tables.get(page)
            if table is not None and page not in self._tables.unsynced:
                self._tables.sync(table)

    # --- The rest of the contract ---

    def on_ept_violation(
        self, state: CpuState, gpa: int, qualification: int, linear: int
    ) -> Verdict:
        raise AssertionError("there is no EPT to violate")

    def translate(self, state: CpuState, address: int, access: Access, user: bool) -> int:
        page = walk(self._map, self._guest, address, asked(state, access, user))
        self._notice(page, mark(self._map, page, access))
        return page.address

    def take_flush(self) -> Flush | None:
        return self.flushes.take()

    def close(self) -> None:
        self._leave()
        self._machine.vcpus.remove(self)


def _key(guest: Registers) -> tuple[int, ...]:
    """What tells one shadow from another."""
    format = format_of(guest)
    if format is None:
        return ()
    return (
        guest.cr3 & format.root,
        format.entry,
        len(format.levels),
        guest.cr0 & CR0_WP,
        guest.cr4 & (_CR4_SHADOW | CR4_PSE),
        guest.efer & EFER_NXE,
    )


def _scope(before: Registers, after: Registers) -> Scope:
    """A MOV to CR3 spares global pages; a change of the other registers nothing."""
    same = _key(before)[1:] == _key(after)[1:]
    return Scope.RETAIN_GLOBALS if same else Scope.CONTEXT


def _sources(page: Walk) -> dict[int, Source]:
    """Level in the shadow → the guest entry it is made from."""
    if page.format is None:
        return {}
    found = {}
    for step, level in zip(page.steps, page.format.levels, strict=False):
        found[level.number] = Source(step.address, step.value)
    return found
