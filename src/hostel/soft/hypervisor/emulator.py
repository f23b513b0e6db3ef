"""One instruction, carried out by the hypervisor because its memory operand is a device (or ROM).

::

    decode ── read its memory operands ── compute ── write memory ── write registers, RIP
              (may have to wait for the monitor)      (nothing has changed before this)

Moves and string instructions are computed here. Every other instruction with one memory operand and
general registers is computed by a processor of its own: encoded again with its operand at a scratch
address, run there, and its registers, flags and operand taken over. So its flags are a processor's.

What is left (SSE and x87 operands, far branches, two memory operands) is ``Unemulated``: it names itself.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from threading import Lock
from typing import Any, Protocol

import iced_x86 as iced
from iced_x86 import Mnemonic, Register

from hostel.soft.state import RAX, RCX, RDI, RFLAGS_DF, RSI

LONGEST = 15
"""Bytes of an instruction."""
_CODE, _SLOT = 0x1000, 0x2000
_ARITHMETIC = 0x8D5
"""CF, PF, AF, ZF, SF, OF."""
_U64 = (1 << 64) - 1
_registers: Any = iced.RegisterExt
_HIGH_BYTES: dict[int, int] = {Register.AH: 0, Register.CH: 1, Register.DH: 2, Register.BH: 3}
_SEGMENTS: dict[int, str] = {
    Register.ES: "es",
    Register.CS: "cs",
    Register.SS: "ss",
    Register.DS: "ds",
    Register.FS: "fs",
    Register.GS: "gs",
}
_READS = {
    *(iced.OpAccess.READ, iced.OpAccess.COND_READ),
    *(iced.OpAccess.READ_WRITE, iced.OpAccess.READ_COND_WRITE),
}
_WRITES = {
    *(iced.OpAccess.WRITE, iced.OpAccess.COND_WRITE),
    *(iced.OpAccess.READ_WRITE, iced.OpAccess.READ_COND_WRITE),
}
_MOVES = {Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVSX, Mnemonic.MOVSXD, Mnemonic.MOVNTI}
_SIGNED = {Mnemonic.MOVSX, Mnemonic.MOVSXD}
_STRINGS = {
    **dict.fromkeys((Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ), "movs"),
    **dict.fromkeys((Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ), "stos"),
    **dict.fromkeys((Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ), "lods"),
}
_NOT_BY_SCRATCH = {Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC}
"""With a register as index they reach beyond their operand."""


_FLOATING = {
    *(iced.CpuidFeature.FPU, iced.CpuidFeature.FPU287, iced.CpuidFeature.FPU387),
    iced.CpuidFeature.SSE,
}
"""State that the scratch processor does not share."""


class Unemulated(Exception):
    """An instruction that this emulator cannot do, in assembly."""


class _Refused(Exception):
    """By the scratch processor."""


class Cpu(Protocol):
    """The registers of the vCPU, and its memory by linear address."""

    rip: int
    rflags: int

    @property
    def bits(self) -> int: ...
    def register(self, number: int) -> int: ...
    def set_register(self, number: int, value: int) -> None: ...
    def segment_base(self, name: str) -> int: ...
    def fetch(self, linear: int, size: int) -> bytes: ...
    def load(self, linear: int, size: int) -> bytes: ...
    def store(self, linear: int, data: bytes) -> None: ...


def step(cpu: Cpu) -> None:
    """Whatever ``load`` and ``store`` raise leaves the registers as they were."""
    instruction = decode(cpu)
    if instruction.is_string_instruction and instruction.mnemonic in _STRINGS:
        _string(cpu, instruction)
        return
    operand = _operand(instruction)
    linear = _linear(cpu, operand)
    if instruction.mnemonic in _MOVES and _is_plain_move(instruction):
        _move(cpu, instruction, operand, linear)
    else:
        _by_scratch(cpu, instruction, operand, linear)
    cpu.rip = _masked_ip(cpu, instruction.next_ip)


def decode(cpu: Cpu) -> iced.Instruction:
    base = 0 if cpu.bits == 64 else cpu.segment_base("cs")
    code = cpu.fetch(base + cpu.rip & _U64, LONGEST)
    return _decoded(code, cpu.bits, cpu.rip)


@lru_cache(1024)
def _decoded(code: bytes, bits: int, rip: int) -> iced.Instruction:
    """Kept, for who waits for a device asks it again and again."""
    instruction = iced.Decoder(bits, code, ip=rip).decode()
    if instruction.is_invalid:
        raise Unemulated(f"bytes {code.hex()} at {rip:#x}")
    return instruction


def _masked_ip(cpu: Cpu, rip: int) -> int:
    return rip & (_U64 if cpu.bits == 64 else 0xFFFF_FFFF if cpu.bits == 32 else 0xFFFF)


def _operand(instruction: iced.Instruction) -> Any:
    """Its one memory operand."""
    found = iced.InstructionInfoFactory().info(instruction).used_memory()
    if len(found) != 1 or not iced.MemorySizeExt.size(found[0].memory_size) <= 8:
        raise Unemulated(str(instruction))
    return found[0]


def _linear(cpu: Cpu, operand: Any) -> int:
    """Of a memory operand: the effective address, cut to the address size, plus the segment's base."""
    address = operand.displacement
    for register, scale in ((operand.base, 1), (operand.index, operand.scale)):
        if register not in (Register.NONE, Register.RIP, Register.EIP):
            address += get_register(cpu, register) * scale
    width = (64, 16, 32, 64)[operand.address_size]
    return segmented(cpu, operand.segment, address & (1 << width) - 1)


