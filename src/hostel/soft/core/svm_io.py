"""IN, OUT and their strings: may this code use this port, and does it exit? Unicorn asks neither."""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import Instruction, Mnemonic, OpKind

from hostel.soft.exceptions import GP
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Controls, PageFault, Primary, Reason, VmExit
from hostel.soft.state import CR0_PE, RAX, RDI, RFLAGS_IOPL, RFLAGS_VM, RSI, CpuState

from . import svm_decode as decode
from .svm_exit import Exit

_U32 = 0xFFFF_FFFF


def io(exit: Exit, physical: PhysicalMemory) -> VmExit | None:
    """SDM vol. 3C table 27-5. The guest's own permission comes first (§25.1.1)."""
    instruction, state = exit.instruction, exit.state
    if not port_permitted(state, exit.port, exit.size, exit.read):
        return exit.fault(GP, 0)
    mnemonic = instruction.mnemonic
    writes = mnemonic in (Mnemonic.OUT, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD)
    string = mnemonic not in (Mnemonic.IN, Mnemonic.OUT)
    rep = string and (instruction.has_rep_prefix or instruction.has_repne_prefix)
    immediate = OpKind.IMMEDIATE8 in (instruction.op0_kind, instruction.op1_kind)
    qualification = exit.size - 1 | (not writes) << 3 | string << 4 | rep << 5
    qualification |= immediate << 6 | exit.port << 16
    if not io_exits(exit.controls, physical, exit.port, exit.size) and not string:
        if not writes:  # no port of this processor has a device: it reads as ones
            keep = 0 if exit.size == 4 else ~((1 << 8 * exit.size) - 1)
            ones = (1 << 8 * exit.size) - 1
            state.gpr[RAX] = state.gpr[RAX] & keep & (1 << 64) - 1 | ones
        return exit.skip()
    linear = info = 0
    if string:
        linear, info = _string_operand(instruction, state, writes)
    return exit.exit(Reason.IO, qualification, linear=linear, instruction_info=info)


def _string_operand(instruction: Instruction, state: CpuState, writes: bool) -> tuple[int, int]:
    """The linear address, and the instruction information (SDM vol. 3C table 27-9)."""
    kind = instruction.op1_kind if writes else instruction.op0_kind
    sizes = {
        OpKind.MEMORY_SEG_SI: 0,
        OpKind.MEMORY_ESDI: 0,
        OpKind.MEMORY_SEG_ESI: 1,
        OpKind.MEMORY_ESEDI: 1,
    }
    size = sizes.get(kind, 2)
    offset = state.gpr[RSI if writes else RDI] & (0xFFFF, _U32, (1 << 64) - 1)[size]
    if not writes:
        return offset + (0 if state.bits == 64 else state.es.base), size << 7
    base = decode.segment_base(instruction, state)
    return offset + base, size << 7 | decode.segment_number(instruction) << 15


def port_permitted(
    state: CpuState, port: int, size: int, read: Callable[[int, int], bytes]
) -> bool:
    """CPL against IOPL, then the TSS's I/O permission bit map (SDM vol. 1 §19.5). ``read``: linear."""
    virtual = bool(state.rflags & RFLAGS_VM)
    if not state.cr0 & CR0_PE or (not virtual and state.cpl <= (state.rflags & RFLAGS_IOPL) >> 12):
        return True
    if state.tr.rights & 0xD != 9 or state.tr.limit < 0x67:
        return False
    try:
        at = int.from_bytes(read(state.tr.base + 0x66, 2), "little") + port // 8
        if at + 1 > state.tr.limit:
            return False
        bits = int.from_bytes(read(state.tr.base + at, 2), "little")
    except PageFault:
        return False
    return not bits >> (port & 7) & (1 << size) - 1


def io_exits(controls: Controls, physical: PhysicalMemory, port: int, size: int) -> bool:
    """SDM vol. 3C §24.6.4, §25.1.3: the bit of each port touched; beyond the last port, always."""
    if not controls.primary & Primary.IO_BITMAPS:
        return bool(controls.primary & Primary.UNCONDITIONAL_IO)
    if port + size > 0x10000:
        return True
    pages = controls.io_bitmap_a, controls.io_bitmap_b
    return any(
        physical.read(pages[p >> 15] + (p & 0x7FFF) // 8, 1)[0] >> (p & 7) & 1
        for p in range(port, port + size)
    )
