"""Guests that try: each ends in an exit that names it, within its time; the core lives on."""

from __future__ import annotations

import random
import time

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.exceptions import PF
from hostel.soft.silicon import Pin, Primary, Reason
from hostel.soft.state import RAX, RBX, RCX, RDI, RDX, RIGHTS_CODE32, RSI, RSP, Segment
from soft.core.core_rig import CODE0_32, PD, PML4, Bench

LOOPS = ("1: jmp 1b", "1: loop 1b", "1: pause; jmp 1b", "rep stosb", "1: rdtsc; jmp 1b")


def timed(bench: Bench, instructions: int) -> None:
    bench.controls.pin, bench.controls.timer = Pin.PREEMPTION_TIMER, instructions


@pytest.mark.parametrize("code", LOOPS)
def test_an_endless_loop_ends_with_its_time(code: str) -> None:
    with Bench(code) as bench:
        gpr = bench.state.gpr
        gpr[RCX], gpr[RDI] = 1 << 40, 0x20000
        timed(bench, 5003)
        assert bench.run().reason is Reason.PREEMPTION_TIMER
        assert bench.core.statistics.instructions == 5003


@pytest.mark.parametrize("instructions", [1, 2, 3, 4, 5, 6, 17, 100])
def test_time_is_exact(instructions: int) -> None:
    with Bench("1: inc %rax; inc %rbx; inc %rcx; jmp 1b") as bench:
        timed(bench, instructions)
        assert bench.run().reason is Reason.PREEMPTION_TIMER
        gpr = bench.state.gpr
        rounds, rest = divmod(instructions, 4)
        assert (gpr[RAX], gpr[RBX], gpr[RCX]) == tuple(rounds + (rest > at) for at in range(3))


def test_a_timer_of_nothing_ends_at_once() -> None:
    with Bench("inc %rax") as bench:
        timed(bench, 0)
        assert bench.run().reason is Reason.PREEMPTION_TIMER
        assert bench.state.gpr[RAX] == 0


def test_slices_add_up_to_the_whole() -> None:
    code = "1: add %rcx, %rax; xor %rax, %rdx; rol $3, %rdx; dec %ecx; jnz 1b; hlt"

    def played(slices: int | None) -> tuple[list[int], int]:
        with Bench(code) as bench:
            bench.state.gpr[RCX] = 500
            if slices:
                timed(bench, slices)
            while bench.run().reason is not Reason.HLT:
                pass
            return bench.state.gpr, bench.core.statistics.instructions

    assert played(7) == played(None) == played(64)


def test_another_thread_can_stop_it() -> None:
    import threading

    with Bench("1: jmp 1b") as bench:
        threading.Timer(0.1, bench.core.interrupt).start()
        assert bench.run().reason is Reason.EXTERNAL_INTERRUPT
        bench.core.interrupt()
        assert bench.run().reason is Reason.EXTERNAL_INTERRUPT, "kept for the next entry"


def test_a_halted_guest_wakes_for_an_interrupt_of_the_host() -> None:
    import threading

    with Bench("sti; hlt") as bench:
        bench.controls.primary &= ~Primary.HLT
        threading.Timer(0.1, bench.core.interrupt).start()
        assert bench.run().reason is Reason.EXTERNAL_INTERRUPT


def test_a_jump_to_nowhere() -> None:
    with Bench("jmp *%rbx") as bench:
        bench.state.gpr[RBX] = 0x8000_0000
        assert bench.run().reason is Reason.TRIPLE_FAULT
        bench.state.rip, bench.state.gpr[RBX] = 0x8000, 0x1234_5678_9ABC_DEF0
        assert bench.run().reason is Reason.TRIPLE_FAULT


def test_beyond_its_memory_is_an_ept_violation() -> None:
    with Bench("mov %eax, 8(%rbx)") as bench:
        bench.state.gpr[RBX] = 0x3F00_0000
        exit = bench.run()
        assert (exit.reason, exit.linear, exit.physical) == (
            Reason.EPT_VIOLATION,
            0x3F00_0008,
            0x3F00_0008,
        )


