"""Exceptions, injection, and the guest's memory: what is delivered natively, and what exits instead."""

from __future__ import annotations

import threading

import pytest

from hostel.soft.silicon import Event, EventType, Pin, Primary, Reason
from hostel.soft.state import (
    BLOCKED_BY_NMI,
    CR4_DE,
    HALTED,
    RAX,
    RBX,
    RCX,
    RDX,
    RFLAGS_IF,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RSP,
    Segment,
)
from soft.core.svm_rig import CODE, GDT, HANDLERS, STACK, TSS, SvmGuest

pytest.importorskip("unicorn", reason="the extra 'soft' is not installed")

HARDWARE, EXTERNAL, SOFTWARE = (
    EventType.HARDWARE_EXCEPTION,
    EventType.EXTERNAL,
    EventType.SOFTWARE_INTERRUPT,
)
UNMAPPED = 1 << 30


def test_a_page_fault_goes_to_the_guests_own_handler() -> None:
    with SvmGuest("mov $0x40000000, %eax; movb $1, (%rax); hlt") as guest:
        guest.gate(14, "pop %rbx; mov %cr2, %rcx; hlt")
        assert guest.run().reason is Reason.HLT
        assert (guest.state.gpr[RBX], guest.state.gpr[RCX]) == (2, UNMAPPED)
        assert guest.core.statistics.events_delivered == 1


def test_the_stack_table_is_used() -> None:
    with SvmGuest("int $0x30; hlt") as guest:
        guest.ist(1, 0x6FF0)
        guest.gate(0x30, "mov %rsp, %rax; iretq", ist=1)
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RAX] == 0x6FF0 - 40
        assert guest.state.gpr[RSP] == STACK


def test_from_ring_3_the_stack_of_the_tss_is_taken() -> None:
    with SvmGuest("int $0x30; int $0x31; 1: jmp 1b") as guest:
        state = guest.state
        state.cs, state.ss = (
            Segment(0x23, 0, 0xFFFFFFFF, RIGHTS_CODE64 | 0x60),
            Segment(0x1B, 0, 0xFFFFFFFF, RIGHTS_DATA32 | 0x60),
        )
        guest.gate(0x30, "mov %rsp, %rax; iretq", dpl=3)
        guest.gate(0x31, "hlt")
        guest.gate(13, "pop %rbx; hlt")
        assert guest.run().reason is Reason.HLT
        assert state.gpr[RAX] == STACK - 0x800 - 40
        assert state.gpr[RBX] == 0x31 << 3 | 2  # INT of a gate with DPL 0: #GP with its selector


@pytest.mark.parametrize(
    ("vector", "source", "error", "address"),
    [
        (0, "xor %ecx, %ecx; div %ecx", None, 0),
        (3, "int3", None, 0),
        (6, "ud2", None, 0),
        (13, "mov $0x28, %ax; mov %ax, %ds", 0x28, 0),
        (14, "mov $0x40000000, %eax; mov (%rax), %rax", 0, UNMAPPED),
    ],
)
def test_the_exception_bitmap(vector: int, source: str, error: int | None, address: int) -> None:
    with SvmGuest(source) as guest:
        guest.controls.exception_bitmap = 1 << vector
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, address)
        assert exit.interruption is not None
        assert (exit.interruption.vector, exit.interruption.error) == (vector, error)
        assert guest.state.cr2 == 0
        assert guest.core.statistics.events_delivered == 0


def test_page_faults_are_chosen_by_their_error_code() -> None:
    with SvmGuest("mov $0x40000000, %eax; mov (%rax), %rbx; movb $1, (%rax)") as guest:
        guest.gate(14, "add $8, %rsp; addq $3, (%rsp); mov %cr2, %rdx; iretq")
        guest.controls.exception_bitmap = 1 << 14
        guest.controls.pf_mask = guest.controls.pf_match = 2
        exit = guest.run()
        assert exit.interruption == Event(14, HARDWARE, 2)
        assert guest.state.gpr[RDX] == UNMAPPED  # the read's was the guest's own


def test_what_was_under_way_is_told() -> None:
    with SvmGuest("int $0x30") as guest:
        guest.controls.exception_bitmap = 1 << 13
        guest.state.idtr.limit = 0x2FF
        exit = guest.run()
        assert exit.interruption == Event(13, HARDWARE, 0x30 << 3 | 2)
        assert exit.vectoring is not None
        assert (exit.vectoring.vector, exit.vectoring.type) == (0x30, SOFTWARE)
        assert (exit.vectoring.length, guest.state.rip) == (2, CODE)


