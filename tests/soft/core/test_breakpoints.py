"""Hardware breakpoints on the core by translation: DR0 to DR3, DR7, and what #DB leaves in DR6."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import Bits
from hostel.soft.exceptions import DB
from hostel.soft.silicon import Reason
from hostel.soft.state import RAX, RBX, RCX, RDX, RFLAGS_RF, RFLAGS_TF
from soft.core.core_rig import Bench

DATA = 0x20000
FETCH, WRITE, EITHER = 0, 1, 3
LENGTH = {1: 0, 2: 1, 8: 2, 4: 3}
STEP, DETECT = 1 << 14, 1 << 13
NOTE = "mov %dr6, %rdx; mov (%rsp), %rcx; inc %ebx; hlt"
"""The handler: DR6, where to go on, how often."""


def dr7(kind: int, size: int = 1, number: int = 0) -> int:
    return 0x400 | 2 << 2 * number | (kind | LENGTH[size] << 2) << 16 + 4 * number


def hit(code: str, address: int, control: int, bits: Bits = 64) -> tuple[int, int] | None:
    """DR6's low bits and the offset in the code where #DB came; None if it did not."""
    with Bench(code + "; hlt", bits=bits) as bench:
        bench.controls.exception_bitmap = 1 << DB
        bench.state.dr[:] = [address] * 4
        bench.state.dr7 = control
        exit = bench.run()
        if exit.reason is Reason.HLT:
            return None
        assert exit.interruption is not None, exit
        assert exit.interruption.vector == DB
        return exit.qualification, bench.state.rip - 0x8000


@pytest.mark.parametrize(
    ("code", "address", "control", "expected"),
    [
        ("nop; nop; nop", 0x8002, dr7(FETCH), (1, 2)),
        ("nop; nop; nop", 0x8002, dr7(FETCH, number=2), (4, 2)),
        ("mov $1, %eax", 0x8002, dr7(FETCH), None),
        ("mov %al, 0x20000", DATA, dr7(WRITE), (1, 7)),
        ("mov 0x20000, %al", DATA, dr7(WRITE), None),
        ("mov 0x20000, %al", DATA, dr7(EITHER), (1, 7)),
        ("mov %al, 0x20003", DATA, dr7(WRITE, 4), (1, 7)),
        ("mov %al, 0x20004", DATA, dr7(WRITE, 4), None),
        ("mov %rax, 0x1fffc", DATA, dr7(WRITE), (1, 8)),
        ("mov %al, 0x20007", DATA, dr7(WRITE, 8, number=3), (8, 7)),
        ("incl 0x20000", DATA, dr7(WRITE, 4), (1, 7)),
        ("mov $0x20008, %esp; push %rax", DATA, dr7(WRITE, 8), (1, 6)),
        ("mov %al, 1f(%rip); 1: nop", 0x8006, dr7(WRITE), (1, 6)),
        ("mov $0x1fffe, %edi; mov $5, %ecx; rep stosb", DATA, dr7(WRITE), (1, 10)),
        ("mov $0x20000, %edi; xor %ecx, %ecx; rep stosb", DATA, dr7(WRITE), None),
        ("mov %al, 0x20000", DATA, 0x400 | WRITE << 16, None),
    ],
)
def test_what_hits(code: str, address: int, control: int, expected: tuple[int, int] | None) -> None:
    assert hit(code, address, control) == expected


def test_in_32_bit_code_addresses_are_linear() -> None:
    with Bench("mov %eax, 0x20000; hlt", bits=32) as bench:
        bench.controls.exception_bitmap = 1 << DB
        bench.state.ds.base = 0x1000
        bench.state.dr[1], bench.state.dr7 = 0x21000, dr7(WRITE, 4, number=1)
        assert bench.run().qualification == 2


def test_the_guests_handler_sees_dr6_and_goes_on_by_rf() -> None:
    """A fault before the instruction; the handler sets RF in the image, and it is executed."""
    with Bench("nop; inc %eax; hlt") as bench:
        bench.handlers("mov %dr6, %rdx; orl $0x10000, 16(%rsp); iretq", DB)
        bench.state.dr[0], bench.state.dr7 = 0x8001, dr7(FETCH)
        assert bench.run().reason is Reason.HLT
        assert (bench.state.gpr[RDX] & 0xF, bench.state.gpr[RAX]) == (1, 1)
        assert not bench.state.rflags & RFLAGS_RF


def test_a_step_onto_data_tells_both() -> None:
    with Bench("mov %al, 0x20000; hlt") as bench:
        bench.handlers(NOTE, DB)
        bench.state.rflags |= RFLAGS_TF
        bench.state.dr[0], bench.state.dr7 = DATA, dr7(WRITE)
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RDX] & (STEP | 0xF) == STEP | 1
        assert (bench.state.gpr[RCX], bench.state.gpr[RBX]) == (0x8007, 1)


def test_general_detect() -> None:
    with Bench("mov %dr0, %rax; hlt") as bench:
        bench.handlers("mov %dr6, %rdx; mov %dr7, %rcx; hlt", DB)
        bench.state.dr7 = 0x400 | DETECT
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RDX] & DETECT
        assert not bench.state.gpr[RCX] & DETECT


def test_armed_by_the_guest_itself() -> None:
    code = "mov $0x20000, %eax; mov %rax, %dr0; mov $0x10402, %eax; mov %rax, %dr7; mov %al, 0x20000; hlt"
    with Bench(code) as bench:
        bench.handlers(NOTE, DB)
        assert bench.run().reason is Reason.HLT
        assert (bench.state.gpr[RDX] & 0xF, bench.state.gpr[RBX]) == (1, 1)
        replaced = bench.core.statistics.instructions_replaced
        bench.state.dr7, bench.state.rip = 0x400, 0x8000 + 16
        assert bench.run().reason is Reason.HLT
        assert bench.core.statistics.instructions_replaced <= replaced + 1


def test_a_fault_is_no_hit() -> None:
    """The access did not happen."""
    with Bench("mov %al, 0x40000000; hlt") as bench:
        bench.memory.write_u64(0x2008, 0)
        bench.controls.exception_bitmap = 1 << DB
        bench.handlers("hlt", 14)
        bench.state.dr[0], bench.state.dr7 = 0x4000_0000, dr7(WRITE)
        exit = bench.run()
        assert exit.reason is Reason.HLT
        assert bench.state.rip == 0x9000
