"""Sensitive instructions that move control, or decide when interrupts come.

Some need no help but attention: the core runs IRET or POPF as it stands, alone, and looks at IF afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP, TS, UD
from hostel.soft.silicon import Access, Event, EventType, Primary, Reason, Secondary
from hostel.soft.state import (
    BLOCKED_BY_NMI,
    BLOCKED_BY_STI,
    CR0_PE,
    EFER_LMA,
    EFER_SCE,
    HALTED,
    MSR_CSTAR,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    R11,
    RCX,
    RDX,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_VM,
    RSP,
    Segment,
    canonical,
)

from . import tasks
from .env import EFLAGS
from .events import Fault, descriptor
from .operands import is_memory, operand_address, read_operand
from .outcome import Outcome, Result, leave, need_ring0

if TYPE_CHECKING:
    from iced_x86 import Instruction

    from .translate import TranslatingCore

_CODE32, _CODE64, _DATA = 0xC09B, 0xA09B, 0xC093
_RING3 = 3 << 5
_LOW = 0xFFFF_FFFF


def _flat(selector: int, rights: int, ring3: bool) -> Segment:
    return Segment(selector, 0, _LOW, rights | (_RING3 if ring3 else 0))


def syscall(core: TranslatingCore, instruction: Instruction) -> Result:
    """SDM vol. 2B, SYSCALL; in compatibility mode as AMD has it (APM vol. 3), by CSTAR."""
    state = core.state
    if not state.efer & EFER_SCE or not state.long_mode:
        raise Fault(UD)
    msrs, was64 = state.msrs, state.bits == 64
    state.gpr[RCX] = state.rip + instruction.len
    state.gpr[R11] = state.rflags & ~RFLAGS_RF
    state.rip = msrs.get(MSR_LSTAR if was64 else MSR_CSTAR, 0)
    state.rflags = state.rflags & ~(msrs.get(MSR_SFMASK, 0) & _LOW) & ~RFLAGS_RF | 2
    selector = msrs.get(MSR_STAR, 0) >> 32 & 0xFFFC
    state.cs = _flat(selector, _CODE64, False)
    state.ss = _flat(selector + 8, _DATA, False)
    return Outcome.JUMPED


def sysret(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    if not state.efer & EFER_SCE or state.bits != 64:
        raise Fault(UD)
    need_ring0(state)
    from iced_x86 import Mnemonic

    to64 = instruction.mnemonic == Mnemonic.SYSRETQ
    target = state.gpr[RCX] if to64 else state.gpr[RCX] & _LOW
    if not canonical(target):
        raise Fault(GP, 0)
    state.rip = target
    state.rflags = state.gpr[R11] & 0x3C_7FD7 & ~RFLAGS_VM | 2
    selector = state.msrs.get(MSR_STAR, 0) >> 48
    state.cs = _flat((selector + 16 if to64 else selector) | 3, _CODE64 if to64 else _CODE32, True)
    state.ss = _flat((selector + 8) | 3, _DATA, True)
    return Outcome.JUMPED


def sysenter(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    selector = state.msrs.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if not state.cr0 & CR0_PE or not selector:
        raise Fault(GP, 0)
    state.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
    mask = 2**64 - 1 if state.efer & EFER_LMA else _LOW
    state.gpr[RSP] = state.msrs.get(MSR_SYSENTER_ESP, 0) & mask
    state.rip = state.msrs.get(MSR_SYSENTER_EIP, 0) & mask
    state.cs = _flat(selector, _CODE64 if state.efer & EFER_LMA else _CODE32, False)
    state.ss = _flat(selector + 8, _DATA, False)
    return Outcome.JUMPED


def sysexit(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    selector = state.msrs.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if not state.cr0 & CR0_PE or not selector or state.cpl:
        raise Fault(GP, 0)
    from iced_x86 import Mnemonic

    to64 = instruction.mnemonic == Mnemonic.SYSEXITQ
    mask = 2**64 - 1 if to64 else _LOW
    if to64 and not (canonical(state.gpr[RDX]) and canonical(state.gpr[RCX])):
        raise Fault(GP, 0)
    state.rip, state.gpr[RSP] = state.gpr[RDX] & mask, state.gpr[RCX] & mask
    state.cs = _flat(selector + (32 if to64 else 16) | 3, _CODE64 if to64 else _CODE32, True)
    state.ss = _flat(selector + (40 if to64 else 24) | 3, _DATA, True)
    return Outcome.JUMPED


def swap_gs(core: TranslatingCore, instruction: Instruction) -> Result:
    state = core.state
    if state.bits != 64:
        raise Fault(UD)
    need_ring0(state)
    other = state.msrs.get(MSR_KERNEL_GS_BASE, 0)
    state.msrs[MSR_KERNEL_GS_BASE], state.gs.base = state.gs.base, other
    return Outcome.DONE


def software_interrupt(core: TranslatingCore, instruction: Instruction) -> Result:
    event = Event(
        instruction.immediate(0) & 0xFF, EventType.SOFTWARE_INTERRUPT, None, instruction.len
    )
    return core.deliver_software(event)


def interrupt1(core: TranslatingCore, instruction: Instruction) -> Result:
    return core.deliver_software(
        Event(1, EventType.PRIVILEGED_SOFTWARE_EXCEPTION, None, instruction.len)
    )


def halt(core: TranslatingCore, instruction: Instruction) -> Result:
    need_ring0(core.state)
    if core.controls.primary & Primary.HLT:
        return leave(Reason.HLT, instruction)
    core.state.activity = HALTED
    return Outcome.DONE


def set_interrupts(core: TranslatingCore, instruction: Instruction) -> Result:
    """STI: interrupts come after the *next* instruction (SDM vol. 2B)."""
    state = core.state
    if state.cr0 & CR0_PE and state.cpl > (state.rflags & RFLAGS_IOPL) >> 12:
        raise Fault(GP, 0)
    if not state.rflags & RFLAGS_IF:
        state.rflags |= RFLAGS_IF
        core.shadow = BLOCKED_BY_STI
    return Outcome.DONE


def interrupt_return(core: TranslatingCore, instruction: Instruction) -> Result:
    """IRET; with NT set, the return from a task, which exits."""
    state = core.state
    if core.engine.env.u64[EFLAGS // 8] & RFLAGS_NT and state.cr0 & CR0_PE and not state.long_mode:
        core.sync()
        back = core.memory.read(state.tr.base, 2)
        tss = tasks.to_tss(state, core.memory, back, TS, busy=True)
        return leave(Reason.TASK_SWITCH, instruction, tss | tasks.BY_IRET << 30)
    state.interruptibility &= ~BLOCKED_BY_NMI
    return Outcome.IMPLICIT


def far_transfer(core: TranslatingCore, instruction: Instruction) -> Result:
    """Far JMP and CALL: all but task switches are the core's own business."""
    state = core.state
    if not state.cr0 & CR0_PE or state.long_mode:
        return Outcome.IMPLICIT
    selector = _far_selector(core, instruction)
    with_descriptor = selector & ~3
    if with_descriptor:
        raw = descriptor(state, core.memory, selector, GP, 0)
        if raw >> 40 & 0x1F in tasks.TASKS:
            by = tasks.BY_CALL if _is_call(instruction) else tasks.BY_JMP
            tss = tasks.by_far_transfer(state, core.memory, selector, raw)
            return leave(Reason.TASK_SWITCH, instruction, tss | by << 30)
    return Outcome.IMPLICIT