def test_double_and_triple_fault() -> None:
    with SvmGuest("mov $0x40000000, %eax; mov (%rax), %rbx") as guest:
        guest.gate(8, "pop %rcx; mov $8, %ebx; hlt")
        assert guest.run().reason is Reason.HLT
        assert (guest.state.gpr[RBX], guest.state.gpr[RCX]) == (8, 0)
        guest.state.idtr.limit = 0
        guest.state.rip = CODE
        exit = guest.run()
        assert exit.reason is Reason.TRIPLE_FAULT
        assert guest.run().reason is Reason.TRIPLE_FAULT


@pytest.mark.parametrize(
    ("event", "on_stack"),
    [
        (Event(0x41, EXTERNAL), None),
        (Event(0x41, SOFTWARE, None, 1), None),
        (Event(8, EXTERNAL), None),
        (Event(13, HARDWARE, 0x28), 0x28),
        (Event(2, EventType.NMI), None),
    ],
)
def test_injection(event: Event, on_stack: int | None) -> None:
    with SvmGuest("nop; hlt") as guest:
        guest.state.rflags |= RFLAGS_IF
        guest.gate(event.vector, "mov %rsp, %rbx; hlt")
        assert guest.run(event).reason is Reason.HLT
        frame = guest.state.gpr[RBX]
        if on_stack is not None:
            assert guest.memory.read_u64(frame) == on_stack
            frame += 8
        assert frame == STACK - 40
        assert guest.memory.read_u64(frame) == CODE + event.length
        assert bool(guest.state.interruptibility & BLOCKED_BY_NMI) == (event.vector == 2)


def test_an_ept_violation_in_a_delivery_is_mended_and_the_event_injected_again() -> None:
    with SvmGuest("nop") as guest:
        guest.gate(0x41, "hlt")
        guest.state.gpr[RSP] = 0x124000
        leaf = guest.leaves + 8 * 0x123
        kept = guest.physical.read_u64(leaf)
        guest.physical.write_u64(leaf, 0)
        event = Event(0x41, EXTERNAL)
        exit = guest.run(event)
        assert (exit.reason, exit.vectoring) == (Reason.EPT_VIOLATION, event)
        assert (exit.physical, exit.linear) == (0x123FF8, 0x123FF8)
        assert exit.qualification == 0x182
        guest.physical.write_u64(leaf, kept)
        assert guest.run(exit.vectoring).reason is Reason.HLT
        assert guest.state.rip == HANDLERS + 64 * 0x41


@pytest.mark.parametrize(
    ("source", "qualification"),
    [
        ("mov 0x123000, %al", 0x181),
        ("mov %al, 0x123000", 0x182),
        ("mov $0x123000, %eax; jmp *%rax", 0x184),
    ],
)
def test_an_ept_violation_says_what_was_tried(source: str, qualification: int) -> None:
    with SvmGuest(source) as guest:
        guest.physical.write_u64(guest.leaves + 8 * 0x123, 0)
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.EPT_VIOLATION, qualification)
        assert (exit.physical, exit.linear) == (0x123000, 0x123000)


def test_a_violation_in_the_guests_own_tables() -> None:
    with SvmGuest("nop") as guest:
        guest.physical.write_u64(guest.leaves + 8 * 3, 0)
        exit = guest.run()
        assert (exit.reason, exit.physical) == (Reason.EPT_VIOLATION, 0x3000)
        assert (exit.qualification & 0x180, exit.linear) == (0x80, CODE)


def test_rights_of_the_ept() -> None:
    with SvmGuest("mov 0x123000, %al; mov %al, 0x123000") as guest:
        leaf = guest.leaves + 8 * 0x123
        guest.physical.write_u64(leaf, guest.physical.read_u64(leaf) & ~6)
        exit = guest.run()
        assert (exit.reason, exit.qualification) == (Reason.EPT_VIOLATION, 0x182 | 1 << 3)
        assert guest.state.rip > CODE
        guest.state.rip = 0x123000
        assert guest.run().qualification == 0x184 | 1 << 3


