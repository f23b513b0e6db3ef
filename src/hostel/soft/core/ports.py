"""IN, OUT, INS and OUTS: who may use which port, and what of it exits.

Checked first by IOPL and the TSS's bitmap (SDM vol. 1 §19.5), then by the VMCS's bitmaps (vol. 3C §25.1.3).
This processor has no ports of its own: what is not intercepted reads as ones and is lost when written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hostel.soft.exceptions import GP
from hostel.soft.silicon import Primary, Reason
from hostel.soft.state import CR0_PE, RCX, RDI, RDX, RFLAGS_DF, RFLAGS_IOPL, RSI, CpuState

from .events import Fault
from .operands import SIZES, register, segment, write_register
from .outcome import Outcome, Result, leave

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from .translate import TranslatingCore

_IMMEDIATE8 = 6
_FIRST_STRING = 15
_ES = 0


class Port(msgspec.Struct):
    number: int
    size: int
    is_in: bool
    immediate: bool
    address_size: int
    """Of INS and OUTS, in bytes; 0 for IN and OUT."""
    repeated: bool


def access(core: TranslatingCore, instruction: Instruction) -> Result:
    port = describe(core.state, instruction)
    if not _may(core, port):
        raise Fault(GP, 0)
    if port.repeated and not _count(core.state, port):
        return Outcome.DONE
    if _stops(core, port):
        return leave(
            Reason.IO,
            instruction,
            _qualification(port),
            linear=_string_address(core.state, instruction, port),
            info=_string_info(instruction, port),
        )
    return _without_exit(core, instruction, port)


def describe(state: CpuState, instruction: Instruction) -> Port:
    name = _name(instruction)
    if name in ("IN", "OUT"):
        is_in = name == "IN"
        data = instruction.op0_register if is_in else instruction.op1_register
        immediate = (instruction.op1_kind if is_in else instruction.op0_kind) == _IMMEDIATE8
        number = instruction.immediate(1 if is_in else 0) if immediate else state.gpr[RDX] & 0xFFFF
        return Port(number, register(data)[1], is_in, immediate, 0, False)
    is_in = name.startswith("INS")
    kind = instruction.op0_kind if is_in else instruction.op1_kind
    size = {"B": 1, "W": 2, "D": 4}[name[-1]]
    repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
    width = 2 << (kind - _FIRST_STRING) % 3
    return Port(state.gpr[RDX] & 0xFFFF, size, is_in, False, width, repeated)


def _name(instruction: Instruction) -> str:
    from iced_x86 import Mnemonic

    names = ("IN", "OUT", "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD")
    return next(name for name in names if getattr(Mnemonic, name) == instruction.mnemonic)


def _may(core: TranslatingCore, port: Port) -> bool:
    state = core.state
    if not state.cr0 & CR0_PE or state.cpl <= (state.rflags & RFLAGS_IOPL) >> 12:
        return True
    if not state.tr.rights & 8 or state.tr.limit < 0x67:
        return False  # a 16-bit TSS has no bitmap
    base = core.memory.read(state.tr.base + 0x66, 2)
    at = base + port.number // 8
    if at + 1 > state.tr.limit:
        return False
    bits = core.memory.read(state.tr.base + at, 2) >> port.number % 8
    return not bits & (1 << port.size) - 1


def _stops(core: TranslatingCore, port: Port) -> bool:
    controls = core.controls
    if not controls.primary & Primary.IO_BITMAPS:
        return bool(controls.primary & Primary.UNCONDITIONAL_IO)
    if port.number + port.size > 0x1_0000:
        return True
    return any(_bit(core, number) for number in range(port.number, port.number + port.size))


def _bit(core: TranslatingCore, number: int) -> int:
    controls = core.controls
    bitmap = controls.io_bitmap_b if number & 0x8000 else controls.io_bitmap_a
    return core.physical.read(bitmap + (number & 0x7FFF) // 8, 1)[0] >> number % 8 & 1


def _qualification(port: Port) -> int:
    """Table 27-5."""
    string = 1 << 4 if port.address_size else 0
    return (
        port.size - 1
        | port.is_in << 3
        | string
        | port.repeated << 5
        | port.immediate << 6
        | port.number << 16
    )


def _string_address(state: CpuState, instruction: Instruction, port: Port) -> int:
    if not port.address_size:
        return 0
    offset = state.gpr[RDI if port.is_in else RSI] & SIZES[8 * port.address_size]
    part = state.es if port.is_in else segment(state, instruction.memory_segment)
    number = _ES if port.is_in else register(instruction.memory_segment)[0]
    if state.bits == 64:
        return (offset + (part.base if number >= 4 else 0)) & SIZES[64]
    return (offset + part.base) & SIZES[32]


def _string_info(instruction: Instruction, port: Port) -> int:
    """Table 27-9: address size, and the segment of OUTS."""
    if not port.address_size:
        return 0
    number = _ES if port.is_in else register(instruction.memory_segment)[0]
    return {2: 0, 4: 1, 8: 2}[port.address_size] << 7 | number << 15


def _count(state: CpuState, port: Port) -> int:
    return state.gpr[RCX] & SIZES[8 * port.address_size]


def _without_exit(core: TranslatingCore, instruction: Instruction, port: Port) -> Result:
    state = core.state
    if not port.address_size:
        if port.is_in:
            write_register(state, instruction.op0_register, SIZES[8 * port.size])
        return Outcome.DONE
    address = _string_address(state, instruction, port)
    if port.is_in:
        core.memory.write(address, port.size, SIZES[8 * port.size], state.cpl == 3)
    else:
        core.memory.read(address, port.size, state.cpl == 3)
    step = -port.size if state.rflags & RFLAGS_DF else port.size
    _add(state, RDI if port.is_in else RSI, step, port.address_size)
    if not port.repeated:
        return Outcome.DONE
    _add(state, RCX, -1, port.address_size)
    return Outcome.JUMPED if _count(state, port) else Outcome.DONE  # one element a turn


def _add(state: CpuState, at: int, step: int, size: int) -> None:
    mask = SIZES[8 * size]
    kept = 0 if size >= 4 else state.gpr[at] & ~mask
    state.gpr[at] = kept | (state.gpr[at] + step) & mask
