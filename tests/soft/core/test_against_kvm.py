"""Small sequences of instructions, on the core and on the host's KVM: the same registers, flags, memory."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import CODE, STACK, Bits, TinyGuest
from hostel.abi import kvm as abi
from hostel.hypervisor import HaltExit, InternalError
from hostel.soft.silicon import Primary, Reason
from hostel.soft.state import RSP, CpuState
from soft.core.core_rig import Bench

pytestmark = pytest.mark.kvm

DATA = 0x20000
_GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_DEFINED = 0x4C5
"""CF, PF, ZF, SF, DF: not AF and OF, which shifts leave undefined."""

CASES: list[tuple[Bits, str]] = [
    (64, "mov $0x7fffffff, %eax; add $1, %eax; adc %rax, %rbx; sbb %rcx, %rdx"),
    (64, "mov $-5, %rax; mov $3, %ecx; imul %rcx; mul %ecx; neg %rax; not %rdx"),
    (64, "mov $1000003, %eax; mov $97, %ecx; xor %edx, %edx; div %ecx; cltq; cqto; test %eax, %eax"),
    (64, "mov $0x123456789abcdef0, %rax; bswap %rax; rol $7, %rax; rcr $1, %rax; shld $5, %rax, %rbx"),
    (64, "mov $0x1000, %ecx; lea (%rcx,%rcx,8), %rdi; bsf %rcx, %rax; bsr %rcx, %rdx; bt $3, %rcx"),
    (64, "mov $0x20000, %rdi; mov $0x41, %al; mov $16, %ecx; cld; rep stosb; lea -16(%rdi), %rsi; "
         "mov $0x20100, %edi; mov $2, %ecx; rep movsq"),
    (64, "mov $0x20000, %rdi; movq $5, (%rdi); lock incq (%rdi); lock xaddq %rdi, (%rdi); "
         "mov 0x20000, %rax"),
    (64, "mov $0x20000, %rdi; movl $7, (%rdi); mov $7, %eax; mov $9, %ecx; lock cmpxchg %ecx, (%rdi)"),
    (64, "push $0x1234; pop %rax; call 1f; 1: pop %rbx; sub $1b, %rbx; pushf; pop %rcx"),
    (64, "mov $0x80, %ax; movsbl %al, %ebx; movzbl %al, %ecx; xchg %al, %ah; sete %dl; cmovs %ebx, %esi"),
    (64, "std; mov $0x20010, %edi; mov $3, %ecx; mov $0x55aa, %eax; rep stosw; cld"),
    (64, "smsw %eax; and $1, %eax; sidt 0x20000; str %ebx; sldt %ecx; mov %ds, %edx; mov %cs, %esi"),
    (64, "mov %cr0, %rax; and $0x80000001, %eax; mov %cr4, %rbx; and $0x20, %ebx; mov %cr3, %rcx"),
    (64, "mov $0xc0000080, %ecx; rdmsr; and $0x500, %eax; xor %edx, %edx"),
    (64, "cli; sti; pushf; pop %rax; cli; pushf; pop %rbx; xor %rbx, %rax"),
    (64, "mov $0xc0000102, %ecx; mov $0x1234, %eax; xor %edx, %edx; wrmsr; swapgs; swapgs; rdmsr"),
    (32, "mov $0x20000, %edi; movl $0x11223344, (%edi); xorb $0xff, 1(%edi); mov (%edi), %eax; aam; daa"),
    (32, "pushal; popal; pushfl; popl %eax; mov %cr0, %ebx; and $1, %ebx; "
         "push %ds; pop %ecx; xor %edx, %edx; bound %edx, 1f; jmp 2f; 1: .long 0, 9; 2: nop"),
    (32, "mov $5, %ecx; xor %eax, %eax; 1: add %ecx, %eax; loop 1b; enter $16, $0; leave; lahf; sahf"),
    (16, "mov $0x1234, %ax; mov %ax, %ds; mov %ds, %bx; push %bx; pop %cx; xor %ax, %ax; mov %ax, %ds; aad"),
    (16, "mov $0x9000, %bx; movw $0xbeef, (%bx); mov (%bx), %ax; ror $4, %ax; das; xlat"),
    (16, "xor %ax, %ax; mov %ax, %es; movw $1f, %es:0x80; movw $0, %es:0x82; int $0x20; jmp 2f; "
         "1: mov $77, %cx; iret; 2: pushf; pop %dx"),
    (16, "push $0; push $1f; lret; hlt; 1: mov $3, %si"),
]  # fmt: skip


def seeds() -> list[int]:
    return [0x1111_1111 * (number % 15) for number in range(16)]


def on_core(bits: Bits, code: str) -> tuple[list[int], int, bytes]:
    with Bench(code + "; hlt", bits=bits) as bench:
        bench.memory.write(DATA, bytes(4096))
        _start(bench.state, bits)
        bench.controls.primary |= Primary.MSR_BITMAPS
        bench.controls.msr_bitmap = bench.physical.allocate()
        exit = bench.run()
        assert exit.reason is Reason.HLT, exit
        mask = 2**64 - 1 if bits == 64 else 0xFFFF_FFFF
        gpr = [value & mask for value in bench.state.gpr[: 16 if bits == 64 else 8]]
        return gpr, bench.state.rflags & _DEFINED, bench.memory.read(DATA, 4096)


def _start(state: CpuState, bits: Bits) -> None:
    state.gpr[:] = seeds()
    state.gpr[RSP] = STACK
    state.idtr.limit = 0x3FF if bits == 16 else 0xFFFF
    state.idtr.base = 0
    state.tr.selector = 0
    state.cs.selector = 0 if bits == 16 else 8
    if bits != 16:
        for segment in (state.ds, state.es, state.ss, state.fs, state.gs):
            segment.selector = 16


def on_kvm(bits: Bits, code: str) -> tuple[list[int], int, bytes]:
    with TinyGuest(code + "; hlt", bits=bits) as guest:
        values = dict(zip(_GPR, seeds(), strict=True)) | {"rsp": STACK}
        guest.vcpu.set_regs(abi.Regs(rip=CODE, rflags=2, **values))
        exit = guest.run()
        if isinstance(exit, InternalError):
            pytest.skip(f"this host's KVM cannot emulate it: {exit}")
        assert isinstance(exit, HaltExit), exit
        regs = guest.vcpu.get_regs()
        gpr = [getattr(regs, name) for name in _GPR[: 16 if bits == 64 else 8]]
        return gpr, regs.rflags & _DEFINED, guest.memory.read(DATA, 4096)


@pytest.mark.parametrize(("bits", "code"), CASES)
def test_the_core_does_what_kvm_does(bits: Bits, code: str) -> None:
    assert on_core(bits, code) == on_kvm(bits, code)
