"""Control registers, debug registers, MSRs and time, as sensitive instructions reach them.

What is intercepted is SDM vol. 3C §25.1.3 and §25.6; exit qualifications are tables 27-3 (control registers)
and 27-4 (MOV DR).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft import register_checks
from hostel.soft.exceptions import DB, GP, UD
from hostel.soft.silicon import Access, Primary, Reason, Secondary, VmExit
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    EFER_NXE,
    HELD_MSRS,
    MSR_APIC_BASE,
    MSR_EFER,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_MISC_ENABLE,
    MSR_PAT,
    MSR_TSC,
    MSR_TSC_AUX,
    PAT_AT_RESET,
    RAX,
    RCX,
    RDX,
    CpuState,
)

from .breakpoints import DETECT, load_debug
from .events import Fault
from .operands import (
    effective_address,
    is_memory,
    linear,
    read_operand,
    read_register,
    register,
    write_operand,
    write_register,
)
from .outcome import Outcome, Result, leave, need_ring0

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from .translate import TranslatingCore

_LOW = 0xFFFF_FFFF
_TO, _FROM, _CLTS, _LMSW = 0, 1, 2, 3
_CR0_FLUSHES = CR0_PG | CR0_PE | CR0_WP
_CR4_FLUSHES = CR4_PGE | CR4_PAE | CR4_PSE | CR4_SMEP | CR4_SMAP
_PLAIN_MSRS = HELD_MSRS | {MSR_APIC_BASE}
_RESET = {MSR_PAT: PAT_AT_RESET, MSR_MISC_ENABLE: 1, MSR_APIC_BASE: 0xFEE0_0900}


# --- Control registers ---


def move_from_control(core: TranslatingCore, instruction: Instruction) -> Result:
    state, controls = core.state, core.controls
    need_ring0(state)
    number = register(instruction.op1_register)[0]
    gpr = register(instruction.op0_register)[0]
    stops = {3: Primary.CR3_STORE, 8: Primary.CR8_STORE}.get(number, 0)
    if controls.primary & stops:
        return _access(instruction, number, _FROM, gpr)
    write_register(state, instruction.op0_register, _shown(core, number))
    return Outcome.DONE


def _shown(core: TranslatingCore, number: int) -> int:
    """A control register as the guest sees it: masked bits come from the shadow (§25.3)."""
    state, controls = core.state, core.controls
    if number == 0:
        return state.cr0 & ~controls.cr0_mask | controls.cr0_shadow & controls.cr0_mask
    if number == 4:
        return state.cr4 & ~controls.cr4_mask | controls.cr4_shadow & controls.cr4_mask
    values = {2: state.cr2, 3: state.cr3, 8: state.cr8}
    if number not in values:
        raise Fault(UD)
    return values[number]


def _access(
    instruction: Instruction, number: int, kind: int, gpr: int = 0, rest: int = 0
) -> VmExit:
    return leave(Reason.CR_ACCESS, instruction, number | kind << 4 | gpr << 8 | rest)


def move_to_control(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    need_ring0(state)
    number = register(instruction.op0_register)[0]
    gpr = register(instruction.op1_register)[0]
    value = read_register(state, instruction.op1_register)
    if _stops(core, number, value):
        return _access(instruction, number, _TO, gpr)
    if number == 2:
        state.cr2 = value
    elif number == 8:
        state.cr8 = register_checks.cr8(value)
    elif number in (0, 3, 4):
        _load(core, number, value)
    else:
        raise Fault(UD)
    return Outcome.DONE


def _stops(core: TranslatingCore, number: int, value: int) -> bool:
    """Is a MOV of ``value`` to the register an exit?"""
    controls = core.controls
    if number == 0:
        return bool((value ^ controls.cr0_shadow) & controls.cr0_mask)
    if number == 4:
        return bool((value ^ controls.cr4_shadow) & controls.cr4_mask)
    if number == 3:
        return bool(controls.primary & Primary.CR3_LOAD) and value not in controls.cr3_targets
    return number == 8 and bool(controls.primary & Primary.CR8_LOAD)


def _load(core: TranslatingCore, number: int, value: int) -> None:
    """MOV to CR0, CR3 or CR4; the hypervisor's bits stay as they are (SDM vol. 3C §25.3)."""
    state, controls = core.state, core.controls
    if number == 0:
        value = state.cr0 & controls.cr0_mask | value & ~controls.cr0_mask
    elif number == 4:
        value = state.cr4 & controls.cr4_mask | value & ~controls.cr4_mask
    after = register_checks.load(
        state,
        number,
        value,
        lambda cr3: core.mmu.pointers(controls, cr3),
        code64=state.bits == 64,
        cr4_known=register_checks.CR4_SILICON,
    )
    changed = (after.cr0 ^ state.cr0) & _CR0_FLUSHES or (after.cr4 ^ state.cr4) & _CR4_FLUSHES
    state.cr0, state.cr3, state.cr4, state.efer = after.cr0, after.cr3, after.cr4, after.efer
    if number == 3 or changed:
        core.flush_all(keep_global=number == 3)


def clear_task_switched(core: TranslatingCore, instruction: Instruction) -> Result:
    state, controls = core.state, core.controls
    need_ring0(state)
    if controls.cr0_mask & CR0_TS:
        if controls.cr0_shadow & CR0_TS:
            return _access(instruction, 0, _CLTS)
        return Outcome.DONE  # nothing changes: the guest sees it clear already
    state.cr0 &= ~CR0_TS
    return Outcome.DONE


