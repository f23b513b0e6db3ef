"""A processor's memory unit and a hypervisor's exit loop around it: all of paging, and no instructions.

``Machine.access`` is what one access of a guest's instruction does until it is done: TLB, walk, exits to the
handlers, flushes, retries. It ends with where the access went, or with the guest's #PF.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.memory import GuestMemory
from hostel.soft.paging.ept import EptPaging
from hostel.soft.paging.guest_map import GuestMap
from hostel.soft.paging.mmu import PagingMmu
from hostel.soft.paging.shadow import ShadowPaging
from hostel.soft.paging.tlb import Invept, Invvpid
from hostel.soft.paging.virtualizer import Do, Flush, Registers, Scope, VcpuPaging
from hostel.soft.paging.walk import asked, mark, walk
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Access, Controls, EptFault, PageFault, Reason, Secondary
from hostel.soft.state import CR0_PE, CpuState

RAM = 4 << 20
"""A small machine: tables, data, and holes are near each other."""
ROM = 0xFE00_0000
EXITS = 8
"""An access that needs more exits than these makes no progress."""


class Outcome(NamedTuple):
    """Where an access went, or the error code of its #PF."""

    gpa: int = -1
    is_memory: bool = False
    """And may be accessed so: ROM is not for who writes."""
    fault: int | None = None


class Machine:
    """vCPUs that take turns on one pCPU. A context manager."""

    def __init__(self, way: str, *, ram: int = RAM, cpus: int = 1, **options: bool | int) -> None:
        self.way = way
        self.physical = PhysicalMemory(2048)
        self.memory = GuestMemory(ram)
        self.map = GuestMap(self.physical)
        (span,) = self.physical.attach(self.memory)
        self.map.add(0, ram, span.hpa)
        self.rom = self.physical.allocate()
        self.map.add(ROM, PAGE, self.rom, read_only=True)
        self.paging = _virtualizer(way, self.physical, self.map, options)
        self.mmu = PagingMmu(self.physical, tlb_size=64)
        self.cpus = [Cpu(self, vpid + 1) for vpid in range(cpus)]
        self.running = 0

    @property
    def cpu(self) -> Cpu:
        return self.cpus[self.running]

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for cpu in self.cpus:
            cpu.close()
        if self.paging is not None:
            self.paging.close()
        self.physical.free(self.rom)
        left = self.physical.frames_used
        self.physical.close()
        self.memory.close()
        assert left == 0, f"{left} frames of tables were not given back"


def _virtualizer(
    way: str, physical: PhysicalMemory, guest_map: GuestMap, options: dict[str, bool | int]
) -> EptPaging | ShadowPaging | None:
    if way == "reference":
        return None
    if way == "shadow":
        return ShadowPaging(physical, guest_map, quota=int(options.get("quota", 256)))
    return EptPaging(
        physical,
        guest_map,
        accessed_dirty=bool(options.get("accessed_dirty", False)),
        large_pages=bool(options.get("large_pages", True)),
    )


