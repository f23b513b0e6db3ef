"""The engine's TLB grows with what the guest touches, and a flush between two misses changes nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.core import tlb
from hostel.soft.core.tlb import Tlb
from hostel.soft.silicon import Reason
from hostel.soft.state import RAX, RBX, RCX, RDX
from soft.core.core_rig import Bench

PAGES, ROUNDS = 1024, 100
TOUCH = f"""
    mov ${ROUNDS}, %edx
1:  mov $0x100000, %esi
    mov ${PAGES}, %ecx
2:  incl (%rsi)
    add $4096, %rsi
    dec %ecx
    jnz 2b
    dec %edx
    jnz 1b
    hlt
"""


def fills(pages: int) -> int:
    """Of a guest that touches so many pages, a hundred times each."""
    with Bench(TOUCH.replace(f"${PAGES},", f"${pages},"), size=8 << 20) as bench:
        assert bench.run().reason is Reason.HLT
        last = 0x100000 + 4096 * (pages - 1)
        assert bench.memory.read_u32(0x100000) == bench.memory.read_u32(last) == ROUNDS
        return bench.core.statistics.fills


def test_a_working_set_of_4_mib_is_asked_for_by_page_not_by_access() -> None:
    assert fills(PAGES) < 6 * PAGES  # not 100 times


def test_what_fits_is_asked_for_once() -> None:
    assert fills(128) < 128 + 8  # and code


def test_it_grows_to_its_limit_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlb, "LARGEST", 0)
    assert fills(PAGES) > (ROUNDS - 1) * PAGES


SPLIT = """
    mov $0x100ffd, %esi
    mov $0x200fff, %edi
    mov $3000, %ecx
    rep movsb
    mov $0x300ffc, %ebx
    movabs $0x1122334455667788, %rax
    mov %rax, (%rbx)
    lock addq $1, (%rbx)
    movups (%rbx), %xmm1
    movups %xmm1, 0x1000(%rbx)
    pushq 0x1000(%rbx)
    popq 0x2000(%rbx)
    mov $0x301ff0, %edi
    mov (%rdi), %rax
    mov 8(%rdi), %rdx
    mov $5, %ebx
    mov $6, %ecx
    lock cmpxchg16b (%rdi)
    mov 0x302ffc, %rax
    mov (%rdi), %rdx
    mov 8(%rdi), %rcx
    mov 0x201b02, %bl
    hlt
"""


def test_a_flush_at_each_miss_is_seen_by_no_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accesses across two pages, atomic and repeated ones."""
    flushed: list[Tlb] = []

    def at_once(self: Tlb) -> int:
        flushed.append(self)
        return 1

    monkeypatch.setattr(Tlb, "_enough", at_once)
    with Bench(SPLIT, size=8 << 20) as bench:
        bench.memory.write(0x101B00, b"\x5a")
        assert bench.run().reason is Reason.HLT
        gpr = bench.state.gpr
        assert gpr[RAX] == 0x1122334455667789
        assert (gpr[RDX], gpr[RCX], gpr[RBX]) == (5, 6, 0x5A)
    assert len(flushed) > 10
