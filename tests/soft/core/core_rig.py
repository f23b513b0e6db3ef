"""A bare machine for a core: RAM, the state that a loader leaves, and the simplest ``Mmu`` that is right.

::

    with Bench("mov $1, %eax; hlt") as bench:
        assert bench.run().reason is Reason.HLT

Guest-physical memory begins at HPA ``bench.base``. The ``Mmu`` walks the guest's own tables (4-level, or
none) and adds that; pages above RAM are EPT violations. Layout: tables at 0x1000 ff., GDT at 0x4000, IDT at
0x5000, TSS at 0x6000, code at 0x8000, stacks below 0x8000 and 0x20000.
"""

from __future__ import annotations

import struct

from guests.tiny import CODE, Bits, assemble
from hostel.memory import GuestMemory
from hostel.soft.core.translate import TranslatingCore
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import (
    Access,
    Controls,
    EptFault,
    Event,
    PageFault,
    Primary,
    Reason,
    Translation,
    VmExit,
)
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RIGHTS_CODE16,
    RIGHTS_CODE32,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RSP,
    CpuState,
    Segment,
    Table,
)

PML4, PDPT, PD, GDT, IDT, TSS = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
STACK, USER_STACK, RING0_STACK, IST_STACK = 0x8000, 0x21000, 0x22000, 0x23000
CODE0, DATA0, DATA3, CODE3, CODE0_32, TSS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x30
USUAL = Primary.HLT | Primary.UNCONDITIONAL_IO | Primary.INVLPG | Primary.CR3_LOAD


class PlainMmu:
    """Guest tables, read as they are at each miss; nothing is remembered."""

    def __init__(self, memory: GuestMemory, base: int) -> None:
        self._memory = memory
        self._base = base
        self.asked: list[tuple[int, Access, bool]] = []
        self.flushes: list[int | None] = []
        self.hidden: set[int] = set()
        """Guest pages that answer with an EPT violation, as a device's would."""

    def translate(
        self, state: CpuState, controls: Controls, address: int, access: Access, user: bool
    ) -> Translation:
        self.asked.append((address, access, user))
        gpa, writable, executable = address, True, True
        if state.cr0 & CR0_PG:
            gpa, writable, executable = self._walk(state, address, access, user)
        page = gpa & ~0xFFF
        if page >= self._memory.size or page in self.hidden:
            raise EptFault(Reason.EPT_VIOLATION, 1 << access | 0x180, address, gpa)
        return Translation(self._base + page, writable, executable)

    def _walk(
        self, state: CpuState, address: int, access: Access, user: bool
    ) -> tuple[int, bool, bool]:
        table, rights, never = state.cr3 & ~0xFFF, 7, 0
        code = (access is Access.WRITE) << 1 | user << 2
        if access is Access.FETCH and state.efer & EFER_NXE:
            code |= 16
        for shift in (39, 30, 21, 12):
            entry = self._memory.read_u64(table + 8 * (address >> shift & 511))
            if not entry & 1:
                raise PageFault(address, code)
            rights, never = rights & entry, never | entry >> 63
            table = entry & 0xF_FFFF_FFFF_F000
            if shift == 12 or entry & 0x80:
                break
        writable = bool(rights & 2) or (not user and not state.cr0 & CR0_WP)
        denied = (user and not rights & 4) or (access is Access.FETCH and never)
        if denied or (access is Access.WRITE and not writable):
            raise PageFault(address, code | 1)
        low = (1 << shift) - 1
        return table & ~low | address & low, writable, not never

    def pointers(self, controls: Controls, cr3: int) -> list[int]:
        return [self._memory.read_u64((cr3 & 0xFFFF_FFE0) + 8 * n) for n in range(4)]

    def invalidate(self, controls: Controls, address: int) -> None:
        self.flushes.append(address)

    def flush(self, controls: Controls, *, keep_global: bool) -> None:
        self.flushes.append(None)