class Cpu:
    """A vCPU; of way "reference" there is none, only the plain walker on guest memory."""

    def __init__(self, machine: Machine, vpid: int) -> None:
        self.machine = machine
        self.mmu = machine.mmu
        self.state = CpuState()
        self.guest = Registers(CR0_PE, 0, 0, 0)
        self.exits = 0
        self.emulated = False
        """The last access was, by the hypervisor."""
        self.paging: VcpuPaging | None = None
        self.controls = Controls(secondary=Secondary.VPID, vpid=vpid)
        if machine.paging is not None:
            self.paging = machine.paging.vcpu()
            self.controls.secondary |= self.paging.setup.secondary
            self.controls.ept_pointer = self.paging.setup.ept_pointer
        self.load(self.guest)

    # --- What the guest does ---

    def load(self, registers: Registers) -> None:
        self.guest = registers.settled()
        real = self.guest if self.paging is None else self.paging.load(registers)
        state = self.state
        state.cr0, state.cr3, state.cr4, state.efer = real.cr0, real.cr3, real.cr4, real.efer

    def load_and_flush(self, registers: Registers) -> None:
        """As a guest does that changes CR4.PGE on the way: global pages go from the TLB too."""
        self.load(registers)
        self.mmu.flush(self.controls, keep_global=False)

    def invlpg(self, address: int) -> None:
        if self.machine.way == "shadow" and self.paging is not None:
            self.paging.on_invlpg(address)
        else:
            self.mmu.invalidate(self.controls, address)

    def access(self, address: int, access: Access = Access.READ, user: bool = False) -> Outcome:
        self.emulated = False
        self.state.rip = address if access is Access.FETCH else address + PAGE
        try:
            if self.paging is None:
                return self._refer(address, access, user)
            for _ in range(EXITS):
                outcome = self._try(address, access, user)
                if outcome is not None:
                    return outcome
        except PageFault as fault:
            return Outcome(fault=fault.code)
        raise AssertionError(f"no progress at {address:#x}")

    def store(self, at: Outcome, value: int) -> None:
        """What a store to there does, once ``access`` found the way."""
        self.machine.memory.write_u64(at.gpa, value)
        if self.emulated and self.paging is not None:
            self.paging.wrote(at.gpa, 8)

    def close(self) -> None:
        if self.paging is not None:
            self.paging.close()

    # --- How it is done ---

    def _refer(self, address: int, access: Access, user: bool) -> Outcome:
        page = walk(self.machine.map, self.guest, address, asked(self.state, access, user))
        mark(self.machine.map, page, access)
        return self._reached(page.address, access)

    def _reached(self, gpa: int, access: Access) -> Outcome:
        slot = self.machine.map.find(gpa)
        return Outcome(gpa, slot is not None and not (slot.read_only and access is Access.WRITE))

    def _try(self, address: int, access: Access, user: bool) -> Outcome | None:
        """One VM entry: done, or None after an exit that says to try again."""
        paging = self.paging
        assert paging is not None
        self._flush(paging.take_flush())
        try:
            page = self.mmu.translate(self.state, self.controls, address, access, user)
            return Outcome(self._gpa(page.frame | address & PAGE - 1), True)
        except PageFault as fault:
            if self.machine.way == "ept":
                raise
            self.exits += 1
            verdict = paging.on_page_fault(self.state, address, fault.code)
        except EptFault as fault:
            if fault.reason != Reason.EPT_VIOLATION:
                raise
            self.exits += 1
            verdict = paging.on_ept_violation(
                self.state, fault.physical, fault.qualification, fault.linear
            )
        if verdict.do is Do.REFLECT:
            return Outcome(fault=verdict.code)
        return None if verdict.do is Do.RETRY else self._emulate(address, access, user)

    def _emulate(self, address: int, access: Access, user: bool) -> Outcome:
        assert self.paging is not None
        self.emulated = True
        gpa = self.paging.translate(self.state, address, access, user)
        return self._reached(gpa, access)

    def _gpa(self, hpa: int) -> int:
        for slot in self.machine.map.slots:
            if slot.hpa <= hpa < slot.hpa + slot.size:
                return hpa - slot.hpa + slot.gpa
        raise AssertionError(f"{hpa:#x} is not this machine's memory")

    def _flush(self, flush: Flush | None) -> None:
        if flush is None:
            return
        for address in flush.addresses:
            self.mmu.invvpid(Invvpid.ADDRESS, self.controls.vpid, address)
        if flush.scope is Scope.RETAIN_GLOBALS:
            self.mmu.invvpid(Invvpid.SINGLE_RETAIN_GLOBALS, self.controls.vpid)
        elif flush.scope is Scope.CONTEXT:
            self.mmu.invvpid(Invvpid.SINGLE, self.controls.vpid)
        elif flush.scope is Scope.EPT:
            self.mmu.invept(Invept.SINGLE, self.controls.ept_pointer)
