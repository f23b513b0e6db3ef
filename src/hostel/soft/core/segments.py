"""Limits and types of segments in 16- and 32-bit code (SDM vol. 3A §5.3, §5.4): the translator knows none.

::

    hflags of the engine   26 ... 0 │ 27 DS  28 ES  29 SS  30 FS, GS  31 CS
                          its own   │ ours: this register's segment is *tight*

Blocks are known by their flags. So the same code has one translation for segments that let everything pass
(4 GiB, readable, writable: no cost), and another in which each instruction that reaches through a tight
one is replaced, like a sensitive one, and looked at here before it runs. With a tight code segment every
instruction is; and while hardware breakpoints are armed, in 64-bit code too. A write or a read through CS
is looked at in protected mode always.

In real mode a segment of 64 KiB is the usual one: there only operands with 32-bit addresses are looked at.
Who loads a segment register in protected mode is replaced too: the flags are made anew behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP, SS
from hostel.soft.state import RCX, RSP, CpuState

from .breakpoints import Touched
from .events import Fault
from .flags import HF_CS32, HF_CS64, HF_PE, HF_SS32, TIGHT, TIGHT_CS
from .operands import SIZES, register

if TYPE_CHECKING:
    from iced_x86 import Instruction, UsedMemory

    from .env import Env

ORDER = ("es", "cs", "ss", "ds", "fs", "gs")
_BITS = (1 << 28, TIGHT_CS, 1 << 29, 1 << 27, 1 << 30, 1 << 30)
_CS, _SS, _FS = 1, 2, 4
PARTS = Struct("<" + "16xII" * 6)
"""Limit and rights of each, where the engine keeps them."""
BASES = Struct("<" + "8xQ8x" * 6)
_FLAT_LIMIT, _REAL_LIMIT = 0xFFFF_FFFF, 0xFFFF
_PRESENT, _CODE, _DOWN_OR_CONFORMING, _WRITABLE_OR_READABLE, _BIG = 0x80, 8, 4, 2, 1 << 14
_FLAT_KIND, _FLAT = 0x9E, 0x92
"""Present, a segment of data that grows up and may be written."""


def tight(hflags: int, parts: tuple[int, ...]) -> int:
    """The bits of the registers whose segments have to be checked."""
    if hflags & HF_CS64:
        return 0
    limits, rights = parts[::2], parts[1::2]
    usual = _FLAT_LIMIT if hflags & HF_CS32 and hflags & HF_PE else _REAL_LIMIT
    found = TIGHT_CS if limits[_CS] < usual else 0
    for number, bit in enumerate(_BITS):
        if number == _CS:
            continue
        if limits[number] != _FLAT_LIMIT:
            found |= bit
        if not hflags & HF_PE:
            if limits[number] < _REAL_LIMIT:
                found |= TIGHT_CS  # left from protected mode: look at everything
        elif rights[number] >> 8 & _FLAT_KIND != _FLAT:
            found |= bit
    return found


def runs_over(state: CpuState) -> bool:
    """CS.base + EIP has more than the 32 bits it is cut to outside of 64-bit mode (SDM vol. 1 §3.3.7)."""
    return bool(state.bits != 64 and state.cs.base + state.rip >> 32)


class Reach:
    """Which memory an instruction reaches, and through which segments."""

    def __init__(self) -> None:
        import iced_x86 as iced

        self._info = iced.InstructionInfoFactory()
        self._size = iced.MemorySizeExt.size
        self._first = iced.Register.ES
        access = iced.OpAccess
        self._nothing = frozenset((access.NONE, access.NO_MEM_ACCESS))
        self._reads = frozenset((access.READ, access.COND_READ))
        self._wide = iced.CodeSize.CODE32
        size = iced.CodeSize
        self._masks = {size.CODE16: SIZES[16], size.CODE32: SIZES[32], size.CODE64: SIZES[64]}
        self._ip = frozenset((iced.Register.RIP, iced.Register.EIP))
        self._stack = frozenset((iced.Register.SP, iced.Register.ESP))
        mnemonic = iced.Mnemonic
        self._bit_tests = frozenset((mnemonic.BT, mnemonic.BTS, mnemonic.BTR, mnemonic.BTC))

    def through_tight(self, instruction: Instruction, hflags: int) -> bool:
        """Whether it has to be looked at before it runs under these flags."""
        if hflags & TIGHT_CS:
            return True
        protected = hflags & HF_PE
        wanted = hflags & TIGHT | (TIGHT_CS if protected else 0)
        if not wanted:
            return False
        return any(
            _BITS[used.segment - self._first] & wanted
            and (protected or used.address_size == self._wide)
            for used in self._info.info(instruction).used_memory()
        )

    def check(self, env: Env, instruction: Instruction) -> None:
        """Raise what the instruction at RIP gets, in 16- or 32-bit code."""
        parts = PARTS.unpack_from(env.bytes, env.SEGMENTS_AT)
        if env.hflags & TIGHT_CS and env.rip + instruction.len - 1 > parts[2 * _CS]:
            raise _fault(env, _CS)
        for used in self._info.info(instruction).used_memory():
            if used.access not in self._nothing:
                self._access(env, instruction, used, parts)

    def touches(self, env: Env, instruction: Instruction) -> Iterator[Touched]:
        """Linear memory, for breakpoints on data; in code of any mode."""
        parts = BASES.unpack_from(env.bytes, env.SEGMENTS_AT)
        wide = env.hflags & HF_CS64
        for used in self._info.info(instruction).used_memory():
            if used.access in self._nothing or not (place := self._place(env, instruction, used)):
                continue
            number, offset, size = place
            base = 0 if wide and number < _FS else parts[number]
            linear = (offset + base) & (SIZES[64] if wide else SIZES[32])
            yield Touched(linear, size, used.access not in self._reads)

    def _access(
        self, env: Env, instruction: Instruction, used: UsedMemory, parts: tuple[int, ...]
    ) -> None:
        place = self._place(env, instruction, used)
        if place is None:
            return
        number, offset, size = place
        reads = used.access in self._reads
        limit, rights = parts[2 * number], parts[2 * number + 1] >> 8
        allowed = not env.hflags & HF_PE or _kind(rights, reads=reads)
        if not allowed or not inside(limit, rights, offset, size):
            raise _fault(env, number)

    def _place(
        self, env: Env, instruction: Instruction, used: UsedMemory
    ) -> tuple[int, int, int] | None:
        """Segment register, offset and size; None: nothing, this turn."""
        size, mask = self._size(used.memory_size), self._masks[used.address_size]
        if not size:  # a repeated string instruction: one element a turn
            if not env.u64[RCX] & mask:
                return None
            size = self._size(instruction.memory_size)
        number = used.segment - self._first
        if number == _SS and used.base in self._stack and instruction.is_stack_instruction:
            mask = SIZES[32] if env.hflags & HF_SS32 else SIZES[16]
        return number, self._offset(env, instruction, used) & mask, size

    def _offset(self, env: Env, instruction: Instruction, used: UsedMemory) -> int:
        offset = int(used.displacement)
        if used.base in self._ip or (not used.base and instruction.is_ip_rel_memory_operand):
            offset += env.rip  # it was decoded as if at 0
        elif used.base:
            at, _ = register(used.base)
            offset += env.u64[at]
        if used.index:
            at, size = register(used.index)
            offset += (env.u64[at] & SIZES[8 * size]) * used.scale
        if instruction.mnemonic in self._bit_tests and instruction.op1_register:
            at, size = register(instruction.op1_register)
            bit = env.u64[at] & SIZES[8 * size]
            bit -= bit >> 8 * size - 1 << 8 * size
            offset += (bit >> (4 if size == 2 else 5)) * size
        return offset


def inside(limit: int, rights: int, offset: int, size: int) -> bool:
    """``rights`` as in a VMCS."""
    if rights & (_CODE | _DOWN_OR_CONFORMING) == _DOWN_OR_CONFORMING:
        top = _FLAT_LIMIT if rights & _BIG else _REAL_LIMIT
        return limit < offset and offset + size - 1 <= top
    return offset + size - 1 <= limit


def _kind(rights: int, *, reads: bool) -> bool:
    """May it be reached so (§5.5, table 3-1)? A null selector leaves nothing present."""
    if not rights & _PRESENT:
        return False
    if rights & _CODE:
        return reads and bool(rights & _WRITABLE_OR_READABLE)
    return reads or bool(rights & _WRITABLE_OR_READABLE)


def _fault(env: Env, number: int) -> Fault:
    return Fault(SS if number == _SS else GP, 0 if env.hflags & HF_PE else None)


class Landing:
    """A near jump, call or return in a tight code segment: if its target is out of it, it never happened."""

    def __init__(self, env: Env, length: int) -> None:
        self._env = env
        self._behind = env.rip + length
        self._before = env.rip, env.u64[RSP], env.u64[RCX], env.code_segment

    def check(self) -> None:
        env = self._env
        rip, rsp, rcx, segment = self._before
        jumped = env.rip != self._behind  # who runs over the end faults there
        if jumped and env.code_segment == segment and env.rip > segment[1]:
            env.set_rip(rip)
            env.u64[RSP], env.u64[RCX] = rsp, rcx
            raise _fault(env, _CS)
