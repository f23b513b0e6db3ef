"""Model-specific registers: which the guest reaches without an exit, and what the others answer.

MSRs that only change what the guest itself sees (SYSCALL's and SYSENTER's, the bases of FS and GS) are let
through by the MSR bitmap (SDM vol. 3C §24.6.9). What is unknown is a #GP, as on a processor without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.errors import HostError
from hostel.soft import register_checks
from hostel.soft.exceptions import GP, fault
from hostel.soft.irqchip.lapic import Refused as LapicRefused
from hostel.soft.physical import PAGE
from hostel.soft.register_checks import Refused
from hostel.soft.silicon import VmExit
from hostel.soft.state import (
    MSR_APIC_BASE,
    MSR_CSTAR,
    MSR_DEBUGCTL,
    MSR_EFER,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_MISC_ENABLE,
    MSR_MTRR_DEF_TYPE,
    MSR_PAT,
    MSR_SFMASK,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC,
    MSR_TSC_AUX,
    MSR_TSC_DEADLINE,
    PAT_AT_RESET,
)
from hostel.soft.vmx.fields import Field

from .control_registers import guest, set_efer

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

PASSED = (
    *(MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK, MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE),
    *(MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_TSC_AUX),
)
_FIELDS: dict[int, Field] = {
    MSR_FS_BASE: Field.GUEST_FS_BASE,
    MSR_GS_BASE: Field.GUEST_GS_BASE,
    MSR_SYSENTER_CS: Field.GUEST_SYSENTER_CS,
    MSR_SYSENTER_ESP: Field.GUEST_SYSENTER_ESP,
    MSR_SYSENTER_EIP: Field.GUEST_SYSENTER_EIP,
}
_MTRR_CAP, _MICROCODE, _PLATFORM_ID, _FEATURE_CONTROL = 0xFE, 0x8B, 0x17, 0x3A
KEPT = (MSR_MISC_ENABLE, MSR_PAT, MSR_MTRR_DEF_TYPE, MSR_DEBUGCTL, MSR_TSC_AUX)
"""Written and read back; they mean nothing here."""
CONSTANT = {_MTRR_CAP: 0x500, _MICROCODE: 0, _PLATFORM_ID: 0, _FEATURE_CONTROL: 1}
"""No variable MTRRs; no VMX for the guest, and locked so."""
RESET = {MSR_PAT: PAT_AT_RESET, MSR_MTRR_DEF_TYPE: 0, MSR_MISC_ENABLE: 1}
_X2APIC = range(0x800, 0x900)
_LAPIC = {MSR_APIC_BASE, MSR_TSC_DEADLINE}


def bitmap() -> bytes:
    """Four quarters of 1 KiB: reads of low MSRs, of high ones, writes likewise; a bit set exits."""
    bits = bytearray(b"\xff" * PAGE)
    for index in PASSED:
        at = 1024 * (index >= 0xC000_0000) + (index & 0x1FFF) // 8
        for quarter in (0, 2048):
            bits[quarter + at] &= ~(1 << (index & 7))
    return bytes(bits)


def handle_read(vcpu: SoftVcpu, exit: VmExit) -> None:
    try:
        value = read(vcpu, vcpu.register(1) & 0xFFFF_FFFF)
    except (Refused, LapicRefused):
        vcpu.inject(fault(GP))
        return
    vcpu.set_register(0, value & 0xFFFF_FFFF)
    vcpu.set_register(2, value >> 32)
    vcpu.skip(exit)


def handle_write(vcpu: SoftVcpu, exit: VmExit) -> None:
    low, high = vcpu.register(0) & 0xFFFF_FFFF, vcpu.register(2) & 0xFFFF_FFFF
    try:
        write(vcpu, vcpu.register(1) & 0xFFFF_FFFF, high << 32 | low)
    except (Refused, LapicRefused):
        vcpu.inject(fault(GP))
    else:
        vcpu.skip(exit)


def read(vcpu: SoftVcpu, index: int) -> int:
    if index in _LAPIC or index in _X2APIC:
        return vcpu.lapic.read_msr(index)
    if index == MSR_EFER:
        return guest(vcpu).efer
    if index == MSR_TSC:
        return vcpu.machine.now + vcpu.read(Field.TSC_OFFSET) & (1 << 64) - 1
    if index in _FIELDS:
        return vcpu.read(_FIELDS[index])
    if index in KEPT or index in PASSED:
        return vcpu.state.msrs.get(index, RESET.get(index, 0))
    if index in CONSTANT:
        return CONSTANT[index]
    raise Refused


def write(vcpu: SoftVcpu, index: int, value: int) -> None:
    if index in _LAPIC or index in _X2APIC:
        vcpu.lapic.write_msr(index, value)
    elif index == MSR_EFER:
        set_efer(vcpu, value)
    elif index == MSR_TSC:
        vcpu.lapic.tsc_offset = value - vcpu.machine.now
        vcpu.write(Field.TSC_OFFSET, vcpu.lapic.tsc_offset & (1 << 64) - 1)
    elif index in _FIELDS:
        vcpu.write(_FIELDS[index], register_checks.msr(index, value))
    elif index in KEPT or index in PASSED:
        vcpu.state.msrs[index] = register_checks.msr(index, value)
    elif index not in (_MICROCODE,):  # an update: ignored
        raise Refused


def host_read(vcpu: SoftVcpu, index: int) -> int:
    """For the monitor, to whom an MSR that is not there is an error and not a #GP."""
    try:
        return read(vcpu, index)
    except (Refused, LapicRefused):
        raise HostError(f"the software processor has no MSR {index:#x}") from None


def host_write(vcpu: SoftVcpu, index: int, value: int) -> None:
    try:
        write(vcpu, index, value)
    except (Refused, LapicRefused):
        raise HostError(f"MSR {index:#x} of the software processor cannot be {value:#x}") from None