def segmented(cpu: Cpu, segment: int, address: int) -> int:
    name = _SEGMENTS[segment]
    if cpu.bits == 64:
        base = cpu.segment_base(name) if name in ("fs", "gs") else 0
        return base + address & _U64
    return cpu.segment_base(name) + address & 0xFFFF_FFFF


# --- Registers by iced's names ---


def get_register(cpu: Cpu, register: int) -> int:
    if register in _HIGH_BYTES:
        return cpu.register(_HIGH_BYTES[register]) >> 8 & 0xFF
    size: int = _registers.size(register)
    return cpu.register(_number(register)) & (1 << 8 * size) - 1


def put_register(cpu: Cpu, register: int, value: int) -> None:
    """As the processor does it: 32 bits clear the upper half, fewer leave the rest."""
    if register in _HIGH_BYTES:
        number = _HIGH_BYTES[register]
        cpu.set_register(number, cpu.register(number) & ~0xFF00 | (value & 0xFF) << 8)
        return
    number, size = _number(register), _registers.size(register)
    mask = (1 << 8 * size) - 1
    keep = cpu.register(number) & ~mask if size < 4 else 0
    cpu.set_register(number, keep | value & mask)


def _number(register: int) -> int:
    if not _registers.is_gpr(register):
        raise Unemulated(f"an instruction with the register {_registers.base(register)}")
    number: int = _registers.number(_registers.full_register(register))
    return number


# --- Moves ---


def _is_plain_move(instruction: iced.Instruction) -> bool:
    kinds = (instruction.op_kind(0), instruction.op_kind(1))
    registers = [instruction.op_register(n) for n in (0, 1) if kinds[n] == iced.OpKind.REGISTER]
    return all(map(_registers.is_gpr, registers))


