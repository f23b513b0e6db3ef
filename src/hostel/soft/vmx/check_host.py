"""VM entry's checks of the host-state area (SDM vol. 3C §26.2.2–26.2.4); the first broken: VMfailValid(8)."""

from __future__ import annotations

from hostel.soft.register_checks import EFER_KNOWN, valid_pat
from hostel.soft.state import CR4_PAE, EFER_LMA, EFER_LME, canonical
from hostel.soft.vmx.capabilities import (
    CR0_FIXED0,
    CR0_FIXED1,
    CR4_FIXED0,
    CR4_FIXED1,
    EntryControl,
    ExitControl,
    fits,
)
from hostel.soft.vmx.check_controls import Checks
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.vmcs import Vmcs


def check_host(vmcs: Vmcs) -> Checks:
    """Without the address-space size, which depends on the processor's mode too."""
    yield from _control_registers(vmcs)
    yield from _msrs(vmcs)
    yield from _segments(vmcs)


def fixed(value: int, fixed0: int, fixed1: int) -> bool:
    """Whether a control register is one that VMX operation supports (§23.8)."""
    return value & fixed0 == fixed0 and not value & ~fixed1


def _control_registers(vmcs: Vmcs) -> Checks:
    yield fixed(vmcs.read(Field.HOST_CR0), CR0_FIXED0, CR0_FIXED1), "§26.2.2: host CR0"
    yield fixed(vmcs.read(Field.HOST_CR4), CR4_FIXED0, CR4_FIXED1), "§26.2.2: host CR4"
    yield fits(vmcs.read(Field.HOST_CR3)), "§26.2.2: host CR3 is beyond the physical addresses"


def _msrs(vmcs: Vmcs) -> Checks:
    for field in (Field.HOST_SYSENTER_ESP, Field.HOST_SYSENTER_EIP):
        yield canonical(vmcs.read(field)), f"§26.2.2: {field.name} is not canonical"
    leave = vmcs.read(Field.EXIT_CONTROLS)
    if leave & ExitControl.LOAD_PAT:
        yield valid_pat(vmcs.read(Field.HOST_PAT)), "§26.2.2: host PAT"
    if leave & ExitControl.LOAD_EFER:
        efer, both = vmcs.read(Field.HOST_EFER), EFER_LMA | EFER_LME
        yield not efer & ~EFER_KNOWN, "§26.2.2: reserved bits of the host EFER"
        yield (
            efer & both == (both if leave & ExitControl.HOST_64 else 0),
            "§26.2.2: LMA and LME of the host EFER are not the host's address-space size",
        )


HOST_SELECTORS = tuple(
    field for field in Field if field.name.startswith("HOST_") and field < 0x2000
)
CANONICAL_BASES = (
    Field.HOST_FS_BASE,
    Field.HOST_GS_BASE,
    Field.HOST_GDTR_BASE,
    Field.HOST_IDTR_BASE,
    Field.HOST_TR_BASE,
)


def _segments(vmcs: Vmcs) -> Checks:
    read = vmcs.read
    for field in HOST_SELECTORS:
        yield not read(field) & 7, f"§26.2.3: RPL or TI of {field.name}"
    yield read(Field.HOST_CS_SELECTOR) != 0, "§26.2.3: host CS is null"
    yield read(Field.HOST_TR_SELECTOR) != 0, "§26.2.3: host TR is null"
    yield (
        read(Field.HOST_SS_SELECTOR) != 0 or bool(read(Field.EXIT_CONTROLS) & ExitControl.HOST_64),
        "§26.2.3: host SS is null",
    )
    for field in CANONICAL_BASES:
        yield canonical(read(field)), f"§26.2.3: {field.name} is not canonical"


def check_address_space(vmcs: Vmcs, *, long: bool) -> Checks:
    """§26.2.4; ``long``: the processor is in IA-32e mode now."""
    host = bool(vmcs.read(Field.EXIT_CONTROLS) & ExitControl.HOST_64)
    guest = bool(vmcs.read(Field.ENTRY_CONTROLS) & EntryControl.GUEST_64)
    yield host == long, "§26.2.4: the host's address-space size is not the processor's mode"
    yield host or not guest, "§26.2.4: IA-32e mode guest on a host that is not"
    rip = vmcs.read(Field.HOST_RIP)
    if host:
        yield bool(vmcs.read(Field.HOST_CR4) & CR4_PAE), "§26.2.4: 64-bit host without CR4.PAE"
        yield canonical(rip), "§26.2.4: host RIP is not canonical"
    else:
        yield not rip >> 32, "§26.2.4: host RIP beyond 32 bits"