def load_machine_status(core: TranslatingCore, instruction: Instruction) -> Result:
    """LMSW: PE, MP, EM, TS; PE can be set, never cleared."""
    state, controls = core.state, core.controls
    need_ring0(state)
    source = read_operand(state, core.memory, instruction, 2) & 0xFFFF
    changed = (source ^ controls.cr0_shadow) & controls.cr0_mask & 0xF
    sets_pe = source & controls.cr0_mask & ~controls.cr0_shadow & CR0_PE
    if changed & 0xE or sets_pe:
        rest, at = source << 16, 0
        if is_memory(instruction):
            rest |= 1 << 6
            offset = effective_address(state, instruction)
            at = linear(state, instruction.memory_segment, offset, 2, Access.READ)
        return leave(Reason.CR_ACCESS, instruction, _LMSW << 4 | rest, linear=at)
    _load(core, 0, state.cr0 & ~0xE | source & 0xF)
    return Outcome.DONE


def store_machine_status(core: TranslatingCore, instruction: Instruction) -> Result:
    write_operand(core.state, core.memory, instruction, 2, _shown(core, 0))
    return Outcome.DONE


# --- Debug registers ---


def move_debug(core: TranslatingCore, instruction: Instruction) -> Result:
    from iced_x86 import Code

    state = core.state
    to_debug = instruction.code in (Code.MOV_DR_R32, Code.MOV_DR_R64)
    debug, general = instruction.op0_register, instruction.op1_register
    if not to_debug:
        debug, general = general, debug
    number = register(debug)[0]
    if number > 7 or (number in (4, 5) and state.cr4 & 8):
        raise Fault(UD)
    need_ring0(state)
    if core.controls.primary & Primary.MOV_DR:
        qualification = number | (0 if to_debug else 1) << 4 | register(general)[0] << 8
        return leave(Reason.MOV_DR, instruction, qualification)
    if state.dr7 & DETECT:
        raise Fault(DB, dr6=DETECT)
    number = {4: 6, 5: 7}.get(number, number)
    if to_debug:
        _set_debug(state, number, read_register(state, general))
    else:
        values = [*state.dr, 0, 0, state.dr6, state.dr7]
        write_register(state, general, values[number])
    return Outcome.DONE


def _set_debug(state: CpuState, number: int, value: int) -> None:
    if number >= 4 and value >> 32:
        raise Fault(GP, 0)
    load_debug(state, number, value)


# --- MSRs ---


def _msr_stops(core: TranslatingCore, index: int, is_write: bool) -> bool:
    """The bitmap: reads of low, of high MSRs, then writes, 1 KiB each (§24.6.9)."""
    if not core.controls.primary & Primary.MSR_BITMAPS:
        return True
    if index <= 0x1FFF:
        at = 0
    elif 0xC000_0000 <= index <= 0xC000_1FFF:
        at = 0x400
    else:
        return True
    low = index & 0x1FFF
    byte = core.physical.read(core.controls.msr_bitmap + at + 0x800 * is_write + low // 8, 1)[0]
    return bool(byte >> low % 8 & 1)


def read_msr(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    need_ring0(state)
    index = state.gpr[RCX] & _LOW
    if _msr_stops(core, index, False):
        return leave(Reason.RDMSR, instruction)
    value = _msr(core, index)
    state.gpr[RAX], state.gpr[RDX] = value & _LOW, value >> 32
    return Outcome.DONE


def _msr(core: TranslatingCore, index: int) -> int:
    state = core.state
    if index in _PLAIN_MSRS:
        return state.msrs.get(index, _RESET.get(index, 0))
    special = {MSR_EFER: state.efer, MSR_FS_BASE: state.fs.base, MSR_GS_BASE: state.gs.base}
    if index == MSR_TSC:
        return core.tsc
    if index not in special:
        raise Fault(GP, 0)
    return special[index]


def write_msr(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    need_ring0(state)
    index = state.gpr[RCX] & _LOW
    if _msr_stops(core, index, True):
        return leave(Reason.WRMSR, instruction)
    value = state.gpr[RAX] & _LOW | (state.gpr[RDX] & _LOW) << 32
    if index == MSR_EFER:
        _set_efer(core, value)
        return Outcome.DONE
    value = register_checks.msr(index, value)
    if index in _PLAIN_MSRS:
        state.msrs[index] = value
    elif index == MSR_FS_BASE:
        state.fs.base = value
    elif index == MSR_GS_BASE:
        state.gs.base = value
    else:
        raise Fault(GP, 0)
    return Outcome.DONE


def _set_efer(core: TranslatingCore, value: int) -> None:
    state = core.state
    new = register_checks.efer(state, value)
    changed = new ^ state.efer
    state.efer = new
    if changed & EFER_NXE:
        core.flush_all(keep_global=False)


# --- Time ---


def read_time(core: TranslatingCore, instruction: Instruction) -> Result:
    state, controls = core.state, core.controls
    if state.cr4 & CR4_TSD and state.cpl:
        raise Fault(GP, 0)
    with_aux = instruction.len == 3  # 0f 01 f9, and not 0f 31
    if with_aux and not controls.secondary & Secondary.RDTSCP:
        raise Fault(UD)
    if controls.primary & Primary.RDTSC:
        return leave(Reason.RDTSCP if with_aux else Reason.RDTSC, instruction)
    state.gpr[RAX], state.gpr[RDX] = core.tsc & _LOW, core.tsc >> 32 & _LOW
    if with_aux:
        state.gpr[RCX] = state.msrs.get(MSR_TSC_AUX, 0) & _LOW
    return Outcome.DONE