def test_ept_misconfiguration() -> None:
    with SvmGuest("mov 0x123000, %al") as guest:
        guest.physical.write_u64(guest.leaves + 8 * 0x123, 2)
        assert guest.run().reason is Reason.EPT_MISCONFIGURATION


def test_ept_dirty_bits_are_exact() -> None:
    with SvmGuest("mov 0x123000, %al; hlt; mov %al, 0x123000; hlt") as guest:
        guest.controls.ept_pointer |= 1 << 6
        leaf = guest.leaves + 8 * 0x123
        guest.skip(guest.run())
        assert guest.physical.read_u64(leaf) & 0x300 == 0x100
        guest.run()
        assert guest.physical.read_u64(leaf) & 0x300 == 0x300


def test_accessed_and_dirty_bits_of_the_guests_tables() -> None:
    with SvmGuest("mov 0x123000, %al; hlt; mov %al, 0x123000; hlt") as guest:
        guest.skip(guest.run())
        assert guest.memory.read_u64(0x6000 + 8 * 0x123) & 0x60 == 0x20
        guest.run()
        assert guest.memory.read_u64(0x6000 + 8 * 0x123) & 0x60 == 0x60


def test_code_that_changes_itself() -> None:
    source = "mov $2, %ecx; 1: mov $1, %al; add %al, %bl; movb $7, 1b+1; dec %ecx; jnz 1b; hlt"
    with SvmGuest(source) as guest:
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 8


def test_code_that_is_changed_by_another_address() -> None:
    source = """
        mov $3, %ecx
    1:  call 0x9000
        incb 0x123001           # the operand at 0x9001
        movb $1, 0x123100       # the page is written before, and after
        dec %ecx; jnz 1b; hlt
    """
    with SvmGuest(source) as guest:
        guest.memory.write_u64(0x6000 + 8 * 0x123, 0x9007)
        guest.memory.write(0x9000, b"\xb0\x01\x00\xc3\xc3")  # mov $1, %al; add %al, %bl; ret
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 1 + 2 + 3


def test_code_that_the_host_writes() -> None:
    with SvmGuest("mov $1, %al; hlt") as guest:
        guest.run()
        guest.memory.write(CODE, b"\xb0\x02")
        guest.core.wrote(guest.hpa + CODE, 2)
        guest.state.rip = CODE
        guest.run()
        assert guest.state.gpr[RAX] == 2


def test_a_guest_table_in_a_page_that_is_not_executable() -> None:
    with SvmGuest("mov 0x123000, %al; hlt") as guest:
        leaf = guest.leaves + 8 * 6
        guest.physical.write_u64(leaf, guest.physical.read_u64(leaf) & ~4)
        assert guest.run().reason is Reason.HLT
        guest.state.rip = 0x6000
        assert guest.run().qualification == 0x184 | 3 << 3


def test_a_flush_shows_changed_tables() -> None:
    with SvmGuest("mov 0x123000, %al; hlt; mov 0x123000, %bl; hlt") as guest:
        guest.memory.write(0x123000, b"\1")
        guest.memory.write(0x124000, b"\2")
        guest.skip(guest.run())
        leaf = guest.leaves + 8 * 0x123
        guest.physical.write_u64(leaf, guest.physical.read_u64(leaf) + 4096)
        guest.core.flush()
        guest.run()
        assert (guest.state.gpr[RAX], guest.state.gpr[RBX]) == (1, 2)


def test_a_halted_processor_waits_for_its_timer_or_the_host() -> None:
    with SvmGuest("hlt") as guest:
        guest.controls.primary &= ~int(Primary.HLT)
        guest.controls.pin = int(Pin.PREEMPTION_TIMER)
        guest.controls.timer = 100
        assert guest.run().reason is Reason.PREEMPTION_TIMER
        assert (guest.state.activity, guest.state.rip) == (HALTED, CODE + 1)
        guest.controls.pin = int(Pin.EXTERNAL_INTERRUPT)
        threading.Timer(0.05, guest.core.interrupt).start()
        assert guest.run().reason is Reason.EXTERNAL_INTERRUPT


def test_a_loop_is_left_when_the_host_interrupts() -> None:
    with SvmGuest("1: jmp 1b") as guest:
        guest.controls.pin = int(Pin.EXTERNAL_INTERRUPT)
        threading.Timer(0.05, guest.core.interrupt).start()
        assert guest.run().reason is Reason.EXTERNAL_INTERRUPT
        assert guest.core.statistics.instructions > 1000


