"""Mini guests on the bare core, under EPT: the least hypervisor that can carry them, one page long.

Exceptions, system calls, control registers and MSRs are the core's own here; only ports, CPUID and EPT
violations exit. What the guests say is compared with what they say on KVM.
"""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.boot.entry import initial_regs
from hostel.boot.load import load_kernel
from hostel.memory import GuestMemory
from hostel.soft import mini
from hostel.soft.core.translate import TranslatingCore
from hostel.soft.cpuid import Cpuid, supported
from hostel.soft.paging.ept import EptPaging
from hostel.soft.paging.guest_map import GuestMap
from hostel.soft.paging.mmu import PagingMmu
from hostel.soft.paging.virtualizer import Do
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import (
    Access,
    Controls,
    Event,
    EventType,
    Pin,
    Primary,
    Reason,
    Secondary,
    VmExit,
)
from hostel.soft.state import (
    CR0_PE,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RIGHTS_CODE16,
    RIGHTS_CODE32,
    RIGHTS_DATA32,
    RSI,
    RSP,
    CpuState,
    Segment,
)

BEYOND = {
    "tasks": "a task switch is the hypervisor's to carry out",
    "fpu": "MXCSR does not collect exceptions",
    **dict.fromkeys(("mmio", "dma"), "an instruction on a device is the hypervisor's to carry out"),
}
"""What the translator under the core leaves out, and what is not a core's."""
ALONE = [name for name in mini.names() if not mini.guest(name).irqchip and name not in BEYOND]


class Carrier:
    """Entry, exit, answer; until the guest ends."""

    def __init__(self, guest: mini.Guest) -> None:
        self.memory = GuestMemory(guest.memory)
        self.physical = PhysicalMemory()
        self.map = GuestMap(self.physical)
        spans = self.physical.attach(self.memory)
        for region, span in zip(self.memory.regions, spans, strict=True):
            self.map.add(region.gpa, region.size, span.hpa)
        self.paging = EptPaging(self.physical, self.map)
        self.vcpu = self.paging.vcpu()
        self.core = TranslatingCore(self.physical, PagingMmu(self.physical))
        self.cores = [self.core]
        self.controls = Controls(
            primary=Primary.HLT
            | Primary.UNCONDITIONAL_IO
            | Primary.MSR_BITMAPS
            | Primary.SECONDARY,
            secondary=Secondary.EPT | Secondary.UNRESTRICTED_GUEST | Secondary.RDTSCP,
            msr_bitmap=self.physical.allocate(),
            ept_pointer=self.vcpu.setup.ept_pointer,
        )
        self.state = start(guest, self.memory)
        self.said = bytearray()
        self.event: Event | None = None

    def slice(self, instructions: int, cores: int) -> None:
        self.controls.pin, self.controls.timer = Pin.PREEMPTION_TIMER, instructions
        for _ in range(cores - 1):
            self.cores.append(TranslatingCore(self.physical, PagingMmu(self.physical)))

    def migrate(self) -> None:
        """To the next core, whose TLBs know nothing of what the guest did elsewhere."""
        fpu = self.core.save_fpu()
        self.core = self.cores[(self.cores.index(self.core) + 1) % len(self.cores)]
        self.core.load_fpu(fpu)
        self.core.mmu.flush(self.controls, keep_global=False)
        self.core.flush()

    def run(self) -> str:
        while True:
            event, self.event = self.event, None
            exit = self.core.enter(self.state, self.controls, event)
            if exit.reason is Reason.PREEMPTION_TIMER:
                self.migrate()
            elif ends := self.answer(exit):
                return ends

    def answer(self, exit: VmExit) -> str:
        if ends := {Reason.HLT: "halt", Reason.TRIPLE_FAULT: "shutdown"}.get(exit.reason):
            return ends
        match exit.reason:
            case Reason.EPT_VIOLATION:
                return self.violation(exit)
            case Reason.CPUID:
                gpr = self.state.gpr
                words = Cpuid(supported())(gpr[RAX], gpr[RCX], lambda: self.state.cr4)
                gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = words
            case Reason.IO:
                if ends := self.port(exit):
                    return ends
            case Reason.RDMSR | Reason.WRMSR:
                self.event = Event(13, EventType.HARDWARE_EXCEPTION, 0)
                return ""
            case _:
                return f"{exit}"
        self.state.rip += exit.length
        return ""

    def violation(self, exit: VmExit) -> str:
        verdict = self.vcpu.on_ept_violation(
            self.state, exit.physical, exit.qualification, exit.linear
        )
        return "" if verdict.do is Do.RETRY else f"{exit}"

    def port(self, exit: VmExit) -> str:
        size, port = (exit.qualification & 7) + 1, exit.qualification >> 16
        is_in, string = exit.qualification & 8, exit.qualification & 16
        count = self.state.gpr[RCX] & 0xFFFF_FFFF if exit.qualification & 32 else 1
        for _ in range(count):
            at = self.place(exit.linear) if string else 0
            if is_in:
                data = (b"\xe9" if port == 0xE9 else b"\xff") * size
                if string:
                    self.memory.write(at, data)
                else:
                    mask = 0xFFFF_FFFF if size == 4 else (1 << 8 * size) - 1
                    kept = 0 if size == 4 else self.state.gpr[RAX] & ~mask
                    self.state.gpr[RAX] = kept | int.from_bytes(data, "little")
            else:
                rax = (self.state.gpr[RAX] & 2**64 - 1).to_bytes(8, "little")
                data = self.memory.read(at, size) if string else rax[:size]
                if port == 0xE9:
                    self.said += data
                elif port == 0xF4:
                    return "exit" if data[0] == 0 else f"exit {data[0]}"
            if string:
                step = -size if self.state.rflags & 1 << 10 else size
                exit.linear += step
                self.state.gpr[RDI if is_in else RSI] += step
        if exit.qualification & 32:
            self.state.gpr[RCX] = 0
        return ""

    def place(self, linear: int) -> int:
        return self.vcpu.translate(self.state, linear, Access.WRITE, self.state.cpl == 3)

    def close(self) -> None:
        for core in self.cores:
            core.close()
        self.paging.close()
        self.physical.close()
        self.memory.close()


