"""MOV to and from control registers, CLTS, LMSW, and WRMSR of EFER: what exits of them, and what is allowed.

The guest may have values that the processor must not: VMXE, NE and, with shadow paging, PG and PAE are
the hypervisor's (SDM vol. 3C §25.3). It reads its own back from the read shadows. What is a #GP stands in
``register_checks.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft import register_checks
from hostel.soft.exceptions import GP, fault
from hostel.soft.paging.virtualizer import Registers
from hostel.soft.paging.walk import pointers
from hostel.soft.register_checks import Refused
from hostel.soft.silicon import VmExit
from hostel.soft.state import (
    CR0_EM,
    CR0_MP,
    CR0_NE,
    CR0_TS,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_TSD,
    CR4_VMXE,
    EFER_LMA,
)
from hostel.soft.vmx.fields import Field

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

CR0_GUEST_OWNS = CR0_TS | CR0_MP | CR0_EM
CR4_GUEST_OWNS = CR4_TSD | CR4_DE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_FSGSBASE
"""No exit for these: they mean nothing to the hypervisor. The others are compared with the read shadow."""

MOV_TO, MOV_FROM, CLTS, LMSW = range(4)
_CODE_64 = 1 << 13


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
            _move(vcpu, 0, cr0(vcpu) & ~CR0_TS)
        else:  # LMSW can set PE and not clear it
            low = exit.qualification >> 16 & 0xF
            _move(vcpu, 0, cr0(vcpu) & ~0xE | low)
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
        vcpu.cr8 = register_checks.cr8(value)
    else:
        _move(vcpu, number, value)


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


def _move(vcpu: SoftVcpu, number: int, value: int) -> None:
    """A MOV to CR0, CR3 or CR4, as the guest sees it."""
    code64 = bool(vcpu.read(Field.GUEST_CS_RIGHTS) & _CODE_64)
    guest_map = vcpu.machine.guest_map
    wanted = register_checks.load(
        guest(vcpu), number, value, lambda cr3: pointers(guest_map, cr3), code64=code64
    )
    load(vcpu, wanted)


def set_efer(vcpu: SoftVcpu, value: int) -> None:
    now = guest(vcpu)
    load(vcpu, Registers(now.cr0, now.cr3, now.cr4, register_checks.efer(now, value)))