def test_ltr_of_nothing_is_a_fault() -> None:
    source = "mov $0x30, %eax; ltr %ax; str %ebx; ltr 0x9000; hlt"
    with SvmGuest(source) as guest:
        guest.gate(13, "hlt")
        guest.state.gdtr.limit = 0x3F
        guest.memory.write_u64(GDT + 0x30, TSS << 16 | 0x89 << 40 | 0x67)
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 0x30
        assert guest.memory.read_u64(guest.state.gpr[RSP] + 8) == CODE + 0xB
        assert guest.memory.read_u64(GDT + 0x30) >> 40 & 0xFF == 0x8B


def test_debug_registers_take_no_upper_half() -> None:
    source = "mov $0x700000401, %rax; mov %rax, %dr7; mov $-1, %rax; mov %rax, %dr6; hlt"
    with SvmGuest(source) as guest:
        guest.gate(13, "inc %rbx; mov $0x80000, %ecx; addq $3, 8(%rsp); add $8, %rsp; iretq")
        before = guest.state.dr6, guest.state.dr7
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RBX] == 2
        assert (guest.state.dr6, guest.state.dr7) == before


def test_debug_registers_by_both_their_names() -> None:
    source = (
        "mov $0x2FFF0700, %eax; mov %rax, %dr5; mov %dr7, %rbx; mov %rax, %dr6; mov %dr4, %rcx; hlt"
    )
    with SvmGuest(source) as guest:
        assert guest.run().reason is Reason.HLT
        assert (guest.state.gpr[RBX], guest.state.gpr[RCX]) == (0x2FFF_0700, 0xFFFF_0FF0)
    with SvmGuest(source) as guest:
        guest.gate(6, "mov $6, %edx; hlt")
        guest.state.cr4 |= CR4_DE
        assert guest.run().reason is Reason.HLT
        assert guest.state.gpr[RDX] == 6


def test_without_a_task_register_a_stack_switch_fails() -> None:
    with SvmGuest("int $0x30") as guest:
        state = guest.state
        state.cs = Segment(0x23, 0, 0xFFFFFFFF, RIGHTS_CODE64 | 0x60)
        state.ss = Segment(0x1B, 0, 0xFFFFFFFF, RIGHTS_DATA32 | 0x60)
        state.tr.rights = 0x10000
        guest.gate(0x30, "hlt", dpl=3)
        assert guest.run().reason is Reason.TRIPLE_FAULT


@pytest.mark.parametrize(
    "code",
    [
        b"\xf0" * 15,
        b"\x66" * 20,
        b"\xf0\x90",
        b"\x0f\xff",
        b"\xff\xff",
        b"\x48\xb8" + b"\xff" * 8 + b"\xff\xe0",  # jump to the last byte
        b"\xbc\x00\x00\x00\x40\x50",  # push to nowhere
        b"\x31\xc0\x0f\x22\xd8\xeb\xfe",  # CR3 = 0
        b"\xea\x00\x00\x00\x00\x00\x00",
        b"\x0f\x01\x1c\x25\x00\x00\x10\x00\xcd\x03",  # LIDT from zeros, INT 3
        b"\x0f\xae\x1c\x25\xf0\xff\x1f\x00\xf4",
        b"\x0f\x01\xd8",  # VMRUN
        b"\x0f\x01\xd9",  # VMMCALL
        b"\x0f\x01\xdb",  # VMSAVE
        b"\x0f\x01\xdd",  # CLGI
    ],
)
@pytest.mark.parametrize("ept", [True, False])
def test_a_hostile_guest_ends_in_an_exit(code: bytes, ept: bool) -> None:
    with SvmGuest("nop", ept=ept) as guest:
        guest.memory.write(CODE, code + b"\xf4")
        guest.controls.pin, guest.controls.timer = int(Pin.PREEMPTION_TIMER), 10_000
        exit = guest.run()
        assert exit.reason in (
            Reason.TRIPLE_FAULT,
            Reason.PREEMPTION_TIMER,
            Reason.EPT_VIOLATION,
            Reason.HLT,
        )
        assert guest.core.statistics.instructions <= 10_000
