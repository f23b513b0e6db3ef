"""Which instructions exit, with which information, and what runs without an exit."""

from __future__ import annotations

import pytest

from hostel.soft.silicon import Event, EventType, Pin, Primary, Reason
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC_AUX,
    RAX,
    RBX,
    RCX,
    RDX,
    RFLAGS_IF,
    RSP,
)
from soft.core.svm_rig import CODE, STACK, TSS, SvmGuest

pytest.importorskip("unicorn", reason="the extra 'soft' is not installed")

NARROW = (MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_TSC_AUX)
REFUSED = "mov $0x800000, %edx; wrmsr; xor %ebx, %ebx; hlt"
"""Bit 55: not canonical; reserved in TSC_AUX."""


@pytest.mark.parametrize("ept", [True, False])
def test_instructions_that_always_exit_say_which_and_how_long(ept: bool) -> None:
    with SvmGuest("mov $7, %eax; cpuid; vmcall; hlt", ept=ept) as guest:
        seen = []
        for _ in range(3):
            exit = guest.run()
            seen.append((exit.reason, exit.length, guest.state.rip - CODE))
            guest.skip(exit)
        assert seen == [(Reason.CPUID, 2, 5), (Reason.VMCALL, 3, 7), (Reason.HLT, 1, 10)]
        assert guest.state.gpr[RAX] == 7


def test_port_io_exits_before_it_is_done() -> None:
    source = "mov $0x3f8, %dx; in %dx, %al; out %ax, $0x80; rep outsb; hlt"
    with SvmGuest(source) as guest:
        guest.state.gpr[RCX], guest.state.gpr[6] = 3, 0x9000
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.IO, 0x3F8 << 16 | 8)
        guest.skip(exit)
        exit = guest.run()
        assert exit.qualification == 0x80 << 16 | 1 << 6 | 1
        guest.skip(exit)
        exit = guest.run()
        assert exit.qualification == 0x3F8 << 16 | 1 << 5 | 1 << 4
        assert (exit.linear, exit.instruction_info >> 7 & 7) == (0x9000, 2)
        assert guest.state.gpr[RCX] == 3


def test_io_bitmaps_choose_the_ports() -> None:
    with SvmGuest("in $0x10, %al; mov $0x9000, %dx; in %dx, %eax; in $0x11, %al; hlt") as guest:
        a, b = guest.physical.allocate(), guest.physical.allocate()
        guest.physical.write(a + 2, b"\2")
        guest.controls.io_bitmap_a, guest.controls.io_bitmap_b = a, b
        guest.controls.primary |= Primary.IO_BITMAPS
        exit = guest.run()
        assert exit.qualification >> 16 == 0x11
        assert guest.state.gpr[RAX] == 0xFFFF_FFFF  # nobody is at the others


def test_ring_3_needs_permission_for_a_port() -> None:
    source = "pushq $0x1b; push $0x6000; pushfq; pushq $0x23; push $1f; iretq; 1: in $0x10, %al"
    with SvmGuest(source) as guest:
        guest.gate(13, "hlt")
        guest.memory.write_u16(TSS + 0x66, 0x68)
        assert guest.run().reason is Reason.HLT
        stack = guest.state.gpr[RSP]
        assert guest.memory.read_u64(stack) == 0
        assert guest.memory.read_u64(stack + 16) == 0x23


def test_cr_masks_and_shadows() -> None:
    source = (
        "mov %cr0, %rax; mov %cr4, %rbx; mov %cr0, %rcx; and $~8, %rcx; "
        "mov %rcx, %cr0; xor $1<<16, %rcx; mov %rcx, %cr0; hlt"
    )
    with SvmGuest(source) as guest:
        guest.controls.cr0_mask = 1 << 16
        guest.controls.cr0_shadow = 1 << 16
        guest.controls.cr4_mask, guest.controls.cr4_shadow = 1 << 13, 0
        guest.state.cr4 |= 1 << 13
        guest.state.cr0 |= 8
        exit = guest.run()
        assert (exit.reason, exit.qualification, exit.length) == (Reason.CR_ACCESS, RCX << 8, 3)
        assert guest.state.gpr[RAX] & 1 << 16
        assert not guest.state.gpr[RBX] & 1 << 13
        assert not guest.state.cr0 & (8 | 1 << 16)


def test_a_bad_cr0_is_the_guests_own_fault() -> None:
    with SvmGuest("mov %cr0, %rax; btr $0, %rax; mov %rax, %cr0; hlt") as guest:
        guest.gate(13, "mov $13, %ebx; hlt")
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 13
        assert guest.state.cr0 & (CR0_PG | CR0_PE) == CR0_PG | CR0_PE


def test_cr3_and_invlpg_exit_when_asked() -> None:
    with SvmGuest("mov %cr3, %rax; mov %rax, %cr3; invlpg 8(%rax); hlt") as guest:
        assert guest.run().reason is Reason.HLT
        guest.state.rip = CODE
        guest.controls.primary |= Primary.CR3_LOAD | Primary.INVLPG
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.CR_ACCESS, 3)
        guest.skip(exit)
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.INVLPG, 0x1008)


