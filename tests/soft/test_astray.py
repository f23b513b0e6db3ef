"""Branches to addresses that are not canonical: #GP of the branch itself, which leaves nothing behind.

Also when its delivery exits (shadow paging: the IDT's page is in no table of ours yet), and as KVM has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import CODE, TinyGuest, assemble, set_mode
from hostel.abi import kvm as abi
from hostel.hypervisor import HaltExit, InternalError, Vcpu
from hostel.memory import GuestMemory
from hostel.soft.core.astray import entered, last_branch, made_canonical
from hostel.soft.vm import System
from hostel.spec import Paging, Trap
from soft.mini_subjects import IN_TESTBED, INTERPRETED

STACK = 0x7000
WILD = (0x1234_0000_0000_1000, 0xFFFF_7000_0000_0000, 0x8000_0000_0000)
PROGRAM = """
    mov $0xc0000080, %ecx
    rdmsr
    or $1, %eax
    wrmsr
    lgdt gdtr
    lidt idtr
    movw $handler, 0x200d0
    movw $8, 0x200d2
    movl $0x8e00, 0x200d4
    movq $0, 0x200d8
    mov $0x7000, %esp
    movabs $TARGET, %rax
    mov %rax, there
    mov $at, %esi
    PREPARE
    mov %rsp, %rdi
    mov %rax, %rcx
    INVALIDATE
at: INSTRUCTION
    hlt
handler:
    mov (%rsp), %rbx
    mov 8(%rsp), %rcx
    mov 32(%rsp), %rdx
    hlt
there: .quad 0
gdtr: .word 23; .quad gdt
idtr: .word 0xfff; .quad 0x20000
    .balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
"""
NEAR = {
    "jmp *%rax": "",
    "jmp *there": "",
    "call *%rax": "",
    "ret": "push %rax",
    "ret $16": "push %rax",
}
FAR = {
    "lretq": "push $8; push %rax",
    "iretq": "push $16; push $0x6000; push $2; push $8; push %rax",
}
CHECKS_FIRST = INTERPRETED or (
    not IN_TESTBED and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
)
WAYS = [(paging, trap) for paging in get_args(Paging) for trap in get_args(Trap)]

Host = Callable[[bytes], AbstractContextManager[Vcpu]]


def program(instruction: str, prepare: str, target: int, *, absent: bool) -> bytes:
    source = PROGRAM.replace("TARGET", hex(target)).replace("PREPARE", prepare)
    source = source.replace("INVALIDATE", "invlpg 0x20000" if absent else "")
    return assemble(source.replace("INSTRUCTION", instruction))


def on_soft(paging: Paging, trap: Trap) -> Host:
    @contextmanager
    def host(code: bytes) -> Iterator[Vcpu]:
        with (
            GuestMemory(4 << 20) as memory,
            closing(System(paging=paging, trap=trap)) as system,
            closing(system.create_vm()) as vm,
        ):
            for slot, region in enumerate(memory.regions):
                vm.map(slot, region)
            memory.write(CODE, code)
            with closing(vm.create_vcpu(0)) as vcpu:
                vcpu.set_cpuid(system.supported_cpuid())
                set_mode(vcpu, memory, 64)
                vcpu.set_regs(abi.Regs(rip=CODE, rflags=2, rsp=STACK))
                yield vcpu

    return host


@contextmanager
def on_kvm(code: bytes) -> Iterator[Vcpu]:
    with TinyGuest(code) as guest:
        yield guest.vcpu


def fault(host: Host, code: bytes) -> tuple[int, int, int]:
    """Error code; how far the RIP and the RSP saved are from those before."""
    with host(code) as vcpu:
        exit = vcpu.run()
        assert isinstance(exit, HaltExit), exit
        regs = vcpu.get_regs()
        return regs.rbx, regs.rcx - regs.rsi, regs.rdx - regs.rdi


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("target", WILD)
@pytest.mark.parametrize(("paging", "trap"), WAYS)
def test_a_near_branch(paging: Paging, trap: Trap, target: int, absent: bool) -> None:
    for instruction, prepare in NEAR.items():
        code = program(instruction, prepare, target, absent=absent)
        assert fault(on_soft(paging, trap), code) == (0, 0, 0), instruction


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("paging", get_args(Paging))
def test_a_far_one_by_translation(paging: Paging, absent: bool) -> None:
    for instruction, prepare in (FAR | {"sysretq": ""}).items():
        code = program(instruction, prepare, WILD[0], absent=absent)
        assert fault(on_soft(paging, "translate"), code) == (0, 0, 0), instruction


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("paging", get_args(Paging))
def test_a_far_one_by_intercept(paging: Paging, absent: bool) -> None:
    """It has happened, and goes on at no address that cannot be entered."""
    for instruction, prepare in FAR.items():
        code = program(instruction, prepare, WILD[0], absent=absent)
        with on_soft(paging, "intercept")(code) as vcpu:
            assert isinstance(vcpu.run(), HaltExit), instruction
            assert vcpu.get_regs().rcx == made_canonical(WILD[0])
    with on_soft(paging, "intercept")(program("sysretq", "", WILD[0], absent=absent)) as vcpu:
        assert not isinstance(vcpu.run(), InternalError)


@pytest.mark.kvm
@pytest.mark.skipif(not CHECKS_FIRST, reason="a processor that looks when it fetches, as AMD's do")
@pytest.mark.parametrize("instruction", NEAR)
def test_as_kvm_does_it(instruction: str) -> None:
    code = program(instruction, NEAR[instruction], WILD[0], absent=False)
    assert fault(on_kvm, code) == (0, 0, 0)


@pytest.mark.parametrize("load", ["lidt", "lgdt"])
@pytest.mark.parametrize(("paging", "trap"), WAYS)
def test_a_table_that_is_nowhere(paging: Paging, trap: Trap, load: str) -> None:
    """VM entry would refuse it too."""
    code = program(f"{load} there - 2", "", WILD[0], absent=False)
    assert fault(on_soft(paging, trap), code) == (0, 0, 0)


def test_the_last_branch() -> None:
    code = assemble("nop; ret $16")
    found = last_branch(code)
    assert found is not None
    assert (found.offset, found.stack) == (1, 24)
    assert last_branch(code[:-1]) is None
    assert last_branch(assemble("1: nop; loop 1b")) is None


def test_what_vm_entry_takes() -> None:
    assert [entered(rip) for rip in WILD] == [False, True, True]
    assert made_canonical(WILD[0]) == 0x1000
    assert made_canonical(0x1234_8000_0000_0000) == 0xFFFF_8000_0000_0000