def test_tables_that_lead_nowhere() -> None:
    with Bench("mov %rbx, %cr3; nop") as bench:
        bench.controls.primary &= ~Primary.CR3_LOAD
        bench.memory.write(PML4 + 0x1000 * 0x20, bytes(4096))
        bench.state.gpr[RBX] = PML4 + 0x1000 * 0x20
        assert bench.run().reason is Reason.TRIPLE_FAULT


@pytest.mark.parametrize(
    "code", ["lock hlt", "lock cpuid", ".byte 0xf0, 0x90", "lock mov %eax, %ebx"]
)
def test_a_lock_where_none_may_be_is_undefined(code: str) -> None:
    with Bench(".byte 0xf0; " + code.removeprefix("lock ")) as bench:
        bench.handlers("mov $6, %ebx; hlt", 6)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 6


def test_an_instruction_of_more_than_15_bytes() -> None:
    with Bench(b"\x66" * 15 + b"\x90\xf4") as bench:
        bench.handlers("mov $13, %ebx; hlt", 6, 13)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RBX] == 13


def test_an_instruction_over_the_end_of_a_page() -> None:
    """CPUID with its second byte on the next page; and before a page that is not there."""
    with Bench() as bench:
        bench.load("nop; cpuid; hlt", at=0x8FFE)
        bench.state.rip = 0x8FFE
        exit = bench.run()
        assert (exit.reason, bench.state.rip) == (Reason.CPUID, 0x8FFF)
        bench.skip(exit)
        assert bench.run().reason is Reason.HLT
    with Bench() as bench:
        bench.load(b"\xb8\x07\x00\x00\x00\x0f", at=0x8FFA)
        bench.mmu.hidden = {0x9000}
        bench.state.rip = 0x8FFA
        exit = bench.run()
        assert (exit.reason, exit.linear) == (Reason.EPT_VIOLATION, 0x9000)
        assert (bench.state.rip, bench.state.gpr[RAX]) == (0x8FFF, 7), "the first one was executed"


def test_the_last_instruction_before_a_page_that_is_not_there() -> None:
    with Bench() as bench:
        bench.load(b"\xb8\x07\x00\x00\x00\xf4", at=0x8FFA)
        bench.mmu.hidden = {0x9000}
        bench.state.rip = 0x8FFA
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] == 7


def test_bytes_that_are_code_in_two_ways() -> None:
    """From its start the bytes are a MOV with 0f a2 in its constant; from its middle they are CPUID."""
    with Bench("1: mov $0x90a20f90, %eax; hlt") as bench:
        assert bench.run().reason is Reason.HLT
        bench.state.rip = 0x8002
        exit = bench.run()
        assert (exit.reason, bench.state.rip) == (Reason.CPUID, 0x8002)
        bench.state.rip, bench.state.gpr[RAX] = 0x8000, 0
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] == 0x90A2_0F90


def test_code_that_becomes_sensitive() -> None:
    with Bench("movw $0xa20f, 1f(%rip); jmp 1f; .balign 16; 1: nop; nop; hlt") as bench:
        bench.state.rip = 0x8010
        assert bench.run().reason is Reason.HLT
        bench.state.rip = 0x8000
        assert bench.run().reason is Reason.CPUID
        assert bench.state.rip == 0x8010


def test_code_that_changes_itself_ahead_in_the_same_block() -> None:
    with Bench("movb $0xf4, 1f(%rip); 1: nop; cpuid") as bench:
        assert bench.run().reason is Reason.HLT


def test_code_written_by_somebody_else() -> None:
    with Bench("mov $1, %eax; hlt") as bench:
        bench.run()
        bench.memory.write(0x8001, b"\x02")
        bench.core.wrote(bench.base + 0x8001, 1)
        bench.state.rip = 0x8000
        bench.run()
        assert bench.state.gpr[RAX] == 2


def test_a_handler_that_faults_does_not_last_for_ever() -> None:
    with Bench("ud2") as bench:
        bench.handlers("ud2", 6)
        timed(bench, 2000)
        bench.state.gpr[RSP] = 0x100000
        assert bench.run().reason is Reason.PREEMPTION_TIMER