def _move(cpu: Cpu, instruction: iced.Instruction, operand: Any, linear: int) -> None:
    size = iced.MemorySizeExt.size(operand.memory_size)
    if operand.access == iced.OpAccess.WRITE:
        if instruction.op_kind(1) == iced.OpKind.REGISTER:
            value = get_register(cpu, instruction.op_register(1))
        else:
            value = instruction.immediate(1)
        cpu.store(linear, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
    else:
        signed = instruction.mnemonic in _SIGNED
        value = int.from_bytes(cpu.load(linear, size), "little", signed=signed)
        put_register(cpu, instruction.op_register(0), value & _U64)


# --- String instructions: one iteration; RIP stays until a REP is done ---


def _string(cpu: Cpu, instruction: iced.Instruction) -> None:
    found = iced.InstructionInfoFactory().info(instruction).used_memory()
    width = (64, 16, 32, 64)[found[0].address_size]
    mask = (1 << width) - 1
    repeats = instruction.has_rep_prefix or instruction.has_repne_prefix
    if repeats and not cpu.register(RCX) & mask:
        cpu.rip = _masked_ip(cpu, instruction.next_ip)
        return
    kind = _STRINGS[instruction.mnemonic]
    size = iced.MemorySizeExt.size(instruction.memory_size)
    moved = {"movs": (RSI, RDI), "stos": (RDI,), "lods": (RSI,)}[kind]
    if kind == "stos":
        data = (cpu.register(RAX) & (1 << 8 * size) - 1).to_bytes(size, "little")
    else:
        source = segmented(cpu, instruction.memory_segment, cpu.register(RSI) & mask)
        data = cpu.load(source, size)
    if kind == "lods":
        low = (Register.AL, Register.AX, Register.EAX, Register.RAX)[size.bit_length() - 1]
        put_register(cpu, low, int.from_bytes(data, "little"))
    else:
        cpu.store(segmented(cpu, Register.ES, cpu.register(RDI) & mask), data)
    step = -size if cpu.rflags & RFLAGS_DF else size
    for number in moved:
        _advance(cpu, number, step, width)
    if repeats:
        _advance(cpu, RCX, -1, width)
    if not repeats or not cpu.register(RCX) & mask:
        cpu.rip = _masked_ip(cpu, instruction.next_ip)


def _advance(cpu: Cpu, number: int, change: int, width: int) -> None:
    mask, old = (1 << width) - 1, cpu.register(number)
    keep = old & ~mask if width == 16 else 0
    cpu.set_register(number, keep | old + change & mask)


# --- Everything else, by a processor of its own ---


def _by_scratch(cpu: Cpu, instruction: iced.Instruction, operand: Any, linear: int) -> None:
    if instruction.mnemonic in _NOT_BY_SCRATCH and instruction.op_kind(1) == iced.OpKind.REGISTER:
        raise Unemulated(str(instruction))
    if iced.OpKind.MEMORY not in map(instruction.op_kind, range(instruction.op_count)):
        raise Unemulated(str(instruction))  # its operand is by a register: it cannot be moved
    if instruction.flow_control != iced.FlowControl.NEXT or instruction.is_stack_instruction:
        raise Unemulated(str(instruction))
    if instruction.is_privileged or _FLOATING.intersection(instruction.cpuid_features()):
        raise Unemulated(str(instruction))
    for used in iced.InstructionInfoFactory().info(instruction).used_registers():
        as_base = used.register in _SEGMENTS and used.access not in _WRITES
        if not _registers.is_gpr(used.register) and not as_base:
            raise Unemulated(str(instruction))
    if any(instruction.op_register(at) in _SEGMENTS for at in range(instruction.op_count)):
        raise Unemulated(str(instruction))
    size = iced.MemorySizeExt.size(operand.memory_size)
    data = cpu.load(linear, size) if operand.access in _READS else bytes(size)
    scratch = _scratch(64 if cpu.bits == 64 else 32)
    registers = [cpu.register(number) for number in range(16)]
    try:
        with _scratch_lock:
            after, flags, data = scratch(_relocated(instruction), registers, cpu.rflags, data)
    except _Refused:
        _scratch.cache_clear()  # it would keep an invalid instruction's translation over a write
        raise Unemulated(str(instruction)) from None
    if operand.access in _WRITES:
        cpu.store(linear, data)
    for number, value in enumerate(after):
        if value != registers[number]:
            cpu.set_register(number, value)
    cpu.rflags = cpu.rflags & ~_ARITHMETIC | flags & _ARITHMETIC


def _relocated(instruction: iced.Instruction) -> iced.Instruction:
    """The same, with its memory operand in the slot."""
    moved = instruction.copy()
    moved.memory_base = moved.memory_index = Register.NONE
    moved.segment_prefix = Register.NONE
    moved.memory_displacement = _SLOT
    moved.memory_displ_size = 4
    return moved


_scratch_lock = Lock()
"""One processor for the machines of all threads."""


@cache
def _scratch(bits: int) -> Any:
    """A processor without a machine: two pages, flat segments."""
    unicorn: Any = import_module("unicorn")
    x86: Any = import_module("unicorn.x86_const")
    engine = unicorn.Uc(
        unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if bits == 64 else unicorn.UC_MODE_32
    )
    engine.mem_map(_CODE, 0x2000)
    names = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"]
    names = (
        [f"R{name}" for name in (*names, *range(8, 16))] if bits == 64 else [f"E{n}" for n in names]
    )
    numbers = [getattr(x86, f"UC_X86_REG_{name}") for name in names]
    encoder = iced.Encoder(bits)

    def run(
        instruction: iced.Instruction, registers: list[int], flags: int, data: bytes
    ) -> tuple[list[int], int, bytes]:
        try:
            encoder.encode(instruction, _CODE)
            code = encoder.take_buffer()
            engine.mem_write(_CODE, code)
            engine.mem_write(_SLOT, data)
            for number, value in zip(numbers, registers, strict=False):
                engine.reg_write(number, value & (1 << bits) - 1)
            engine.reg_write(x86.UC_X86_REG_EFLAGS, flags & (_ARITHMETIC | RFLAGS_DF) | 2)
            engine.emu_start(_CODE, _CODE + len(code), count=1)
        except (ValueError, unicorn.UcError):
            raise _Refused from None
        after = [engine.reg_read(number) for number in numbers] + registers[len(numbers) :]
        return (
            after,
            engine.reg_read(x86.UC_X86_REG_EFLAGS),
            bytes(engine.mem_read(_SLOT, len(data))),
        )

    return run
