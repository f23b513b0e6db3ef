"""A guest of machine code on the core by intercept: memory, EPT or none, and a state to start from."""

from __future__ import annotations

from types import TracebackType

from guests.tiny import Bits, assemble
from hostel.memory import GuestMemory
from hostel.soft.core.svm import SvmCore
from hostel.soft.paging.nested import EPTP_FOUR_LEVELS, EPTP_WRITE_BACK, WRITE_BACK
from hostel.soft.paging.tree import LARGE_PAGE
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Controls, Event, Primary, Secondary, VmExit
from hostel.soft.state import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RIGHTS_CODE16,
    RIGHTS_CODE32,
    RIGHTS_CODE64,
    RIGHTS_DATA16,
    RIGHTS_DATA32,
    RSP,
    CpuState,
    Segment,
    Table,
)

CODE, STACK, GDT, IDT, TSS = 0x8000, 0x7000, 0x4000, 0x5000, 0x4800
HANDLERS = 0xA000
"""The handler of vector n is at ``HANDLERS + 64 n``."""
_LIMIT = 0xFFFF_FFFF
_RIGHTS = {
    16: (RIGHTS_CODE16, RIGHTS_DATA16),
    32: (RIGHTS_CODE32, RIGHTS_DATA32),
    64: (RIGHTS_CODE64, RIGHTS_DATA32),
}
SIZE = 16 << 20
STANDARD = int(Primary.HLT | Primary.UNCONDITIONAL_IO | Primary.SECONDARY)


class SvmGuest:
    """64- and 32-bit guests see their memory one to one; the first 2 MiB are pages of 4 KiB."""

    def __init__(self, source: str, *, bits: Bits = 64, ept: bool = True) -> None:
        self.physical = PhysicalMemory()
        self.memory = GuestMemory(SIZE)
        (span,) = self.physical.attach(self.memory)
        self.hpa = span.hpa
        self.controls = Controls(primary=STANDARD)
        self._base = 0 if ept else self.hpa
        if ept:
            self.controls.secondary = int(Secondary.EPT | Secondary.UNRESTRICTED_GUEST)
            self.controls.ept_pointer = self._ept()
        self.core = SvmCore(self.physical)
        self.state = _state(bits, self._base)
        if bits != 16:
            self._tables()
        self.memory.write(CODE, assemble(source, bits=bits))

    def _ept(self) -> int:
        """4 KiB pages, so that a test can take one away."""
        take, write = self.physical.allocate, self.physical.write_u64
        root, pdpt, pd = take(), take(), take()
        write(root, pdpt | 7)
        write(pdpt, pd | 7)
        self.leaves = take()
        write(pd, self.leaves | 7)
        for page in range(512):
            write(self.leaves + 8 * page, self.hpa + page * 4096 | 7 | WRITE_BACK)
        for large in range(1, SIZE >> 21):
            write(pd + 8 * large, self.hpa + (large << 21) | 7 | WRITE_BACK | LARGE_PAGE)
        return root | EPTP_FOUR_LEVELS | EPTP_WRITE_BACK

    def _tables(self) -> None:
        """Page tables (a PDPT first: a 32-bit guest is PAE), GDT, TSS."""
        write, base = self.memory.write_u64, self._base
        write(0x1000, base + 0x2000 | 7)
        write(0x2000, base + 0x3000 | (7 if self.state.long_mode else 1))
        write(0x3000, base + 0x6000 | 7)
        for page in range(512):
            write(0x6000 + 8 * page, base + page * 4096 | 7)
        for large in range(1, SIZE >> 21):
            write(0x3000 + 8 * large, base + (large << 21) | 0x87)
        code = 0x00AF_9B00_0000_FFFF if self.state.long_mode else 0x00CF_9B00_0000_FFFF
        data, ring3 = 0x00CF_9300_0000_FFFF, 3 << 45
        for at, value in enumerate((0, code, data, data | ring3, code | ring3)):
            write(GDT + 8 * at, value)
        write(TSS + 4, STACK - 0x800)

    def gate(self, vector: int, source: str, *, dpl: int = 0, ist: int = 0) -> None:
        """Handle a vector by this code, through a 64-bit interrupt gate."""
        at = HANDLERS + 64 * vector
        self.memory.write(at, assemble(source, bits=64, org=at))
        low = at & 0xFFFF | 8 << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | at >> 16 << 48
        self.memory.write_u64(IDT + 16 * vector, low)
        self.memory.write_u64(IDT + 16 * vector + 8, 0)

    def ist(self, index: int, stack: int) -> None:
        self.memory.write_u64(TSS + 0x1C + 8 * index, stack)

    def run(self, event: Event | None = None) -> VmExit:
        return self.core.enter(self.state, self.controls, event)

    def skip(self, exit: VmExit) -> None:
        self.state.rip += exit.length

    def __enter__(self) -> SvmGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.core.close()
        self.memory.close()
        self.physical.close()


def _state(bits: int, base: int) -> CpuState:
    state = CpuState(rip=CODE)
    code, data = _RIGHTS[bits]
    if bits == 16:
        state.cs = Segment(0, 0, 0xFFFF, code)
    else:
        state.cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_ET
        state.cr4 = CR4_PAE
        state.cr3 = base + (0x1000 if bits == 64 else 0x2000)
        state.efer = EFER_LME | EFER_LMA if bits == 64 else 0
        state.cs = Segment(8, 0, _LIMIT, code)
        for name in ("ds", "es", "ss", "fs", "gs"):
            setattr(state, name, Segment(16, 0, _LIMIT, data))
        state.tr = Segment(0x30, TSS, 0x67, 0x8B)
        state.gdtr, state.idtr = Table(GDT, 0x37), Table(IDT, 0xFFF)
    state.gpr[RSP] = STACK
    return state
