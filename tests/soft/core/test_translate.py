"""The core by translation: a guest runs, faults, asks, halts; each through the exit that the manual names."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.silicon import Reason
from hostel.soft.state import RAX, RBX, RCX, RDX
from soft.core.core_rig import Bench


def test_instructions_run_and_are_counted() -> None:
    with Bench("mov $5, %ecx; 1: inc %rax; dec %ecx; jnz 1b; hlt") as bench:
        exit = bench.run()
        assert (exit.reason, exit.length, bench.state.rip) == (Reason.HLT, 1, 0x800C)
        assert bench.state.gpr[RAX] == 5
        assert bench.core.statistics.instructions == 1 + 3 * 5


def test_an_exit_leaves_rip_at_the_instruction_and_goes_on_behind_it() -> None:
    with Bench("mov $0x41, %al; out %al, $0xe9; cpuid; hlt") as bench:
        exit = bench.run()
        assert (exit.reason, exit.qualification, exit.length) == (Reason.IO, 0xE9 << 16 | 1 << 6, 2)
        bench.skip(exit)
        exit = bench.run()
        assert exit.reason is Reason.CPUID
        bench.skip(exit)
        assert bench.run().reason is Reason.HLT


def test_a_divide_error_reaches_the_guests_handler() -> None:
    with Bench("xor %ecx, %ecx; div %ecx; hlt") as bench:
        bench.handlers("mov $7, %ebx; addq $2, (%rsp); iretq", 0)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 7
        assert bench.core.statistics.events_delivered == 1


def test_a_page_fault_has_cr2_and_an_error_code() -> None:
    with Bench("movabs $0x40000123, %rdi; mov %rax, (%rdi); hlt") as bench:
        bench.handlers("pop %rbx; mov %cr2, %rcx; mov (%rsp), %rdx; hlt", 14)
        assert bench.run().reason is Reason.HLT
        gpr = bench.state.gpr
        assert (gpr[RBX], gpr[RCX], gpr[RDX]) == (2, 0x4000_0123, 0x800A)


def test_a_guest_without_handlers_ends_in_a_triple_fault() -> None:
    with Bench("ud2") as bench:
        bench.state.idtr.limit = 0
        assert bench.run().reason is Reason.TRIPLE_FAULT


def test_code_reads_as_it_was_written() -> None:
    with Bench("here: cpuid; mov here(%rip), %ax; hlt") as bench:
        bench.skip(bench.run())
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] & 0xFFFF == 0xA20F
