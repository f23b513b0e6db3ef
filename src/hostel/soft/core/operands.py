"""The operands of one decoded instruction, on a ``CpuState``: registers, effective addresses, memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP, SS
from hostel.soft.silicon import Access
from hostel.soft.state import CR0_PE, CpuState, Segment

from .events import Fault, Memory

if TYPE_CHECKING:
    from iced_x86 import Instruction

_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
SIZES = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFF_FFFF, 64: 2**64 - 1}


@cache
def register(number: int) -> tuple[int, int]:
    """Of iced-x86's register: position in ``gpr`` (or its number), and size in bytes."""
    from iced_x86 import RegisterExt

    return RegisterExt.number(number), RegisterExt.size(number)  # type: ignore[arg-type]


@cache
def _memory_kind() -> int:
    from iced_x86 import OpKind

    return OpKind.MEMORY


@cache
def _rip_register() -> tuple[int, int]:
    from iced_x86 import Register

    return Register.RIP, Register.EIP


def is_memory(instruction: Instruction) -> bool:
    return instruction.op0_kind == _memory_kind()


def read_register(state: CpuState, number: int) -> int:
    at, size = register(number)
    return state.gpr[at] & SIZES[8 * size]


def write_register(state: CpuState, number: int, value: int) -> None:
    """A 32-bit write clears the upper half (SDM vol. 1 §3.4.1.1)."""
    at, size = register(number)
    mask = SIZES[8 * size]
    kept = 0 if size >= 4 else state.gpr[at] & ~mask
    state.gpr[at] = kept | value & mask


def segment(state: CpuState, number: int) -> Segment:
    found: Segment = getattr(state, _SEGMENTS[register(number)[0]])
    return found


def effective_address(state: CpuState, instruction: Instruction) -> int:
    """The offset that the instruction's memory operand names, within its address size."""
    base, index = instruction.memory_base, instruction.memory_index
    value = instruction.memory_displacement
    size = 8 if state.bits == 64 else 4
    if base in _rip_register():
        value += state.rip  # decoded at address 0, so the displacement counts from the instruction
        size = register(base)[1]
    elif base:
        value += read_register(state, base)
        size = register(base)[1]
    if index:
        value += read_register(state, index) * instruction.memory_index_scale
        size = register(index)[1]
    if not base and not index:
        size = instruction.memory_displ_size or size
    return value & SIZES[8 * max(size, 2)]


def linear(state: CpuState, number: int, offset: int, size: int, access: Access) -> int:
    """Segment:offset as a linear address, checked as far as the mode checks (SDM vol. 3A §5.3, §5.4)."""
    register_ = segment(state, number)
    wrong = SS if _SEGMENTS[register(number)[0]] == "ss" else GP
    if state.bits == 64:
        address = offset
        if _SEGMENTS[register(number)[0]] in ("fs", "gs"):
            address = (offset + register_.base) & SIZES[64]
        if address >> 47 not in (0, 0x1_FFFF):
            raise Fault(wrong, 0)
        return address
    expands_down = register_.rights & 0xC == 4
    outside = offset <= register_.limit if expands_down else offset + size - 1 > register_.limit
    writable = register_.rights & 0xA == 2 or not state.cr0 & CR0_PE
    if outside or not register_.usable or (access is Access.WRITE and not writable):
        raise Fault(wrong, 0)
    return (register_.base + offset) & SIZES[32]


def operand_address(state: CpuState, instruction: Instruction, size: int, access: Access) -> int:
    offset = effective_address(state, instruction)
    return linear(state, instruction.memory_segment, offset, size, access)


def read_operand(state: CpuState, memory: Memory, instruction: Instruction, size: int) -> int:
    """The first operand: a register, or ``size`` bytes of memory."""
    if not is_memory(instruction):
        return read_register(state, instruction.op0_register)
    address = operand_address(state, instruction, size, Access.READ)
    return memory.read(address, size, state.cpl == 3)


def write_operand(
    state: CpuState, memory: Memory, instruction: Instruction, size: int, value: int
) -> None:
    """``size`` counts for memory only: a register takes the value in its own size."""
    if not is_memory(instruction):
        write_register(state, instruction.op0_register, value)
        return
    address = operand_address(state, instruction, size, Access.WRITE)
    memory.write(address, size, value & SIZES[8 * size], state.cpl == 3)
