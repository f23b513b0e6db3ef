"""Limits and types of segments in 16- and 32-bit code, on the core by translation: which accesses fault, and
with what; flat ones cost nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import Bits
from hostel.soft.exceptions import GP, SS
from hostel.soft.silicon import Reason
from hostel.soft.state import (
    CR0_PE,
    RAX,
    RCX,
    RDI,
    RIGHTS_CODE16,
    RIGHTS_CODE32,
    RIGHTS_DATA16,
    RIGHTS_DATA32,
    RIGHTS_UNUSABLE,
    RSP,
    Segment,
)
from soft.core.core_rig import CODE0_32, DATA0, GDT, Bench

BASE = 0x20000
SMALL = Segment(DATA0, BASE, 15, RIGHTS_DATA32)
READ_ONLY = Segment(DATA0, BASE, 0xFFFF_FFFF, 0xC091)
DOWN32 = Segment(DATA0, BASE, 15, 0xC097)
DOWN16 = Segment(DATA0, BASE, 15, 0x0097)
NULL = Segment(0, 0, 0, RIGHTS_UNUSABLE)
CODE = Segment(CODE0_32, BASE, 0xFFFF_FFFF, RIGHTS_CODE32)
EXECUTE_ONLY = Segment(CODE0_32, 0, 0xFFFF_FFFF, 0xC099)
SHORT = Segment(CODE0_32, 0, 0x80FF, 0x409B)
ALL = (1 << 32) - 1

Case = tuple[str, dict[str, Segment], int | None]

DATA: list[Case] = [
    ("movl %eax, 12", {"ds": SMALL}, None),
    ("movl %eax, 13", {"ds": SMALL}, GP),
    ("movb %al, 15", {"ds": SMALL}, None),
    ("movb %al, 16", {"ds": SMALL}, GP),
    ("mov %fs:14, %eax", {"fs": SMALL}, GP),
    ("mov %ds:14, %eax", {"fs": SMALL}, None),
    ("mov -1, %al", {"ds": SMALL}, GP),
    ("mov %gs:0, %al", {"gs": NULL}, GP),
    ("mov 4, %eax", {"ds": READ_ONLY}, None),
    ("mov %eax, 4", {"ds": READ_ONLY}, GP),
    ("xchg %eax, 4", {"ds": READ_ONLY}, GP),
    ("mov $2, %eax; lock cmpxchg %ebx, 4", {"ds": READ_ONLY}, GP),
    ("pushl 4", {"ds": READ_ONLY}, None),
    ("mov 16, %eax", {"ds": DOWN32}, None),
    ("mov 15, %eax", {"ds": DOWN32}, GP),
    ("mov 16, %ax", {"ds": DOWN16}, None),
    ("mov 0xffff, %al", {"ds": DOWN16}, None),
    ("mov 0xffff, %ax", {"ds": DOWN16}, GP),
    ("mov %cs:0x8000, %eax", {}, None),
    ("mov %eax, %cs:0x8000", {}, GP),
    ("mov %cs:0x8000, %eax", {"cs": EXECUTE_ONLY}, GP),
    ("mov 4, %eax", {"ds": CODE}, None),
    ("mov %eax, 4", {"ds": CODE}, GP),
    ("mov $16, %edi; stosb", {"es": SMALL}, GP),
    ("mov $12, %edi; xor %esi, %esi; movsl", {"es": SMALL}, None),
    ("mov $13, %edi; xor %esi, %esi; movsl", {"es": SMALL}, GP),
    ("xor %ecx, %ecx; mov $99, %edi; rep stosl", {"es": SMALL}, None),
    ("mov $10, %al; mov $5, %ebx; xlat", {"ds": SMALL}, None),
    ("mov $11, %al; mov $5, %ebx; xlat", {"ds": SMALL}, GP),
    ("mov $127, %eax; bt %eax, 0", {"ds": SMALL}, None),
    ("mov $128, %eax; bt %eax, 0", {"ds": SMALL}, GP),
    ("mov $-1, %eax; bts %eax, 0", {"ds": SMALL}, GP),
    ("lea 99, %eax; nopl 99; prefetcht0 99", {"ds": SMALL}, None),
    ("fnsave 0", {"ds": SMALL}, GP),
    ("sgdt 10", {"ds": SMALL}, None),
    ("sgdt 11", {"ds": SMALL}, GP),
    ("mov $0x8000, %edx; mov $15, %edi; insw", {"es": SMALL}, GP),
]
STACK: list[Case] = [
    ("mov $20, %esp; pop %eax", {"ss": SMALL}, SS),
    ("mov $16, %esp; push %eax; pop %eax", {"ss": SMALL}, None),
    ("mov $3, %esp; push %eax", {"ss": SMALL}, SS),
    ("mov $4, %esp; call 1f; 1: nop", {"ss": SMALL}, None),
    ("mov $0, %esp; call 1f; 1: nop", {"ss": SMALL}, SS),
    ("mov $13, %ebp; mov (%ebp), %eax", {"ss": SMALL}, SS),
    ("mov $13, %eax; mov (%eax), %eax", {"ss": SMALL}, None),
    ("mov $13, %esp; mov (%esp), %eax", {"ss": SMALL}, SS),
    ("mov $16, %esp; pushal", {"ss": SMALL}, SS),
    ("mov $13, %ebp; leave", {"ss": SMALL}, SS),
    ("mov $16, %esp; enter $4, $0", {"ss": SMALL}, None),
    ("mov $13, %esp; ret", {"ss": SMALL}, SS),
    ("mov $0x10010, %esp; push %eax", {"ss": Segment(DATA0, BASE, 15, RIGHTS_DATA16)}, None),
]


def vector(bits: Bits, code: str, segments: dict[str, Segment]) -> int | None:
    """The exception that the code gets at its last instruction but HLT; None if it comes to that."""
    with Bench(code + "; hlt", bits=bits) as bench:
        bench.controls.exception_bitmap = ALL
        for name, segment in segments.items():
            setattr(bench.state, name, Segment(**segment_fields(segment)))
        exit = bench.run()
        if exit.reason is Reason.HLT:
            return None
        assert exit.interruption is not None, exit
        assert exit.interruption.error == (0 if bench.state.cr0 & CR0_PE else None)
        return exit.interruption.vector


def segment_fields(segment: Segment) -> dict[str, int]:
    return {name: getattr(segment, name) for name in segment.__struct_fields__}


@pytest.mark.parametrize(("code", "segments", "expected"), DATA + STACK)
def test_in_protected_mode(code: str, segments: dict[str, Segment], expected: int | None) -> None:
    assert vector(32, code, segments) == expected


@pytest.mark.parametrize(
    ("code", "segments", "expected"),
    [
        ("mov $0x10000, %ebx; mov (%ebx), %al", {}, GP),
        ("mov $0xffff, %ebx; mov (%ebx), %al", {}, None),
        ("mov $0xffff, %ebx; mov (%ebx), %ax", {}, GP),
        ("mov $0x10000, %ebx; mov (%ebx), %al", {"ds": Segment(0, 0, 0xFFFF_FFFF)}, None),
        ("mov $0x10000, %ebp; mov (%ebp), %al", {}, SS),
        ("mov 16, %al", {"ds": Segment(0, 0, 15)}, GP),
        ("mov 15, %al", {"ds": Segment(0, 0, 15)}, None),
    ],
)
def test_in_real_mode(code: str, segments: dict[str, Segment], expected: int | None) -> None:
    """Segments of 64 KiB; more (unreal), or less, where protected mode has left them."""
    assert vector(16, code, segments) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [("mov 0xffff, %al", None), ("mov 0xffff, %ax", GP), ("mov %al, %cs:0", GP)],
)
def test_in_16_bit_protected_mode(code: str, expected: int | None) -> None:
    with Bench(code + "; hlt", bits=16) as bench:
        bench.controls.exception_bitmap = ALL
        bench.state.cr0 |= CR0_PE
        bench.state.cs = Segment(8, 0, 0xFFFF, RIGHTS_CODE16)
        exit = bench.run()
        found = exit.interruption.vector if exit.interruption else None
        assert found == expected


@pytest.mark.parametrize(
    ("code", "rip"),
    [
        ("jmp 0x8100", 0x8000),
        ("jmp 0x80ff", None),
        ("xor %eax, %eax; je 0x8100", 0x8002),
        ("or $1, %eax; je 0x8100; jmp 0x80ff", None),
        ("mov $0x8100, %eax; jmp *%eax", 0x8005),
        ("mov $5, %ecx; .org 0x85; loop . + 125", 0x8085),
        ("call 0x9000", 0x8000),
        ("push $0x9000; ret", 0x8005),
        ("jmp 1f; .org 0xff; 1: nop", 0x8100),
        ("jmp 1f; .org 0xfe; 1: mov $1, %al; nop", None),
        ("jmp 1f; .org 0xff; 1: mov $1, %al", 0x80FF),
    ],
)
def test_a_code_segment_ends(code: str, rip: int | None) -> None:
    """The instruction that would leave it faults; and who runs over its end."""
    with Bench(code, bits=32) as bench:
        bench.load(b"\xf4", 0x80FF if "org" not in code else 0x8200)
        bench.controls.exception_bitmap = ALL
        bench.state.cs = Segment(**segment_fields(SHORT))
        before = bench.state.gpr[RSP]
        exit = bench.run()
        if rip is None:
            assert exit.reason is Reason.HLT or bench.state.rip == 0x8100
            return
        assert exit.interruption is not None
        assert (exit.interruption.vector, exit.interruption.error) == (GP, 0)
        assert bench.state.rip == rip
        assert bench.state.gpr[RSP] == before - (4 if "push" in code else 0)
        assert bench.state.gpr[RCX] == (5 if "loop" in code else 0)


def test_a_repeated_string_instruction_stops_at_the_end() -> None:
    with Bench("mov $6, %ecx; xor %edi, %edi; rep stosl; hlt", bits=32) as bench:
        bench.controls.exception_bitmap = ALL
        bench.state.es = SMALL
        exit = bench.run()
        assert exit.interruption is not None
        assert (bench.state.gpr[RCX], bench.state.gpr[RDI]) == (2, 16)
        assert exit.interruption.vector == GP


def test_a_segment_is_checked_from_the_instruction_that_loads_it() -> None:
    """And no more once it is flat again; the very same code."""
    code = "1: mov %eax, %fs; movl $7, %fs:13; mov $0x10, %eax; dec %ecx; jnz 1b; hlt"
    with Bench(code, bits=32) as bench:
        bench.memory.write_u64(GDT + 0x38, 0x0040_9302_0000_000F)
        bench.controls.exception_bitmap = ALL
        bench.state.gpr[RCX], bench.state.gpr[RAX] = 2, DATA0
        assert bench.run().reason is Reason.HLT
        bench.state.rip, bench.state.gpr[RCX], bench.state.gpr[RAX] = 0x8000, 1, 0x38
        exit = bench.run()
        assert exit.interruption is not None
        assert (exit.interruption.vector, bench.state.rip) == (GP, 0x8002)
        bench.state.rip, bench.state.gpr[RAX] = 0x8000, DATA0
        assert bench.run().reason is Reason.HLT


def test_flat_segments_cost_nothing() -> None:
    """Not one of these is replaced."""
    code = "mov $0x1000, %ecx; 1: push %eax; pop %ebx; mov %ebx, %fs:0x20000; loop 1b; hlt"
    with Bench(code, bits=32) as bench:
        bench.state.fs.base = 0x1000
        assert bench.run().reason is Reason.HLT
        assert bench.core.statistics.instructions_replaced == 0
        assert bench.core.statistics.blocks_scanned < 10


def test_a_handler_beyond_its_code_segment() -> None:
    """SDM vol. 3A §6.12.1.2 and vol. 2A, INT: #GP(EXT)."""
    with Bench("int $0x20", bits=32) as bench:
        bench.memory.write_u64(GDT + 0x38, 0x0040_9B00_0000_00FF)
        bench.memory.write_u64(0x5000 + 8 * 0x20, 0x0000_8E00_0038_9000)
        bench.controls.exception_bitmap = ALL
        exit = bench.run()
        assert exit.interruption is not None
        assert (exit.interruption.vector, exit.interruption.error) == (GP, 0)
