"""Control registers, MSRs, SYSCALL and SYSENTER: what the core carries out where nobody intercepts.

Unicorn's own versions check little (a bad CR0 is taken as it is, an unknown MSR reads 0, SYSCALL is left
to a hook). What may be loaded is said by ``register_checks.py``; the rest stands here, on ``CpuState``.
"""

from __future__ import annotations

from hostel.soft import register_checks
from hostel.soft.register_checks import Pointers, Refused
from hostel.soft.state import (
    CR0_PE,
    EFER_SCE,
    HELD_MSRS,
    MSR_APIC_BASE,
    MSR_EFER,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_LSTAR,
    MSR_PAT,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC,
    PAT_AT_RESET,
    R11,
    RCX,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
    RIGHTS_CODE32,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RSP,
    CpuState,
    Segment,
)

_U32 = 0xFFFF_FFFF


def load_control_register(state: CpuState, register: int, value: int, pointers: Pointers) -> None:
    """MOV to CR0, 3, 4, 8; may raise ``Refused``."""
    if register == 8:
        state.cr8 = register_checks.cr8(value)
        return
    after = register_checks.load(
        state,
        register,
        value,
        pointers,
        code64=state.bits == 64,
        cr4_known=register_checks.CR4_SILICON,
    )
    state.cr0, state.cr3, state.cr4, state.efer = after.cr0, after.cr3, after.cr4, after.efer


def read_msr(state: CpuState, number: int, tsc: int) -> int:
    if number in HELD_MSRS:
        return state.msrs.get(number, PAT_AT_RESET if number == MSR_PAT else 0)
    if number == MSR_EFER:
        return state.efer
    if number in (MSR_FS_BASE, MSR_GS_BASE):
        return (state.fs if number == MSR_FS_BASE else state.gs).base
    if number == MSR_TSC:
        return tsc
    if number == MSR_APIC_BASE:
        return state.msrs.get(number, 0xFEE0_0900)
    raise Refused


def write_msr(state: CpuState, number: int, value: int) -> None:
    if number == MSR_EFER:
        state.efer = register_checks.efer(state, value)
        return
    value = register_checks.msr(number, value)
    if number in (MSR_FS_BASE, MSR_GS_BASE):
        (state.fs if number == MSR_FS_BASE else state.gs).base = value
    elif number in HELD_MSRS or number == MSR_APIC_BASE:
        state.msrs[number] = value
    else:
        raise Refused


def syscall(state: CpuState, length: int) -> bool:
    """SDM vol. 2B; False is #UD."""
    if not state.efer & EFER_SCE or state.bits != 64:
        return False
    state.gpr[RCX] = state.rip + length & (1 << 64) - 1
    state.gpr[R11] = state.rflags & ~RFLAGS_RF
    state.rip = state.msrs.get(MSR_LSTAR, 0)
    state.rflags = state.rflags & ~(state.msrs.get(MSR_SFMASK, 0) | RFLAGS_RF) | 2
    selector = state.msrs.get(MSR_STAR, 0) >> 32 & 0xFFFC
    _flat(state, selector, RIGHTS_CODE64)
    return True


def sysenter(state: CpuState) -> None:
    """SDM vol. 2B; may raise ``Refused``."""
    selector = state.msrs.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if not state.cr0 & CR0_PE or not selector:
        raise Refused
    state.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
    mask = (1 << 64) - 1 if state.long_mode else _U32
    state.gpr[RSP] = state.msrs.get(MSR_SYSENTER_ESP, 0) & mask
    state.rip = state.msrs.get(MSR_SYSENTER_EIP, 0) & mask
    _flat(state, selector, RIGHTS_CODE64 if state.long_mode else RIGHTS_CODE32)


def _flat(state: CpuState, selector: int, code: int) -> None:
    state.cs = Segment(selector, 0, _U32, code)
    state.ss = Segment(selector + 8, 0, _U32, RIGHTS_DATA32)
