"""MSRs of our processor, by RDMSR and WRMSR and by the MSR areas of a VMCS (SDM vol. 3C §24.7.2, §24.8.2).

An entry of an area is 16 bytes: the MSR's number, four bytes of zero, its value.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from hostel.errors import MemoryFault
from hostel.soft import register_checks
from hostel.soft.physical import PhysicalMemory
from hostel.soft.register_checks import Refused
from hostel.soft.state import (
    HELD_MSRS,
    MSR_DEBUGCTL,
    MSR_EFER,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_PAT,
    PAT_AT_RESET,
    CpuState,
)
from hostel.soft.vmx.capabilities import CAPABILITIES

ENTRY = Struct("<IIQ")

HELD = HELD_MSRS | {MSR_DEBUGCTL}


def read_msr(state: CpuState, number: int) -> int | None:
    """RDMSR; None where it would be #GP."""
    if number in HELD:
        return state.msrs.get(number, PAT_AT_RESET if number == MSR_PAT else 0)
    if number == MSR_EFER:
        return state.efer
    if number == MSR_FS_BASE:
        return state.fs.base
    if number == MSR_GS_BASE:
        return state.gs.base
    return CAPABILITIES.get(number)


def write_msr(state: CpuState, number: int, value: int) -> bool:
    """WRMSR; False where it would be #GP."""
    try:
        if number == MSR_EFER:
            state.efer = register_checks.efer(state, value)
        elif number in (MSR_FS_BASE, MSR_GS_BASE):
            segment = state.fs if number == MSR_FS_BASE else state.gs
            segment.base = register_checks.msr(number, value)
        elif number in HELD:
            state.msrs[number] = register_checks.msr(number, value)
        else:
            return False
    except Refused:
        return False
    return True


# --- Areas ---


def load_area(state: CpuState, memory: PhysicalMemory, address: int, count: int) -> int:
    """§26.4, §27.6: load them in order. The number, from 1, of the entry that cannot be; 0 if all are."""
    for number in range(count):
        try:
            msr, reserved, value = ENTRY.unpack(memory.view(address + 16 * number, 16))
        except MemoryFault:
            return number + 1
        # FS.base and GS.base have fields of their own; the x2APIC's MSRs are refused (§26.4).
        refused = reserved or msr in (MSR_FS_BASE, MSR_GS_BASE) or msr >> 8 == 8
        if refused or not write_msr(state, msr, value):
            return number + 1
    return 0


def store_area(
    memory: PhysicalMemory, address: int, count: int, read: Callable[[int], int | None]
) -> int:
    """§27.4: as ``load_area``, the other way."""
    for number in range(count):
        at = address + 16 * number
        try:
            msr, reserved, _ = ENTRY.unpack(memory.view(at, 16))
        except MemoryFault:
            return number + 1
        value = None if reserved or msr >> 8 == 8 else read(msr)
        if value is None:
            return number + 1
        memory.write_u64(at + 8, value)
    return 0
