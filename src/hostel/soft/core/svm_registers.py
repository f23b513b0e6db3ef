"""Control registers, MSRs, SYSCALL and SYSENTER: what the core carries out where nobody intercepts.

Unicorn's own versions check little (a bad CR0 is taken as it is, an unknown MSR reads 0, SYSCALL is left
to a hook), so the rules stand here, on ``CpuState``, by the manual.
"""

from __future__ import annotations

from hostel.soft.paging.walk import PHYSICAL_BITS
from hostel.soft.state import (
    ADDRESS_MSRS,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
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
    MSR_TSC_AUX,
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
    canonical,
)

_U32 = 0xFFFF_FFFF
_CR0_DEFINED = 0xE005_003F
_CR4_DEFINED = 0x35_27FF
"""Without UMIP, LA57, SMXE, PCIDE, PKE and what came later."""
_EFER_DEFINED = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE


class GeneralProtection(Exception):
    """#GP(0)."""


def load_control_register(state: CpuState, register: int, value: int) -> None:
    """MOV to CR0, 3, 4, 8 (SDM vol. 2B, MOV—control registers); may raise #GP."""
    if register == 0:
        _load_cr0(state, value)
    elif register == 3:
        if state.long_mode and value & ~_U32 >> PHYSICAL_BITS << PHYSICAL_BITS & (1 << 63) - 1:
            raise GeneralProtection
        state.cr3 = value & (1 << PHYSICAL_BITS) - 1
    elif register == 4:
        if value & ~_CR4_DEFINED or (state.long_mode and not value & CR4_PAE):
            raise GeneralProtection
        state.cr4 = value
    else:
        if value > 15:
            raise GeneralProtection
        state.cr8 = value


def _load_cr0(state: CpuState, value: int) -> None:
    if value & ~_U32 or (value & CR0_PG and not value & CR0_PE):
        raise GeneralProtection
    if value & CR0_NW and not value & CR0_CD:
        raise GeneralProtection
    value = value & _CR0_DEFINED | CR0_ET
    code64 = state.cs.rights >> 13 & 1
    turned_on = value & ~state.cr0 & CR0_PG
    turned_off = state.cr0 & ~value & CR0_PG
    if turned_on and state.efer & EFER_LME:
        if not state.cr4 & CR4_PAE or code64:
            raise GeneralProtection
        state.efer |= EFER_LMA
    elif turned_off:
        if state.efer & EFER_LMA and code64:
            raise GeneralProtection
        state.efer &= ~EFER_LMA
    state.cr0 = value


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
    raise GeneralProtection


def write_msr(state: CpuState, number: int, value: int) -> None:
    if number in ADDRESS_MSRS and not canonical(value):
        raise GeneralProtection
    if number == MSR_TSC_AUX and value & ~_U32:
        raise GeneralProtection
    if number == MSR_EFER:
        if value & ~_EFER_DEFINED or ((value ^ state.efer) & EFER_LME and state.cr0 & CR0_PG):
            raise GeneralProtection
        state.efer = value & ~EFER_LMA | state.efer & EFER_LMA
    elif number in (MSR_FS_BASE, MSR_GS_BASE):
        (state.fs if number == MSR_FS_BASE else state.gs).base = value
    elif number in HELD_MSRS or number == MSR_APIC_BASE:
        state.msrs[number] = value
    else:
        raise GeneralProtection


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
    """SDM vol. 2B; may raise #GP."""
    selector = state.msrs.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if not state.cr0 & CR0_PE or not selector:
        raise GeneralProtection
    state.rflags &= ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF)
    mask = (1 << 64) - 1 if state.long_mode else _U32
    state.gpr[RSP] = state.msrs.get(MSR_SYSENTER_ESP, 0) & mask
    state.rip = state.msrs.get(MSR_SYSENTER_EIP, 0) & mask
    _flat(state, selector, RIGHTS_CODE64 if state.long_mode else RIGHTS_CODE32)


def _flat(state: CpuState, selector: int, code: int) -> None:
    state.cs = Segment(selector, 0, _U32, code)
    state.ss = Segment(selector + 8, 0, _U32, RIGHTS_DATA32)