def _is_call(instruction: Instruction) -> bool:
    from iced_x86 import Mnemonic

    return bool(instruction.mnemonic == Mnemonic.CALL)


def _far_selector(core: TranslatingCore, instruction: Instruction) -> int:
    if not is_memory(instruction):
        selector: int = instruction.far_branch_selector
        return selector
    from iced_x86 import Code

    offset_size = 2 if instruction.code in (Code.JMP_M1616, Code.CALL_M1616) else 4
    address = operand_address(core.state, instruction, offset_size + 2, Access.READ)
    return core.memory.read(address + offset_size, 2, core.state.cpl == 3)


def descriptor_table(core: TranslatingCore, instruction: Instruction) -> Result:
    """LGDT, SIDT, LTR … exit only when asked to; else they run as they stand."""
    from iced_x86 import Mnemonic

    loads = instruction.mnemonic in (Mnemonic.LGDT, Mnemonic.LIDT, Mnemonic.LLDT, Mnemonic.LTR)
    if loads:
        need_ring0(core.state)
        _check_base(core, instruction)
        _check_task(core, instruction)
    if core.controls.secondary & Secondary.DESCRIPTOR_TABLE:
        system = (Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.SLDT, Mnemonic.STR)
        reason = Reason.LDTR_TR if instruction.mnemonic in system else Reason.GDTR_IDTR
        return leave(reason, instruction, instruction.memory_displacement)
    return Outcome.IMPLICIT


def _check_base(core: TranslatingCore, instruction: Instruction) -> None:
    """Of LGDT and LIDT, which the core takes as it comes; VM entry does not (SDM vol. 3C §26.3.1.3)."""
    from iced_x86 import Mnemonic

    if core.state.bits == 64 and instruction.mnemonic in (Mnemonic.LGDT, Mnemonic.LIDT):
        address = operand_address(core.state, instruction, 10, Access.READ)
        if not canonical(core.memory.read(address, 10) >> 16):
            raise Fault(GP, 0)


def _check_task(core: TranslatingCore, instruction: Instruction) -> None:
    """LTR of nothing, which the core takes, and then aborts at the next switch of stacks."""
    from iced_x86 import Mnemonic

    loads = instruction.mnemonic == Mnemonic.LTR and core.state.cr0 & CR0_PE
    if loads and not read_operand(core.state, core.memory, instruction, 2) & 0xFFFC:
        raise Fault(GP, 0)


def as_it_stands(_core: TranslatingCore, _instruction: Instruction) -> Result:
    return Outcome.NATIVE


def with_descriptors(_core: TranslatingCore, _instruction: Instruction) -> Result:
    return Outcome.IMPLICIT
