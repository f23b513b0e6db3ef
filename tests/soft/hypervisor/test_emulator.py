"""The hypervisor's emulator against a real processor's answers: the host's, by the same instruction.

Each case is one instruction with a memory operand. The host's KVM runs it on memory; the emulator on a dict.
"""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from guests.tiny import TinyGuest, assemble
from hostel.hypervisor import PioExit
from hostel.soft.hypervisor import emulator
from hostel.soft.hypervisor.emulator import Unemulated

DEVICE = 0x20_0000
NAMES = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
ARITHMETIC = 0x8D5
START = [0x1122_3344_5566_7788 * (n + 1) % (1 << 64) for n in range(16)]
MEMORY = bytes(range(0xF0, 0x100)) + bytes(range(0x70, 0x80))


class Cpu:
    """``emulator.Cpu`` with 32 bytes of memory."""

    def __init__(self, source: str) -> None:
        self.code = assemble(source)
        self.rip, self.rflags, self.bits = 0x8000, 2, 64
        self.registers = start()
        self.memory = bytearray(MEMORY)
        self.stored: list[bytes] = []

    def register(self, number: int) -> int:
        return self.registers[number]

    def set_register(self, number: int, value: int) -> None:
        self.registers[number] = value

    def segment_base(self, name: str) -> int:
        return 0

    def fetch(self, linear: int, size: int) -> bytes:
        return self.code.ljust(size, b"\x90")

    def load(self, linear: int, size: int) -> bytes:
        at = linear - DEVICE
        return bytes(self.memory[at : at + size])

    def store(self, linear: int, data: bytes) -> None:
        at = linear - DEVICE
        self.stored.append(data)
        self.memory[at : at + len(data)] = data


def start() -> list[int]:
    """RBX and RDI at the memory, RSI in its second half, RCX a small number."""
    registers = [*START]
    registers[1], registers[3], registers[4] = 3, DEVICE, 0x8000
    registers[6], registers[7] = DEVICE + 16, DEVICE
    return registers


INSTRUCTIONS = (
    *("mov %eax, (%rbx)", "mov (%rbx), %eax", "mov %ah, 1(%rbx)", "mov 3(%rbx), %dh"),
    *(
        "mov (%rbx), %dx",
        "mov %r9, (%rbx)",
        "movl $-2, 4(%rbx)",
        "movq $-2, (%rbx)",
        "movb $7, (%rbx)",
    ),
    *("movzbl (%rbx), %eax", "movzwq (%rbx), %r8", "movsbl (%rbx), %eax", "movsbw (%rbx), %ax"),
    *("movslq (%rbx), %rdx", "movnti %eax, (%rbx)", "mov 2(%rbx,%rcx,4), %eax"),
    *("orl $0x100, (%rbx)", "andb $0xf, (%rbx)", "add %rax, (%rbx)", "sub (%rbx), %edx"),
    *(
        "lock addl $1, (%rbx)",
        "xorw %ax, (%rbx)",
        "cmpl $0, (%rbx)",
        "cmp %al, (%rbx)",
        "test %eax, (%rbx)",
    ),
    *("xchg %eax, (%rbx)", "lock xadd %edx, (%rbx)", "lock cmpxchg %edx, (%rbx)", "incb (%rbx)"),
    *(
        "decq (%rbx)",
        "notl (%rbx)",
        "negl (%rbx)",
        "shll $3, (%rbx)",
        "btsl $5, (%rbx)",
        "btl $9, (%rbx)",
    ),
    *("imul (%rbx), %eax", "setc (%rbx)", "cmovz (%rbx), %eax", "bsf (%rbx), %eax", "mull (%rbx)"),
    *("stosb", "stosl", "stosq", "lodsb", "lodsl", "movsb", "movsq", "rep movsb", "rep stosw"),
    *("rep lodsw", "std; stosw"),
)


