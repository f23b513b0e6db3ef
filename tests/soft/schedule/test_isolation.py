"""What one machine must never see of another, tried on the bare VMX steps: translations, memory, state.

Each guest is a few bytes of 64-bit code with page tables of its own. Where the processor leaves something
to the hypervisor (a VPID used anew, a vCPU that comes back to a pCPU), the test shows both: that it does
go wrong without the step, and that the step mends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from struct import pack

import pytest

from hostel.memory import GuestMemory
from hostel.soft.core.translate import TranslatingCore
from hostel.soft.paging.ept import EptPaging
from hostel.soft.paging.guest_map import GuestMap
from hostel.soft.paging.mmu import PagingMmu
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Primary, Reason, Secondary, VmExit
from hostel.soft.state import CR4_VMXE, RAX, RBX
from hostel.soft.vmx.capabilities import REVISION
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.operation import Package
from hostel.soft.vmx.results import VmxMisuse
from soft.vmx.vmx_world import GOOD

SIZE = 2 << 20
PML4, PDPT, DIRECTORY, TABLE, CODE, OLD, NEW = range(0x1000, 0x8000, 0x1000)
"""Pages of the guest's memory."""
WINDOW = 0x40_0000
"""A linear address: what it shows is the table's only entry to say. The rest is mapped as it is."""
READ, REMAP = CODE, CODE + 0x100
PROGRAMS = {
    READ: "8b042500004000 f4",  # mov eax, [WINDOW]; hlt
    REMAP: "48891c2500400000 0f013c2500004000 f4",  # mov [TABLE], rbx; invlpg [WINDOW]; hlt
}
PRESENT, LARGE = 3, 0x83


class Tiny:
    """A machine with one vCPU. With EPT its tables hold guest-physical addresses; without, as a shadow's do,
    host-physical ones."""

    def __init__(
        self, physical: PhysicalMemory, undo: ExitStack, secret: int, vpid: int, *, ept: bool = True
    ) -> None:
        self.memory = undo.enter_context(GuestMemory(SIZE))
        self.base = physical.attach(self.memory)[0].hpa
        self.at = 0 if ept else self.base
        """Added to an address in its memory, it is one for its tables."""
        self.vpid = vpid
        self.ept = ept
        self.vmcs = physical.allocate()
        physical.write(self.vmcs, pack("<I", REVISION))
        guest_map = GuestMap(physical)
        guest_map.add(0, SIZE, self.base)
        self.paging = EptPaging(physical, guest_map)
        undo.callback(self.paging.close)
        self.vcpu = self.paging.vcpu()
        self.launched = self.written = False
        self.write_tables()
        for place, code in PROGRAMS.items():
            self.memory.write(place, bytes.fromhex(code))
        self.memory.write(OLD, pack("<I", secret))
        self.memory.write(NEW, pack("<I", secret + 1))

    def write_tables(self) -> None:
        for table, entries in {
            PML4: [self.at + PDPT | PRESENT],
            PDPT: [self.at + DIRECTORY | PRESENT],
            DIRECTORY: [self.at | LARGE, 0, self.at + TABLE | PRESENT],
            TABLE: [self.entry(OLD)],
        }.items():
            self.memory.write(table, pack(f"<{len(entries)}Q", *entries))

    def entry(self, page: int) -> int:
        return self.at + page | PRESENT

    def write_vmcs(self, cpu: PhysicalCpu) -> None:
        secondary = Secondary.VPID | (Secondary.EPT if self.ept else 0)
        fields = GOOD | {
            Field.PRIMARY_CONTROLS: GOOD[Field.PRIMARY_CONTROLS] | Primary.HLT | Primary.SECONDARY,
            Field.SECONDARY_CONTROLS: secondary,
            Field.VPID: self.vpid,
            Field.EPT_POINTER: self.vcpu.setup.ept_pointer,
            Field.GUEST_CR3: self.at + PML4,
        }
        for field, value in fields.items():
            cpu.vmwrite(field, value)

    def load(self, cpu: PhysicalCpu) -> None:
        cpu.vmptrld(self.vmcs)
        if not self.written:
            self.written = True
            self.write_vmcs(cpu)

    def leave(self, cpu: PhysicalCpu) -> None:
        cpu.vmclear(self.vmcs)
        self.launched = False

    def run(self, cpu: PhysicalCpu, program: int, rbx: int = 0) -> int:
        """EAX after the program's HLT."""
        self.load(cpu)
        cpu.state.gpr[RBX] = rbx
        cpu.vmwrite(Field.GUEST_RIP, program)
        while (out := self.enter(cpu)).reason is Reason.EPT_VIOLATION:
            self.fill(cpu, out)
        assert out.reason is Reason.HLT, out
        return cpu.state.gpr[RAX] & 0xFFFF_FFFF

    def enter(self, cpu: PhysicalCpu) -> VmExit:
        if self.launched:
            return cpu.vmresume()
        self.launched = True
        return cpu.vmlaunch()

    def fill(self, cpu: PhysicalCpu, out: VmExit) -> None:
        verdict = self.vcpu.on_ept_violation(cpu.state, out.physical, out.qualification, out.linear)
        assert verdict.do.name == "RETRY", (verdict, hex(out.physical))


