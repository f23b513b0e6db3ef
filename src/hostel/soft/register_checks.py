"""What a control register or an MSR may hold: one table, for all who load one.

::

    MOV CRn, WRMSR ── no exit ──> a core              core/control.py, core/svm_registers.py ─┐
                   ── exit ─────> the hypervisor      hypervisor/control_registers.py, msrs.py ├─> here
    MSR areas, guest and host state ── VM entry, exit vmx/msrs.py, check_guest.py, check_host.py ─┘

Nothing here changes anything: a function returns what the register becomes, or raises ``Refused``, which
is #GP(0). Rules: SDM vol. 3A §2.5 (CR0, CR4), §4.1 (paging modes), §4.4.1 (PAE's directory pointers),
§2.2.1 and §9.8.5 (EFER), vol. 2B, MOV—Move to/from Control Registers and WRMSR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cpuid import FEATURES
from .paging.virtualizer import Registers
from .paging.walk import PDPTE_RESERVED, PHYSICAL_BITS, PRESENT, ControlRegisters
from .state import (
    ADDRESS_MSRS,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_MCE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    CR4_PCE,
    CR4_PGE,
    CR4_PSE,
    CR4_PVI,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    CR4_VME,
    CR4_VMXE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    MSR_DEBUGCTL,
    MSR_MTRR_DEF_TYPE,
    MSR_PAT,
    MSR_TSC_AUX,
    canonical,
)

CR0_KNOWN = 0xE005_003F
"""The other bits of the lower half are ignored; those of the upper half are refused (§2.5)."""
CR4_NEEDS = {
    CR4_VME: "vme",
    CR4_PVI: "vme",
    CR4_TSD: "tsc",
    CR4_DE: "de",
    CR4_PSE: "pse",
    CR4_PAE: "pae",
    CR4_MCE: "mce",
    CR4_PGE: "pge",
    CR4_PCE: "",
    CR4_OSFXSR: "fxsr",
    CR4_OSXMMEXCPT: "sse",
    CR4_VMXE: "vmx",
    CR4_FSGSBASE: "fsgsbase",
    CR4_OSXSAVE: "xsave",
    CR4_SMEP: "smep",
    CR4_SMAP: "smap",
}
"""What our silicon has of CR4, and the CPUID feature that a guest must have been shown to set it (§2.5)."""
CR4_SILICON = sum(CR4_NEEDS)
CR4_OFFERED = sum(bit for bit, need in CR4_NEEDS.items() if not need or need in FEATURES)
EFER_KNOWN = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
_CR0_POINTERS = CR0_CD | CR0_NW | CR0_PG
_CR4_POINTERS = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP
"""A change of one of these reads PAE's directory pointers anew, as a load of CR3 does (§4.4.1)."""
_PAT_TYPES = frozenset({0, 1, 4, 5, 6, 7})
"""UC, WC, WT, WP, WB, UC- (§11.12.2)."""
_MTRR_TYPES = frozenset({0, 1, 4, 5, 6})
"""Of IA32_MTRR_DEF_TYPE; bits 10 and 11 enable (§11.11.2.1)."""
_LBR_BTF = 3

Pointers = Callable[[int], Sequence[int]]
"""The four PDPTEs that a CR3 points at."""


class Refused(Exception):
    """#GP(0)."""


def _hold(condition: object) -> None:
    if not condition:
        raise Refused


# --- Control registers ---


def load(
    now: ControlRegisters,
    number: int,
    value: int,
    pointers: Pointers,
    *,
    code64: bool,
    cr4_known: int = CR4_OFFERED,
) -> Registers:
    """All four after a MOV of ``value`` to CR0, CR3 or CR4. ``code64``: it stands in 64-bit code."""
    cr0, cr3, cr4 = now.cr0, now.cr3, now.cr4
    if number == 0:
        cr0 = _cr0(now, value, code64)
    elif number == 3:
        cr3 = _cr3(now, value)
    else:
        cr4 = _cr4(now, value, cr4_known)
    after = Registers(cr0, cr3, cr4, now.efer).settled()
    if _reads_pointers(now, after, number):
        _hold(not any(entry & PRESENT and entry & PDPTE_RESERVED for entry in pointers(cr3)))
    return after


def _cr0(now: ControlRegisters, value: int, code64: bool) -> int:
    """PG without PE is what a guest in paged real mode has been given, and cannot itself load."""
    changed = value ^ now.cr0
    _hold(not value >> 32)
    _hold(not (value & CR0_PG and changed & (CR0_PG | CR0_PE)) or value & CR0_PE)
    _hold(not value & CR0_NW or value & CR0_CD)
    if changed & CR0_PG and value & CR0_PG:
        _hold(not now.efer & EFER_LME or (now.cr4 & CR4_PAE and not code64))
    elif changed & CR0_PG:
        _hold(not (now.efer & EFER_LMA and code64))
    return value & CR0_KNOWN | CR0_ET


def _cr3(now: ControlRegisters, value: int) -> int:
    if not now.efer & EFER_LMA:
        return value & 0xFFFF_FFFF
    _hold(not value >> PHYSICAL_BITS)
    return value


def _cr4(now: ControlRegisters, value: int, known: int) -> int:
    _hold(not value & ~known)
    _hold(value & CR4_PAE or not now.efer & EFER_LMA)
    return value


def _reads_pointers(now: ControlRegisters, after: Registers, number: int) -> bool:
    if not (after.cr0 & CR0_PG and after.cr4 & CR4_PAE) or after.efer & EFER_LMA:
        return False
    changed = (now.cr0 ^ after.cr0) & _CR0_POINTERS or (now.cr4 ^ after.cr4) & _CR4_POINTERS
    return number == 3 or bool(changed)


def cr8(value: int) -> int:
    _hold(not value >> 4)
    return value


# --- Model-specific registers ---


def efer(now: ControlRegisters, value: int) -> int:
    """LMA is not the software's to write; LME not while it pages."""
    _hold(not value & ~EFER_KNOWN)
    _hold(not (value ^ now.efer) & EFER_LME or not now.cr0 & CR0_PG)
    return value & ~EFER_LMA | now.efer & EFER_LMA


def valid_pat(value: int) -> bool:
    return all(value >> at & 0xFF in _PAT_TYPES for at in range(0, 64, 8))


_MSRS: dict[int, Callable[[int], bool]] = {
    **dict.fromkeys(ADDRESS_MSRS, canonical),
    MSR_PAT: valid_pat,
    MSR_TSC_AUX: lambda value: not value >> 32,
    MSR_DEBUGCTL: lambda value: not value & ~_LBR_BTF,
    MSR_MTRR_DEF_TYPE: lambda value: not value & ~0xCFF and value & 0xFF in _MTRR_TYPES,
}


def msr(number: int, value: int) -> int:
    """Any but EFER. What is not in the table takes any value."""
    rule = _MSRS.get(number)
    _hold(rule is None or rule(value))
    return value
