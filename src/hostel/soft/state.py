"""A processor's state: what VM entry loads and VM exit saves, and the general registers beside it.

Segments keep their hidden part. Access rights are in the VMCS's format (SDM vol. 3C §24.4.1):
type 0–3, S 4, DPL 5–6, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
"""

from __future__ import annotations

from typing import Any

import msgspec

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
"""Positions in ``CpuState.gpr``: the numbers that instructions use."""

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 1, 2, 4, 8, 0x10, 0x20
CR0_WP, CR0_AM, CR0_NW, CR0_CD, CR0_PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31
CR4_VME, CR4_PVI, CR4_TSD, CR4_DE, CR4_PSE, CR4_PAE, CR4_MCE, CR4_PGE = (1 << n for n in range(8))
CR4_PCE = 0x100
CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_UMIP, CR4_LA57, CR4_VMXE = 0x200, 0x400, 0x800, 1 << 12, 1 << 13
CR4_FSGSBASE, CR4_OSXSAVE, CR4_SMEP, CR4_SMAP = 1 << 16, 1 << 18, 1 << 20, 1 << 21
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE, EFER_SVME = 1, 1 << 8, 1 << 10, 1 << 11, 1 << 12
RFLAGS_ONE, RFLAGS_TF, RFLAGS_IF, RFLAGS_DF = 2, 1 << 8, 1 << 9, 1 << 10
RFLAGS_IOPL, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM, RFLAGS_AC = (
    3 << 12,
    1 << 14,
    1 << 16,
    1 << 17,
    1 << 18,
)
RFLAGS_RESERVED = ~0x3F_FFFF | 1 << 15 | 1 << 5 | 1 << 3
DR6_ONES = 0xFFFF_0FF0
"""Bits of DR6 that are always 1 (SDM vol. 3B §17.2.3)."""

ACTIVE, HALTED, SHUTDOWN, WAIT_FOR_SIPI = range(4)
"""Activity states (SDM vol. 3C §24.4.2)."""
BLOCKED_BY_STI, BLOCKED_BY_MOV_SS, BLOCKED_BY_SMI, BLOCKED_BY_NMI = 1, 2, 4, 8
"""Interruptibility (SDM vol. 3C §24.4.2)."""

RIGHTS_CODE64, RIGHTS_CODE32, RIGHTS_CODE16 = 0xA09B, 0xC09B, 0x009B
RIGHTS_DATA32, RIGHTS_DATA16 = 0xC093, 0x0093
RIGHTS_TSS64, RIGHTS_TSS32, RIGHTS_LDT, RIGHTS_UNUSABLE = 0x008B, 0x008B, 0x0082, 0x10000


class Segment(msgspec.Struct):
    """A segment register with its hidden part. ``limit`` is in bytes."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    rights: int = RIGHTS_DATA16

    @property
    def dpl(self) -> int:
        return self.rights >> 5 & 3

    @property
    def usable(self) -> bool:
        return not self.rights & RIGHTS_UNUSABLE


class Table(msgspec.Struct):
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0xFFFF


class CpuState(msgspec.Struct):
    """As after INIT (SDM vol. 3A table 9-1), but for the reset vector: set ``cs`` and ``rip``.

    ``msrs`` holds what the guest sees of the MSRs below that have no field of their own:
    the SYSCALL and SYSENTER groups, KERNEL_GS_BASE, PAT, TSC_AUX, MISC_ENABLE, by number.
    """

    gpr: list[int] = msgspec.field(default_factory=lambda: [0] * 16)
    rip: int = 0
    rflags: int = RFLAGS_ONE
    cr0: int = CR0_ET
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    xcr0: int = 1
    dr: list[int] = msgspec.field(default_factory=lambda: [0] * 4)
    dr6: int = DR6_ONES
    dr7: int = 0x400
    es: Segment = msgspec.field(default_factory=Segment)
    cs: Segment = msgspec.field(default_factory=lambda: Segment(rights=RIGHTS_CODE16))
    ss: Segment = msgspec.field(default_factory=Segment)
    ds: Segment = msgspec.field(default_factory=Segment)
    fs: Segment = msgspec.field(default_factory=Segment)
    gs: Segment = msgspec.field(default_factory=Segment)
    ldtr: Segment = msgspec.field(default_factory=lambda: Segment(rights=RIGHTS_LDT))
    tr: Segment = msgspec.field(default_factory=lambda: Segment(rights=RIGHTS_TSS32))
    gdtr: Table = msgspec.field(default_factory=Table)
    idtr: Table = msgspec.field(default_factory=Table)
    msrs: dict[int, int] = msgspec.field(default_factory=dict)
    activity: int = ACTIVE
    interruptibility: int = 0

    @property
    def cpl(self) -> int:
        """SS.DPL (SDM vol. 3C §24.4.1); real mode is ring 0."""
        return self.ss.dpl if self.cr0 & CR0_PE else 0

    @property
    def long_mode(self) -> bool:
        return bool(self.efer & EFER_LMA)

    @property
    def bits(self) -> int:
        """How instructions are read: 16, 32 or 64."""
        if self.long_mode and self.cs.rights & 1 << 13:
            return 64
        return 32 if self.cr0 & CR0_PE and self.cs.rights & 1 << 14 else 16

    def plain(self) -> dict[str, Any]:
        """For a trace, or to compare two."""
        data: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        return data


MSR_APIC_BASE = 0x1B
MSR_TSC, MSR_TSC_DEADLINE, MSR_TSC_AUX = 0x10, 0x6E0, 0xC000_0103
MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP = 0x174, 0x175, 0x176
MSR_MISC_ENABLE, MSR_PAT, MSR_DEBUGCTL, MSR_MTRR_DEF_TYPE = 0x1A0, 0x277, 0x1D9, 0x2FF
MSR_EFER, MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK = (0xC000_0080 + n for n in range(5))
MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102

HELD_MSRS = frozenset(
    {
        *(MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK, MSR_KERNEL_GS_BASE),
        *(MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP),
        *(MSR_PAT, MSR_TSC_AUX, MSR_MISC_ENABLE),
    }
)
"""What ``CpuState.msrs`` holds of a guest."""
ADDRESS_MSRS = frozenset(
    {
        *(MSR_LSTAR, MSR_CSTAR, MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE),
        *(MSR_SYSENTER_ESP, MSR_SYSENTER_EIP),
    }
)
"""These hold a linear address, which must be canonical."""
LINEAR_BITS = 48
PAT_AT_RESET = 0x0007_0406_0007_0406


def canonical(address: int) -> bool:
    """Bits 63:47 are the same."""
    return address >> LINEAR_BITS - 1 in (0, (1 << 65 - LINEAR_BITS) - 1)