@contextmanager
def processors(count: int) -> Iterator[tuple[list[PhysicalCpu], PhysicalMemory, ExitStack]]:
    with ExitStack() as undo:
        physical = undo.enter_context(PhysicalMemory(frames=256))
        package = Package(physical)
        cpus = []
        for number in range(count):
            mmu = PagingMmu(physical)
            core = TranslatingCore(physical, mmu)
            undo.callback(core.close)
            cpu = PhysicalCpu(number, package, core, mmu)
            cpu.state.cr4 |= CR4_VMXE
            region = physical.allocate()
            physical.write(region, pack("<I", REVISION))
            cpu.vmxon(region)
            cpus.append(cpu)
        yield cpus, physical, undo


A, B = 0xAAAA_0000, 0xBBBB_0000
"""What two machines keep secret."""


def test_machines_that_take_turns_see_their_own_memory_at_the_same_address() -> None:
    with processors(1) as ((cpu,), physical, undo):
        first, second = Tiny(physical, undo, A, 1), Tiny(physical, undo, B, 2)
        seen = [guest.run(cpu, READ) for _ in range(3) for guest in (first, second)]
        assert seen == [A, B] * 3


def test_a_translation_stays_under_its_tag() -> None:
    """Without a flush in between: the second turn is answered by the TLB, and rightly."""
    with processors(1) as ((cpu,), physical, undo):
        guests = Tiny(physical, undo, A, 1, ept=False), Tiny(physical, undo, B, 2, ept=False)
        assert [guest.run(cpu, READ) for guest in guests] == [A, B]
        mmu = cpu.tlb
        assert isinstance(mmu, PagingMmu)
        before = mmu.tlb.statistics.misses
        assert [guest.run(cpu, READ) for guest in guests] == [A, B]
        assert mmu.tlb.statistics.misses == before


def test_a_vpid_used_anew_shows_the_last_owners_memory_until_invvpid() -> None:
    with processors(1) as ((cpu,), physical, undo):
        victim = Tiny(physical, undo, A, 7, ept=False)
        assert victim.run(cpu, READ) == A
        victim.leave(cpu)
        thief = Tiny(physical, undo, B, 7, ept=False)
        # Its code is at the victim's address too: what it runs and what it reads is the victim's.
        assert thief.run(cpu, READ) == A
        cpu.invvpid(1, 7)
        assert thief.run(cpu, READ) == B


def test_under_ept_the_root_is_a_tag_too() -> None:
    with processors(1) as ((cpu,), physical, undo):
        victim, thief = Tiny(physical, undo, A, 7), Tiny(physical, undo, B, 7)
        assert [victim.run(cpu, READ), thief.run(cpu, READ)] == [A, B]


@pytest.mark.parametrize("ept", [True, False])
def test_a_vcpu_that_comes_back_meets_its_old_translations_until_invvpid(ept: bool) -> None:
    """On the second pCPU it changes its table and says INVLPG; the first one has heard nothing of it."""
    with processors(2) as ((first, second), physical, undo):
        guest = Tiny(physical, undo, A, 3, ept=ept)
        assert guest.run(first, READ) == A
        guest.leave(first)
        guest.run(second, REMAP, guest.entry(NEW))
        assert guest.run(second, READ) == A + 1
        guest.leave(second)
        assert guest.run(first, READ) == A
        first.invvpid(1, 3)
        assert guest.run(first, READ) == A + 1


def test_a_vmcs_cannot_be_taken_while_another_pcpu_has_it() -> None:
    with processors(2) as ((first, second), physical, undo):
        guest = Tiny(physical, undo, A, 1)
        guest.run(first, READ)
        with pytest.raises(VmxMisuse, match="active on pCPU 0"):
            second.vmptrld(guest.vmcs)
        with pytest.raises(VmxMisuse, match="active on pCPU 0"):
            second.vmclear(guest.vmcs)
        guest.leave(first)
        assert guest.run(second, READ) == A


def test_an_exit_writes_into_no_other_vmcs() -> None:
    with processors(1) as ((cpu,), physical, undo):
        first, second = Tiny(physical, undo, A, 1), Tiny(physical, undo, B, 2)
        first.run(cpu, READ)
        before = physical.read(first.vmcs, 4096)
        second.run(cpu, READ)
        assert physical.read(first.vmcs, 4096) == before


@pytest.mark.parametrize("where", [0x8000_0000, 0x1_0000_0000, 0x1_4000_0000, 0xFF_F000_0000])
def test_a_guest_whose_tables_point_to_anothers_memory_gets_a_violation(where: int) -> None:
    """Its tables hold guest-physical addresses, whatever they were meant to be: host-physical ones too."""
    with processors(1) as ((cpu,), physical, undo):
        victim, thief = Tiny(physical, undo, A, 1), Tiny(physical, undo, B, 2)
        assert victim.base in (0x1_0000_0000, 0x1_4000_0000)
        thief.run(cpu, REMAP, where + OLD & -4096 | PRESENT)
        cpu.vmwrite(Field.GUEST_RIP, READ)
        out = cpu.vmresume()
        assert out.reason is Reason.EPT_VIOLATION
        assert out.physical == where + OLD & -4096
        verdict = thief.vcpu.on_ept_violation(
            cpu.state, out.physical, out.qualification, out.linear
        )
        assert verdict.do.name == "EMULATE"  # no memory: a device's, or nobody's
        assert victim.run(cpu, READ) == A
