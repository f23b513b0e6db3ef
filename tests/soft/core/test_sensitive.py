"""Sensitive instructions: what exits, with which qualification, and what is done without an exit."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.silicon import Event, EventType, Pin, Primary, Reason, Secondary
from hostel.soft.state import (
    BLOCKED_BY_NMI,
    BLOCKED_BY_STI,
    CR0_TS,
    CR0_WP,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC_AUX,
    R11,
    RAX,
    RBX,
    RCX,
    RDI,
    RDX,
    RFLAGS_IF,
    RSP,
)
from soft.core.core_rig import CODE3, IDT, PD, USER_STACK, Bench

IN, STRING, REPEATED, IMMEDIATE = 8, 16, 32, 64
NARROW = (MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_TSC_AUX)
REFUSED = "mov $0x800000, %edx; wrmsr; xor %ebx, %ebx; hlt"
"""Bit 55: not canonical; reserved in TSC_AUX."""


@pytest.mark.parametrize(
    ("code", "reason", "length"),
    [
        ("cpuid", Reason.CPUID, 2),
        ("vmcall", Reason.VMCALL, 3),
        ("vmlaunch", Reason.VMLAUNCH, 3),
        ("vmxoff", Reason.VMXOFF, 3),
        ("vmread %rax, %rbx", Reason.VMREAD, 3),
        ("vmptrld (%rbx)", Reason.VMPTRLD, 3),
        ("invd", Reason.INVD, 2),
        ("rdmsr", Reason.RDMSR, 2),
        ("wrmsr", Reason.WRMSR, 2),
        ("hlt", Reason.HLT, 1),
        ("invlpg (%rbx)", Reason.INVLPG, 3),
    ],
)
def test_what_exits(code: str, reason: Reason, length: int) -> None:
    with Bench(code) as bench:
        exit = bench.run()
        assert (exit.reason, exit.length, bench.state.rip) == (reason, length, 0x8000)


@pytest.mark.parametrize(
    ("code", "qualification"),
    [
        ("in $0x60, %al", 0x60 << 16 | IMMEDIATE | IN),
        ("in %dx, %ax", 0x1234 << 16 | IN | 1),
        ("out %eax, %dx", 0x1234 << 16 | 3),
        ("rep insb", 0x1234 << 16 | IN | STRING | REPEATED),
        ("outsl", 0x1234 << 16 | STRING | 3),
    ],
)
def test_ports(code: str, qualification: int) -> None:
    with Bench(code) as bench:
        gpr = bench.state.gpr
        gpr[RDX], gpr[RCX], gpr[RDI] = 0x1234, 5, 0x20000
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.IO, qualification)
        if code == "rep insb":
            assert exit.linear == 0x20000


def test_a_repeated_string_of_none_does_nothing() -> None:
    with Bench("rep outsb; hlt") as bench:
        assert bench.run().reason is Reason.HLT


def test_the_io_bitmap_says_which_ports() -> None:
    with Bench("in $0x70, %al; in $0x71, %al; hlt") as bench:
        bitmap = bench.physical.allocate()
        bench.physical.write(bitmap + 0x71 // 8, bytes([1 << 1]))
        bench.controls.primary = Primary.HLT | Primary.IO_BITMAPS
        bench.controls.io_bitmap_a = bench.controls.io_bitmap_b = bitmap
        exit = bench.run()
        assert (exit.reason, exit.qualification >> 16, bench.state.gpr[RAX]) == (
            Reason.IO,
            0x71,
            0xFF,
        )


def test_ring_3_needs_the_tss_bitmap_for_a_port() -> None:
    with Bench("in $0x70, %al; hlt") as bench:
        bench.handlers("mov $13, %ebx; hlt", 13)
        bench.to_ring3(0x8000)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 13


def test_control_registers_are_masked_and_shadowed() -> None:
    with Bench("mov %cr0, %rax; mov %rax, %rbx; btr $16, %rbx; mov %rbx, %cr0; hlt") as bench:
        bench.controls.cr0_mask, bench.controls.cr0_shadow = CR0_WP, 0
        assert bench.run().reason is Reason.HLT
        assert not bench.state.gpr[RAX] & CR0_WP, "the guest reads the shadow"
        assert bench.state.cr0 & CR0_WP, "and cannot change what is not its own"


def test_a_masked_bit_that_differs_exits() -> None:
    with Bench("mov %cr0, %rax; bts $16, %rax; mov %rax, %cr0") as bench:
        bench.controls.cr0_mask, bench.controls.cr0_shadow = CR0_WP, 0
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.CR_ACCESS, 0)


def test_cr3_loads_exit_unless_the_value_is_a_target() -> None:
    with Bench("mov %rbx, %cr3; hlt") as bench:
        bench.state.gpr[RBX] = bench.state.cr3
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.CR_ACCESS, 3 | RBX << 8)
        bench.controls.cr3_targets = (bench.state.cr3,)
        assert bench.run().reason is Reason.HLT
        assert bench.mmu.flushes == [None]


def test_clts_and_lmsw() -> None:
    with Bench("clts; hlt") as bench:
        bench.state.cr0 |= CR0_TS
        assert bench.run().reason is Reason.HLT
        assert not bench.state.cr0 & CR0_TS
    with Bench("mov $8, %eax; lmsw %ax; hlt") as bench:
        bench.controls.cr0_mask = CR0_TS
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.CR_ACCESS, 8 << 16 | 3 << 4)


def test_invlpg_without_an_exit_reaches_the_mmu() -> None:
    with Bench("invlpg 0x123(%rbx); hlt") as bench:
        bench.controls.primary &= ~Primary.INVLPG
        bench.state.gpr[RBX] = 0x20000
        assert bench.run().reason is Reason.HLT
        assert bench.mmu.flushes == [0x20123]


def test_the_msr_bitmap() -> None:
    with Bench("mov $0xc0000082, %ecx; mov $0x1234, %eax; wrmsr; rdmsr; hlt") as bench:
        bitmap = bench.physical.allocate()
        bench.controls.primary |= Primary.MSR_BITMAPS
        bench.controls.msr_bitmap = bitmap
        assert bench.run().reason is Reason.HLT
        assert bench.state.msrs[MSR_LSTAR] == 0x1234
        bench.state.rip = 0x8000
        bench.physical.write(bitmap + 0x400 + 0x82 // 8, bytes([1 << 2]))
        assert bench.run().reason is Reason.RDMSR


@pytest.mark.parametrize("index", NARROW)
def test_an_msr_refuses_what_it_cannot_hold(index: int) -> None:
    with Bench(f"mov ${index:#x}, %ecx; xor %eax, %eax; {REFUSED}") as bench:
        bench.controls.primary |= Primary.MSR_BITMAPS
        bench.controls.msr_bitmap = bench.physical.allocate()
        bench.handlers("mov $13, %ebx; hlt", 13)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 13
        assert not bench.state.msrs.get(index)


def test_time_is_instructions_and_an_offset() -> None:
    with Bench("rdtsc; mov %eax, %ebx; nop; nop; rdtsc; hlt") as bench:
        bench.controls.primary |= Primary.TSC_OFFSETTING
        bench.controls.tsc_offset = 1000
        assert bench.run().reason is Reason.HLT
        assert (bench.state.gpr[RBX], bench.state.gpr[RAX]) == (1000, 1004)


def test_privilege_comes_before_the_exit() -> None:
    with Bench("invd") as bench:
        bench.handlers("mov $13, %ebx; hlt", 13)
        bench.to_ring3(0x8000)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 13


def test_cpuid_exits_in_ring_3_too() -> None:
    with Bench("cpuid") as bench:
        bench.to_ring3(0x8000)
        exit = bench.run()
        assert (exit.reason, bench.state.cpl) == (Reason.CPUID, 3)


def test_a_system_call_and_its_return() -> None:
    with Bench("syscall; cpuid") as bench:
        bench.load("mov %rcx, %rbx; swapgs; sysretq", at=0xA000)
        bench.state.msrs = {
            MSR_STAR: 0x10 << 48 | 8 << 32,
            MSR_LSTAR: 0xA000,
            MSR_SFMASK: RFLAGS_IF,
            MSR_KERNEL_GS_BASE: 0x5555,
        }
        bench.state.rflags |= RFLAGS_IF
        bench.to_ring3(0x8000)
        assert bench.run().reason is Reason.CPUID
        state = bench.state
        assert (state.rip, state.cpl, state.cs.selector) == (0x8002, 3, CODE3)
        assert (state.gpr[RBX], state.gs.base, state.gpr[RSP]) == (0x8002, 0x5555, USER_STACK)
        assert state.gpr[R11] & RFLAGS_IF
        assert state.rflags & RFLAGS_IF


def test_a_software_interrupt_and_iret_between_rings() -> None:
    with Bench("int $0x80; cpuid") as bench:
        bench.handlers("mov %cs, %ebx; iretq", 0x80, dpl=3)
        bench.to_ring3(0x8000)
        assert bench.run().reason is Reason.CPUID
        assert (bench.state.cpl, bench.state.gpr[RBX], bench.state.rip) == (3, 8, 0x8002)


def test_int3_belongs_to_the_guest_and_to_the_bitmap() -> None:
    with Bench("int3; hlt") as bench:
        bench.handlers("mov (%rsp), %rbx; iretq", 3)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 0x8001
        bench.state.rip, bench.controls.exception_bitmap = 0x8000, 1 << 3
        exit = bench.run()
        assert (exit.reason, exit.length, bench.state.rip) == (Reason.EXCEPTION_NMI, 1, 0x8000)
        assert exit.interruption == Event(3, EventType.SOFTWARE_EXCEPTION, None, 1)


def test_a_page_fault_exits_by_mask_and_match() -> None:
    with Bench("mov 0x40000000, %eax") as bench:
        bench.controls.exception_bitmap = 1 << 14
        bench.controls.pf_mask, bench.controls.pf_match = 2, 2
        bench.handlers("hlt", 14)
        assert bench.run().reason is Reason.HLT, "a read does not match"
        bench.state.rip, bench.controls.pf_match = 0x8000, 0
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, 0x4000_0000)
        assert bench.state.cr2 == 0x4000_0000, "as the first fault left it"


def test_a_page_fault_within_one_leaves_its_address() -> None:
    """The #DF of both has it: CR2 is of the last one (SDM vol. 3A §6.15, interrupt 14)."""
    with Bench("mov 0x40000000, %eax") as bench:
        bench.handlers("mov %cr2, %rbx; hlt", 8)
        bench.memory.write(0x1F_FFF0, bench.memory.read(IDT + 16 * 8, 16))
        bench.state.idtr.base = (
            0x20_0000 - 16 * 9
        )  # #DF's gate is the last of its page, #PF's in the next
        bench.memory.write_u64(PD + 8, 0)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 0x20_0000 + 16 * 5


