"""The instruction that exited: its bytes, its length, its operands (SVM has no decode assists here).

The bytes are taken through the core's own TLB, which has just fetched them, so that no table is walked
and no accessed bit set; only a page that it has dropped again is walked, by software.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from iced_x86 import Decoder, Instruction, Register, Register_, RegisterExt

from hostel.soft.physical import PAGE
from hostel.soft.state import CR4_SMAP, RFLAGS_AC, CpuState

_TLB = 0x8A10
"""In CPUState: for each MMU index, a mask of the table's size and the table (CPUTLBDescFast)."""
_CODE, _ADDEND = 16, 32
LONGEST = 15
_SEGMENTS = {
    Register.ES: "es",
    Register.CS: "cs",
    Register.SS: "ss",
    Register.DS: "ds",
    Register.FS: "fs",
    Register.GS: "gs",
}
_SEGMENT_NUMBERS = {"es": 0, "cs": 1, "ss": 2, "ds": 3, "fs": 4, "gs": 5}


class Fetcher:
    """Reads code as the core sees it."""

    def __init__(self, cpu: int, walk: Callable[[CpuState, int, int], bytes]) -> None:
        self._cpu, self._walk = cpu, walk
        self._decoded: dict[tuple[int, bytes], Instruction] = {}
        self.read = 0
        """Bytes that could be had for the last one."""

    def instruction(self, state: CpuState) -> Instruction:
        """At RIP. Its code is ``Code.INVALID`` if it is none, or its bytes cannot be had."""
        bits = state.bits
        linear = state.rip if bits == 64 else state.cs.base + state.rip & 0xFFFF_FFFF
        data = self._bytes(state, linear, LONGEST)
        self.read = len(data)
        instruction = self._decoded.get((bits, data))
        if instruction is None:
            if len(self._decoded) > 4096:
                self._decoded.clear()
            instruction = Decoder(bits, data).decode()
            self._decoded[bits, data] = instruction
        return instruction

    def _bytes(self, state: CpuState, linear: int, size: int) -> bytes:
        inside = min(size, PAGE - (linear & PAGE - 1))
        data = self._peek(state, linear, inside)
        if inside < size and len(data) == inside:
            data += self._peek(state, linear + inside, size - inside)
        return data

    def _peek(self, state: CpuState, linear: int, size: int) -> bytes:
        """Through the TLB entry for instruction fetches (QEMU's CPUTLBEntry)."""
        fast = self._cpu + _TLB + 16 * _mmu_index(state)
        mask, table = (ctypes.c_uint64 * 2).from_address(fast)
        entry = table + (linear >> 12 << 6 & mask)
        code = ctypes.c_uint64.from_address(entry + _CODE).value
        if code & ~0xFFF != linear & ~0xFFF or code & 0x800:
            return self._walk(state, linear, size)
        addend = ctypes.c_uint64.from_address(entry + _ADDEND).value
        return ctypes.string_at(linear + addend & 0xFFFF_FFFF_FFFF_FFFF, size)


def _mmu_index(state: CpuState) -> int:
    """QEMU's: 0 supervisor under SMAP, 1 user, 2 supervisor."""
    if state.cpl == 3:
        return 1
    return 0 if state.cr4 & CR4_SMAP and not state.rflags & RFLAGS_AC else 2


def number(register: Register_) -> int:
    """Of a general register: its position in ``CpuState.gpr``."""
    return RegisterExt.number(register)


def address_size(instruction: Instruction, bits: int) -> int:
    """In bits, of the memory operand."""
    base = instruction.memory_base or instruction.memory_index
    if base in (Register.RIP, Register.EIP):
        return 64 if base == Register.RIP else 32
    if base:
        return RegisterExt.size(base) * 8
    if instruction.memory_displ_size:
        return instruction.memory_displ_size * 8 if instruction.memory_displ_size > 1 else bits
    return bits


def linear_address(instruction: Instruction, state: CpuState) -> int:
    """Of the memory operand."""
    return segment_base(instruction, state) + effective_address(instruction, state) & (
        (1 << 64) - 1 if state.bits == 64 else 0xFFFF_FFFF
    )


def effective_address(instruction: Instruction, state: CpuState) -> int:
    base, index = instruction.memory_base, instruction.memory_index
    total = instruction.memory_displacement
    if base in (Register.RIP, Register.EIP):
        total += state.rip  # it was decoded as if at 0: the displacement counts from there
    elif base:
        total += state.gpr[number(base)]
    if index:
        total += state.gpr[number(index)] * instruction.memory_index_scale
    return total & (1 << address_size(instruction, state.bits)) - 1


def segment_base(instruction: Instruction, state: CpuState) -> int:
    name = _SEGMENTS.get(instruction.memory_segment, "ds")
    if state.bits == 64 and name not in ("fs", "gs"):
        return 0
    base: int = getattr(state, name).base
    return base


def segment_number(instruction: Instruction) -> int:
    return _SEGMENT_NUMBERS[_SEGMENTS.get(instruction.memory_segment, "ds")]
