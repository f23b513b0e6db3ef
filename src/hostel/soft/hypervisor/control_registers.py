"""MOV to and from control registers, CLTS, LMSW, and WRMSR of EFER: what exits of them, and what is allowed.

The guest may have values that the processor must not: VMXE, NE and, with shadow paging, PG and PAE are
the hypervisor's (SDM vol. 3C §25.3). It reads its own back from the read shadows. Checks: SDM vol. 3A
§2.5, §4.1.2 and vol. 2B, MOV—Move to/from Control Registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP, fault
from hostel.soft.paging.virtualizer import Registers
from hostel.soft.paging.walk import PHYSICAL_BITS
from hostel.soft.silicon import VmExit
from hostel.soft.state import (
    CR0_CD,
    CR0_EM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_MCE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
)
from hostel.soft.vmx.fields import Field

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

CR0_GUEST_OWNS = CR0_TS | CR0_MP | CR0_EM
CR4_GUEST_OWNS = CR4_TSD | CR4_DE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE
"""No exit for these: they mean nothing to the hypervisor. The others are compared with the read shadow."""
CR0_KNOWN = 0xE005_003F
CR4_KNOWN = CR4_GUEST_OWNS | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_SMEP | CR4_SMAP
EFER_KNOWN = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
CR3_RESERVED = (1 << 64) - (1 << PHYSICAL_BITS)

MOV_TO, MOV_FROM, CLTS, LMSW = range(4)
_CODE_64 = 1 << 13


class Refused(Exception):
    """#GP(0) to the guest."""


def handle(vcpu: SoftVcpu, exit: VmExit) -> None:
    """Qualification: SDM vol. 3C table 27-3."""
    number, kind = exit.qualification & 0xF, exit.qualification >> 4 & 3
    register = exit.qualification >> 8 & 0xF
    try:
        if kind == MOV_FROM:
            vcpu.set_register(register, _read(vcpu, number))
        elif kind == MOV_TO:
            _write(vcpu, number, _operand(vcpu, register))
        elif kind == CLTS:
            set_cr0(vcpu, cr0(vcpu) & ~CR0_TS)
        else:  # LMSW can set PE and not clear it
            low = exit.qualification >> 16 & 0xF
            set_cr0(vcpu, cr0(vcpu) & ~0xE | low)
    except Refused:
        vcpu.inject(fault(GP))
    else:
        vcpu.skip(exit)


def _operand(vcpu: SoftVcpu, register: int) -> int:
    """Of 32 bits outside of 64-bit code, whatever is left in the upper half."""
    value = vcpu.register(register)
    if value >> 32 and not (vcpu.in_long_mode() and vcpu.read(Field.GUEST_CS_RIGHTS) & _CODE_64):
        value &= 0xFFFF_FFFF
    return value


def _read(vcpu: SoftVcpu, number: int) -> int:
    if number == 8:
        return vcpu.cr8
    return guest(vcpu).cr3


def _write(vcpu: SoftVcpu, number: int, value: int) -> None:
    if number == 8:
        if value >> 4:
            raise Refused
        vcpu.cr8 = value
    else:
        {0: set_cr0, 3: set_cr3, 4: set_cr4}[number](vcpu, value)


def guest(vcpu: SoftVcpu) -> Registers:
    """What the guest believes it has."""
    state = vcpu.translation_state()
    believed = vcpu.paging.guest(state)
    return Registers(cr0(vcpu), believed.cr3, cr4(vcpu), believed.efer)


def cr0(vcpu: SoftVcpu) -> int:
    real, shadow = vcpu.read(Field.GUEST_CR0), vcpu.read(Field.CR0_SHADOW)
    return real & CR0_GUEST_OWNS | shadow & ~CR0_GUEST_OWNS


def cr4(vcpu: SoftVcpu) -> int:
    real, shadow = vcpu.read(Field.GUEST_CR4), vcpu.read(Field.CR4_SHADOW)
    return real & CR4_GUEST_OWNS | shadow & ~CR4_GUEST_OWNS


def load(vcpu: SoftVcpu, wanted: Registers) -> None:
    """Checked already: real values into the guest-state area, wanted ones into the shadows."""
    wanted = wanted.settled()
    real = vcpu.paging.load(wanted)
    vcpu.write(Field.GUEST_CR0, real.cr0 | CR0_NE)
    vcpu.write(Field.GUEST_CR3, real.cr3)
    vcpu.write(Field.GUEST_CR4, real.cr4 | CR4_VMXE)
    vcpu.write(Field.GUEST_EFER, real.efer)
    vcpu.write(Field.CR0_SHADOW, wanted.cr0)
    vcpu.write(Field.CR4_SHADOW, wanted.cr4)
    vcpu.set_long_mode(bool(real.efer & EFER_LMA))
    vcpu.forget_translation_state()


def set_cr0(vcpu: SoftVcpu, value: int) -> None:
    now = guest(vcpu)
    if value >> 32 or (value & CR0_PG and not value & CR0_PE):
        raise Refused
    if value & CR0_NW and not value & CR0_CD:
        raise Refused
    value = value & CR0_KNOWN | CR0_ET
    if (value ^ now.cr0) & CR0_PG:
        _check_paging(vcpu, now, value)
    load(vcpu, Registers(value, now.cr3, now.cr4, now.efer))


def _check_paging(vcpu: SoftVcpu, now: Registers, cr0: int) -> None:
    """SDM vol. 3A §9.8.5: long mode begins and ends with PG; PAE has to be there, CS not to be 64-bit."""
    long_code = vcpu.read(Field.GUEST_CS_RIGHTS) & _CODE_64
    if cr0 & CR0_PG and now.efer & EFER_LME:
        if not now.cr4 & CR4_PAE or long_code:
            raise Refused
    elif not cr0 & CR0_PG and now.efer & EFER_LMA and long_code:
        raise Refused


def set_cr3(vcpu: SoftVcpu, value: int) -> None:
    now = guest(vcpu)
    if now.efer & EFER_LMA:
        if value & CR3_RESERVED:
            raise Refused
    else:
        value &= 0xFFFF_FFFF
    load(vcpu, Registers(now.cr0, value, now.cr4, now.efer))


def set_cr4(vcpu: SoftVcpu, value: int) -> None:
    now = guest(vcpu)
    if value & ~CR4_KNOWN or (now.efer & EFER_LMA and not value & CR4_PAE):
        raise Refused
    load(vcpu, Registers(now.cr0, now.cr3, value, now.efer))


def set_efer(vcpu: SoftVcpu, value: int) -> None:
    """LMA is not the guest's to write; LME not while it pages (SDM vol. 3A §2.2.1)."""
    now = guest(vcpu)
    if value & ~EFER_KNOWN or ((value ^ now.efer) & EFER_LME and now.cr0 & CR0_PG):
        raise Refused
    load(vcpu, Registers(now.cr0, now.cr3, now.cr4, value))