def on_kvm(source: str) -> tuple[list[int], int, bytes]:
    with TinyGuest(f"{source}; out %al, $0x10") as guest:
        guest.memory.write(DEVICE, MEMORY)
        regs = guest.vcpu.get_regs()
        for name, value in zip(NAMES, start(), strict=True):
            setattr(regs, name, value)
        guest.vcpu.set_regs(regs)
        assert isinstance(guest.run(), PioExit)
        regs = guest.vcpu.get_regs()
        return [getattr(regs, name) for name in NAMES], regs.rflags, guest.memory.read(DEVICE, 32)


UNDEFINED = {"imul": 0xD4, "mull": 0xD4, "bsf": 0x895, "btsl": 0x8D4, "btl": 0x8D4, "shll": 0x810}
"""Flags that the manual leaves undefined."""


@pytest.mark.kvm
@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_as_a_processor_does_it(source: str) -> None:
    cpu = Cpu(source.removeprefix("std; "))
    if source.startswith("std"):
        cpu.rflags |= 1 << 10
    end = 0x8000 + len(cpu.code)
    for _ in range(10):
        emulator.step(cpu)
        if cpu.rip == end:
            break
    registers, flags, memory = on_kvm(source)
    assert cpu.rip == end
    assert [hex(value) for value in cpu.registers] == [hex(value) for value in registers]
    assert bytes(cpu.memory) == memory
    known = ARITHMETIC & ~UNDEFINED.get(source.split(maxsplit=1)[0], 0)
    assert (cpu.rflags ^ flags) & known == 0


def test_rep_is_one_item_at_a_time() -> None:
    cpu = Cpu("rep stosb")
    emulator.step(cpu)
    assert (cpu.registers[1], cpu.rip, len(cpu.stored)) == (2, 0x8000, 1)


def test_rep_with_nothing_to_do() -> None:
    cpu = Cpu("rep stosb")
    cpu.registers[1] = 0
    emulator.step(cpu)
    assert (cpu.rip, cpu.stored) == (0x8002, [])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("movaps (%rbx), %xmm0", "xmm0"),
        ("fldl (%rbx)", "fld"),
        ("push (%rbx)", "push"),
        ("mov (%rbx), %ds", "ds"),
        ("mov %ds, (%rbx)", "ds"),
        ("lfs (%rbx), %eax", "lfs"),
        ("jmp *(%rbx)", "jmp"),
    ],
)
def test_what_it_cannot_do_it_names(source: str, word: str) -> None:
    cpu = Cpu(source)
    with pytest.raises(Unemulated, match=word):
        emulator.step(cpu)
    assert (cpu.registers, cpu.rip) == (start(), 0x8000)


@pytest.mark.parametrize("address", [0x1000, 0x2000])
def test_an_operand_by_register_is_not_looked_for_in_the_scratch_memory(address: int) -> None:
    cpu = Cpu("scasb (%rdi), %al")
    cpu.registers[7] = address
    with pytest.raises(Unemulated, match="scas"):
        emulator.step(cpu)
    assert cpu.rip == 0x8000


def test_an_invalid_instruction_does_not_spoil_the_next() -> None:
    """0xF7 /1 is TEST by another name; the scratch processor does not know it."""
    for source in (".byte 0xf7, 0x0b, 1, 0, 0, 0", "imul $41, (%rbx), %eax"):
        cpu = Cpu(source)
        if source.startswith(".byte"):
            with pytest.raises(Unemulated, match="test"):
                emulator.step(cpu)
        else:
            emulator.step(cpu)
            assert cpu.rip > 0x8000


def test_a_load_that_fails_changes_nothing() -> None:
    class Refuses(Exception):
        pass

    def refuse(linear: int, size: int) -> bytes:
        raise Refuses

    cpu = Cpu("lock xadd %edx, (%rbx)")
    cpu.load = refuse  # type: ignore[method-assign]
    with pytest.raises(Refuses):
        emulator.step(cpu)
    assert (cpu.registers, cpu.rip, cpu.stored) == (start(), 0x8000, [])