def test_ltr_of_nothing_is_a_fault() -> None:
    with Bench("mov $3, %eax; ltr %ax; hlt") as bench:
        bench.handlers("mov (%rsp), %rdx; hlt", 13)
        bench.state.gpr[RDX] = 1
        assert bench.run().reason is Reason.HLT
        assert (bench.state.rip & ~0xFFF, bench.state.gpr[RDX]) == (0x9000, 0)


def test_sti_has_a_shadow_of_one_instruction() -> None:
    with Bench("cli; sti; nop; nop; hlt") as bench:
        bench.controls.primary |= Primary.INTERRUPT_WINDOW
        assert bench.run().reason is Reason.INTERRUPT_WINDOW
        assert bench.state.rip == 0x8003, "after the instruction behind STI"


def test_an_exit_in_the_shadow_says_so() -> None:
    with Bench("sti; hlt") as bench:
        assert bench.run().reason is Reason.HLT
        assert bench.state.interruptibility == BLOCKED_BY_STI


def test_popf_and_iret_open_the_window() -> None:
    with Bench("push $0x202; popf; nop; hlt") as bench:
        bench.controls.primary |= Primary.INTERRUPT_WINDOW
        assert bench.run().reason is Reason.INTERRUPT_WINDOW
        assert bench.state.rip == 0x8006