SENSITIVE = [
    *("0fa2", "0f20c0", "0f22d8", "0f22c0", "0f22e0", "e410", "6c", "f36e", "fb", "fa", "9d", "9c"),
    *("cf", "48cf", "cd30", "cc", "f1", "0f05", "0f07", "0f34", "0f01f8", "0f32", "0f30", "0f31"),
    *("f4", "f0f4", "0f0138", "0f0110", "0f00d8", "8ed8", "8ed0", "ff28", "cb", "f3a4", "f3ab"),
    *("0f23f8", "0f01c1", "0f0b", "ebfe", "e2fe", "0f06", "f390", "c5f877", "0fae20", "0f01d1"),
    *("f00fc708", "dbe3", "d9d0"),
]


@pytest.mark.parametrize("seed", range(40))
def test_noise(seed: int) -> None:
    """Random bytes and sensitive instructions, in every mode and ring: an exit each time, and in time."""
    chance = random.Random(seed)
    with Bench(bits=chance.choice((16, 32, 64, 64))) as bench:
        at = chance.choice((0x8000, 0x8FE8))
        pieces = [
            bytes.fromhex(chance.choice(SENSITIVE))
            if chance.random() < 0.3
            else chance.randbytes(3)
            for _ in range(40)
        ]
        bench.load(b"".join(pieces), at=at)
        if bench.bits == 64:
            bench.handlers("incl 0x24000; addq $2, (%rsp); iretq", *range(32))
        for position in (RAX, RBX, RCX, RDX, RSI, RDI):
            bench.state.gpr[position] = chance.choice(
                (0, 1, 0x20000, 0x8000, chance.getrandbits(32))
            )
        if bench.bits == 64 and chance.random() < 0.4:
            bench.to_ring3(at)
        bench.state.rip = at
        bench.state.rflags |= chance.choice((0, 0x100, 0x3000, 0x200))
        timed(bench, 1000)
        began = time.process_time()
        for _ in range(5):
            before = bench.core.statistics.instructions
            exit = bench.run()
            assert bench.core.statistics.instructions - before <= 1000
            bench.state.rip = bench.state.rip + exit.length & 0xFFFF_FFFF
            if exit.reason in (Reason.TRIPLE_FAULT, Reason.TASK_SWITCH):
                break
        assert time.process_time() - began < 5


@pytest.mark.parametrize("base", [0xFFFF_FFF0, 0xFFFF_F000])
def test_code_of_a_segment_that_runs_over_4_gib(base: int) -> None:
    """In compatibility mode too it goes on at 0; nothing is mapped behind 4 GiB."""
    with Bench() as bench:
        bench.load("mov $5, %eax; 1: cpuid; dec %eax; mov %eax, %eax; jmp 1b", bits=32)
        bench.state.cs = Segment(CODE0_32, base, 0xFFFF_FFFF, RIGHTS_CODE32)
        bench.state.rip = 0x8000 + (1 << 32) - base
        assert bench.run().reason is Reason.CPUID
        assert bench.core.statistics.instructions == 1
        bench.skip(bench.run())
        assert bench.run().reason is Reason.CPUID
        assert bench.core.statistics.instructions == 4
        assert all(at < 1 << 32 for at, _, _ in bench.mmu.asked)


def test_a_fault_behind_4_gib_is_one_at_the_start() -> None:
    """CR2, and which instructions were executed."""
    with Bench() as bench:
        bench.load("nop; mov $0x40000000, %edx; mov (%edx), %eax", bits=32)
        bench.state.cs = Segment(CODE0_32, 0xFFFF_F000, 0xFFFF_FFFF, RIGHTS_CODE32)
        bench.state.rip = 0x9000
        bench.controls.exception_bitmap = 1 << PF
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, 0x4000_0000)
        assert (bench.state.rip, bench.core.statistics.instructions) == (0x9006, 2)
        bench.memory.write_u64(PD, 0)
        bench.core.flush(0x8000)
        bench.state.rip = 0x9000
        exit = bench.run()
        assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, 0x8000)