def test_msrs_by_bitmap() -> None:
    source = (
        "mov $0xc0000082, %ecx; mov $5, %eax; mov $1, %edx; wrmsr; xor %eax, %eax; "
        "rdmsr; mov $0x1b, %ecx; rdmsr"
    )
    with SvmGuest(source) as guest:
        bitmap = guest.physical.allocate()
        guest.physical.write(bitmap + 0x1B // 8, bytes([1 << (0x1B & 7)]))
        guest.controls.msr_bitmap = bitmap
        guest.controls.primary |= Primary.MSR_BITMAPS
        exit = guest.run()
        assert (exit.reason, exit.length, guest.state.gpr[RCX]) == (Reason.RDMSR, 2, 0x1B)
        assert guest.state.msrs[MSR_LSTAR] == 1 << 32 | 5
        assert (guest.state.gpr[RAX], guest.state.gpr[RDX]) == (5, 1)


@pytest.mark.parametrize("index", NARROW)
def test_an_msr_refuses_what_it_cannot_hold(index: int) -> None:
    with SvmGuest(f"mov ${index:#x}, %ecx; xor %eax, %eax; {REFUSED}") as guest:
        guest.controls.msr_bitmap = guest.physical.allocate()
        guest.controls.primary |= Primary.MSR_BITMAPS
        guest.controls.exception_bitmap = 1 << 13
        exit = guest.run()
        assert exit.reason is Reason.EXCEPTION_NMI
        assert exit.interruption is not None
        assert exit.interruption.vector == 13
        assert not guest.state.msrs.get(index)


def test_the_time_stamp_counter_counts_instructions() -> None:
    with SvmGuest("rdtsc; mov %eax, %ebx; nop; nop; nop; rdtsc; hlt") as guest:
        guest.run()
        assert guest.state.gpr[RAX] - guest.state.gpr[RBX] == 5


def test_syscall_and_sysret() -> None:
    source = "mov $0x6000, %esp; mov $1f, %ecx; mov $2, %r11; sysretq; 1: syscall; hlt; nop"
    with SvmGuest(source) as guest:
        guest.state.efer |= 1
        guest.state.msrs[MSR_STAR] = 0x13 << 48 | 8 << 32
        guest.state.msrs[MSR_LSTAR] = 0x9000
        guest.memory.write(0x9000, b"\xf4")
        assert guest.run().reason is Reason.HLT
        assert guest.state.rip == 0x9000
        assert (guest.state.cs.selector, guest.state.cpl) == (8, 0)
        assert guest.memory.read(guest.state.gpr[RCX] - 2, 3) == b"\x0f\x05\xf4"


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_mode_runs(bits: int) -> None:
    with SvmGuest("mov $0x1234, %ax; push %ax; pop %bx; hlt", bits=bits) as guest:  # type: ignore[arg-type]
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] & 0xFFFF == 0x1234
        assert guest.state.gpr[RSP] == STACK


def test_real_mode_delivers_through_the_vector_table() -> None:
    with SvmGuest("int $0x21; mov $7, %cx; hlt", bits=16) as guest:
        guest.memory.write(0x21 * 4, b"\x00\x90\x00\x00")
        guest.memory.write(0x9000, b"\xbb\x05\x00\xcf")  # mov $5, %bx; iret
        assert guest.run().reason is Reason.HLT
        assert (guest.state.gpr[RBX], guest.state.gpr[RCX]) == (5, 7)


def test_the_preemption_timer_is_exact() -> None:
    with SvmGuest("1: inc %rax; inc %rbx; inc %rcx; jmp 1b") as guest:
        guest.controls.pin = int(Pin.PREEMPTION_TIMER)
        total = 0
        for timer in (1, 2, 3, 5, 7, 1000, 1001, 4096, 99_999):
            guest.controls.timer = timer
            before = guest.core.statistics.instructions
            assert guest.run().reason is Reason.PREEMPTION_TIMER
            assert guest.core.statistics.instructions - before == timer
            total += timer
        assert guest.state.gpr[RAX] == -(-total // 4)
        assert guest.state.gpr[RCX] == (total + 1) // 4


def test_an_instruction_that_faults_is_not_counted() -> None:
    with SvmGuest("nop; nop; mov (%rax), %rbx; nop; hlt") as guest:
        guest.state.gpr[RAX] = 1 << 30
        guest.gate(14, "add $8, %rsp; mov $0x1000, %eax; iretq")
        assert guest.run().reason is Reason.HLT
        assert guest.core.statistics.instructions == 7  # 2, 3 of the handler, the load, a nop


def test_an_interrupt_of_the_host_exits() -> None:
    with SvmGuest("1: jmp 1b") as guest:
        guest.controls.pin = int(Pin.EXTERNAL_INTERRUPT)
        guest.core.interrupt()
        assert guest.run().reason is Reason.EXTERNAL_INTERRUPT
        guest.controls.pin = int(Pin.EXTERNAL_INTERRUPT | Pin.PREEMPTION_TIMER)
        guest.controls.timer = 1000
        assert guest.run().reason is Reason.PREEMPTION_TIMER


def test_the_interrupt_window_opens_after_the_shadow_of_sti() -> None:
    with SvmGuest("sti; inc %rax; inc %rax; hlt") as guest:
        guest.controls.primary |= Primary.INTERRUPT_WINDOW
        assert guest.run().reason is Reason.INTERRUPT_WINDOW
        assert guest.state.gpr[RAX] == 1
        assert guest.state.rflags & RFLAGS_IF


def test_the_nmi_window_opens_after_iret() -> None:
    with SvmGuest("hlt") as guest:
        guest.gate(2, "inc %rax; iretq")
        guest.controls.primary |= Primary.NMI_WINDOW
        assert guest.run(Event(2, EventType.NMI)).reason is Reason.NMI_WINDOW
        assert (guest.state.gpr[RAX], guest.state.rip) == (1, CODE)


def test_flags_live_on_over_exits() -> None:
    with SvmGuest(
        "stc; std; cpuid; setc %bl; xor %eax, %eax; cpuid; setz %bh; pushf; hlt"
    ) as guest:
        for _ in range(2):
            guest.skip(guest.run())
        assert guest.state.rflags == 0x446
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 0x101
        assert guest.memory.read_u64(guest.state.gpr[RSP]) == 0x446