def test_an_injected_interrupt_enters_the_handler() -> None:
    with Bench("nop; hlt") as bench:
        bench.handlers("mov $9, %ebx; iretq", 0x40)
        bench.state.rflags |= RFLAGS_IF
        assert bench.run(Event(0x40, EventType.EXTERNAL)).reason is Reason.HLT
        assert (bench.state.gpr[RBX], bench.state.rip) == (9, 0x8001)


def test_an_nmi_blocks_others_until_iret() -> None:
    with Bench("nop; hlt") as bench:
        bench.handlers("hlt; iretq", 2)
        exit = bench.run(Event(2, EventType.NMI))
        assert bench.state.interruptibility & BLOCKED_BY_NMI
        bench.skip(exit)
        bench.controls.primary |= Primary.NMI_WINDOW
        assert bench.run().reason is Reason.NMI_WINDOW
        assert bench.state.rip == 0x8000


def test_an_event_that_cannot_be_delivered_is_reported_with_the_exit() -> None:
    with Bench("nop") as bench:
        bench.handlers("hlt", 0x40)
        bench.mmu.hidden = {0x5000}
        event = Event(0x40, EventType.EXTERNAL)
        exit = bench.run(event)
        assert (exit.reason, exit.vectoring) == (Reason.EPT_VIOLATION, event)
        assert exit.linear == 0x5400