class Bench:
    """One core, one guest. A context manager."""

    def __init__(self, code: str | bytes = b"", *, bits: Bits = 64, size: int = 4 << 20) -> None:
        self.memory = GuestMemory(size)
        self.physical = PhysicalMemory(64)
        (span,) = self.physical.attach(self.memory)
        self.base = span.hpa
        self.mmu = PlainMmu(self.memory, self.base)
        self.core = TranslatingCore(self.physical, self.mmu)
        self.controls = Controls(primary=USUAL)
        self.bits: Bits = bits
        self.state = start_state(bits)
        self._tables()
        if code:
            self.load(code)

    def load(self, code: str | bytes, at: int = CODE, bits: Bits | None = None) -> None:
        if isinstance(code, str):
            code = assemble(code, bits=bits or self.bits, org=at)
        self.memory.write(at, code)
        self.core.wrote(self.base + at, len(code))

    def run(self, event: Event | None = None) -> VmExit:
        return self.core.enter(self.state, self.controls, event)

    def skip(self, exit: VmExit) -> None:
        self.state.rip += exit.length

    def handlers(
        self, code: str, *vectors: int, at: int = 0x9000, ist: int = 0, dpl: int = 0
    ) -> None:
        """The same 64-bit handler for these vectors."""
        self.load(code, at)
        for vector in vectors:
            gate = struct.pack("<HHBBHII", at, CODE0, ist, 0x8E | dpl << 5, 0, 0, 0)
            self.memory.write(IDT + 16 * vector, gate)

    def to_ring3(self, rip: int) -> None:
        self.state.cs = Segment(CODE3, 0, 0xFFFF_FFFF, RIGHTS_CODE64 | 0x60)
        self.state.ss = Segment(DATA3, 0, 0xFFFF_FFFF, RIGHTS_DATA32 | 0x60)
        self.state.rip, self.state.gpr[RSP] = rip, USER_STACK

    def _tables(self) -> None:
        if self.bits == 16:
            return
        memory = self.memory
        memory.write_u64(PML4, PDPT | 7)
        memory.write_u64(PDPT, PD | 7)
        for index in range(512):
            memory.write_u64(PD + 8 * index, index << 21 | 0x87)
        gdt = (
            0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF,
            0x00CF9B000000FFFF, 0x0000_8B00_0000_0067 | TSS << 16, 0,
        )  # fmt: skip
        for index, entry in enumerate(gdt):
            memory.write_u64(GDT + 8 * index, entry)
        memory.write_u64(TSS + 4, RING0_STACK)
        memory.write_u64(TSS + 36, IST_STACK)
        memory.write_u16(TSS + 0x66, 0x68)  # no I/O permission map

    def close(self) -> None:
        self.core.close()
        self.physical.close()
        self.memory.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_state(bits: Bits) -> CpuState:
    """About to execute ``CODE``: real mode with all segments at 0, flat 32 bits, or long mode."""
    state = CpuState(rip=CODE, rflags=2)
    state.gpr[RSP] = STACK
    if bits == 16:
        state.cs = Segment(0, 0, 0xFFFF, RIGHTS_CODE16)
        state.idtr = Table(0, 0x3FF)
        return state
    state.cr0 |= CR0_PE
    rights = RIGHTS_CODE64 if bits == 64 else RIGHTS_CODE32
    state.cs = Segment(CODE0 if bits == 64 else CODE0_32, 0, 0xFFFF_FFFF, rights)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(DATA0, 0, 0xFFFF_FFFF, RIGHTS_DATA32))
    state.gdtr, state.idtr = Table(GDT, 0x3F), Table(IDT, 0xFFF)
    state.tr = Segment(TSS_SELECTOR, TSS, 0x67, 0x8B)
    if bits == 64:
        state.cr0 |= CR0_PG | CR0_WP
        state.cr3, state.cr4 = PML4, CR4_PAE | CR4_OSFXSR
        state.efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE
    return state