def start(guest: mini.Guest, memory: GuestMemory) -> CpuState:
    """As its loader leaves it: a boot sector in real mode, anything else in flat 32 bits."""
    image = mini.image(guest.name)
    state = CpuState(rflags=2)
    if guest.mode == "sector":
        memory.write(0x7C00, image.read_bytes())
        state.rip, state.cs = 0x7C00, Segment(0, 0, 0xFFFF, RIGHTS_CODE16)
        state.gpr[RSP], state.idtr.limit = 0x7C00, 0x3FF
        return state
    entry = load_kernel(memory, image)
    regs = initial_regs(entry)
    state.rip, state.gpr[RBX] = regs.rip, regs.rbx
    state.cr0 |= CR0_PE
    state.cs = Segment(8, 0, 0xFFFF_FFFF, RIGHTS_CODE32)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(state, name, Segment(16, 0, 0xFFFF_FFFF, RIGHTS_DATA32))
    return state


@pytest.mark.parametrize("name", ALONE)
def test_a_mini_guest_says_what_it_says_on_kvm(name: str) -> None:
    guest = mini.guest(name)
    carrier = Carrier(guest)
    try:
        ends = carrier.run()
        assert (carrier.said.decode("latin-1"), ends) == (guest.console, guest.ends)
    finally:
        carrier.close()


TRICKY = ("faults", "steps", "selfmod", "rings", "sector", "modes")


def instructions(carrier: Carrier) -> int:
    return sum(core.statistics.instructions for core in carrier.cores)


@pytest.mark.parametrize("name", TRICKY)
def test_cut_into_slices_on_two_cores_it_is_the_same_guest(name: str) -> None:
    """Stopped every 7 instructions, carried to the other core, and gone on there: not one more or less."""
    guest = mini.guest(name)
    whole, sliced = Carrier(guest), Carrier(guest)
    try:
        ends = whole.run()
        sliced.slice(7, cores=2)
        assert (sliced.run(), sliced.said) == (ends, whole.said)
        assert instructions(sliced) == instructions(whole)
    finally:
        whole.close()
        sliced.close()