def test_a_fault_in_a_fault_is_a_double_fault() -> None:
    with Bench("ud2") as bench:
        bench.handlers("pop %rbx; hlt", 8)
        bench.state.gpr[RBX] = 1
        assert bench.run().reason is Reason.HLT
        assert (bench.state.gpr[RBX], bench.core.statistics.events_delivered) == (0, 1)


def test_single_steps_trap_after_each_instruction() -> None:
    with Bench("nop; rdtsc; inc %rcx; hlt") as bench:
        bench.handlers("inc %rbx; mov (%rsp), %rdx; iretq", 1)
        bench.state.rflags |= 0x100
        assert bench.run().reason is Reason.HLT
        gpr = bench.state.gpr
        assert (gpr[RBX], gpr[RCX], gpr[RDX]) == (3, 1, 0x8006)


def test_a_step_that_exits_leaves_dr6_alone() -> None:
    with Bench("nop; rdtsc; hlt") as bench:
        bench.state.rflags |= 0x100
        bench.controls.exception_bitmap = 1 << 1
        for rip in (0x8001, 0x8003):
            exit = bench.run()
            assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, 1 << 14)
            assert (bench.state.rip, bench.state.dr6) == (rip, 0xFFFF_0FF0)
        bench.controls.exception_bitmap = 0
        bench.state.rip = 0x8000
        bench.handlers("hlt", 1)
        bench.run()
        assert bench.state.dr6 == 0xFFFF_4FF0


def test_descriptor_tables_exit_on_demand() -> None:
    with Bench("sgdt (%rbx); lgdt (%rbx); str %eax; hlt") as bench:
        bench.state.gpr[RBX] = 0x20000
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] == 0x30
        assert bench.memory.read(0x20000, 10) == b"\x3f\0\0\x40\0\0\0\0\0\0"
        bench.state.rip = 0x8000
        bench.controls.secondary = Secondary.DESCRIPTOR_TABLE
        assert bench.run().reason is Reason.GDTR_IDTR


def test_rdtscp_is_there_when_it_is_enabled() -> None:
    with Bench("rdtscp; hlt") as bench:
        bench.handlers("mov $6, %ebx; hlt", 6)
        bench.run()
        assert bench.state.gpr[RBX] == 6
        bench.state.rip, bench.controls.secondary = 0x8000, Secondary.RDTSCP
        bench.run()
        assert bench.state.rip == 0x8003


def test_hlt_without_an_exit_waits_for_the_timer() -> None:
    with Bench("hlt") as bench:
        bench.controls.primary = 0
        bench.controls.pin, bench.controls.timer = Pin.PREEMPTION_TIMER, 1000
        assert bench.run().reason is Reason.PREEMPTION_TIMER
        assert bench.core.statistics.instructions == 1000
