"""What our processor's VMX can do, told by its capability MSRs (SDM vol. 3D appendix A).

A control register's MSR has two halves (§A.2): a bit set in the low one (allowed-0) must be 1, a bit
clear in the high one (allowed-1) must be 0. Some bits "default to 1"; the TRUE MSRs (§A.3.1 …) tell
which of those may be 0 after all, and entry checks go by these.
"""

from __future__ import annotations

from enum import IntEnum

from hostel.soft.paging.walk import PHYSICAL_BITS
from hostel.soft.register_checks import CR4_SILICON
from hostel.soft.silicon import Pin, Primary, Secondary
from hostel.soft.vmx.fields import Field

REVISION = 0x68_6F73
"""VMCS revision identifier: of our layout in ``fields.py``."""
NO_VMCS = (1 << 64) - 1
"""The current-VMCS pointer and the VMCS link pointer, when there is none."""


class ExitControl(IntEnum):
    """VM-exit controls (SDM vol. 3C §24.7.1)."""

    SAVE_DEBUG = 1 << 2
    HOST_64 = 1 << 9
    """Host address-space size."""
    ACKNOWLEDGE_INTERRUPT = 1 << 15
    SAVE_PAT = 1 << 18
    LOAD_PAT = 1 << 19
    SAVE_EFER = 1 << 20
    LOAD_EFER = 1 << 21
    SAVE_TIMER = 1 << 22


class EntryControl(IntEnum):
    """VM-entry controls (SDM vol. 3C §24.8.1)."""

    LOAD_DEBUG = 1 << 2
    GUEST_64 = 1 << 9
    """IA-32e mode guest."""
    LOAD_PAT = 1 << 14
    LOAD_EFER = 1 << 15


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def every(flags: type[IntEnum]) -> int:
    return sum(flags)


DEFAULT1_PIN = bits(1, 2, 4)
DEFAULT1_PRIMARY = bits(1, 4, 5, 6, 8, 13, 14, 15, 16, 26)
DEFAULT1_EXIT = bits(*range(9), 10, 11, 13, 14, 16, 17)
DEFAULT1_ENTRY = bits(*range(9), 12)
"""The default1 classes (§A.3.1, A.3.2, A.4, A.5)."""


def control_msr(known: int, default1: int, *, true: bool) -> int:
    """Allowed-0 and allowed-1 of a control register whose bits ``known`` we have."""
    must = default1 & ~known if true else default1
    return (known | default1) << 32 | must


MSR_FEATURE_CONTROL = 0x3A
FEATURE_LOCKED, FEATURE_VMX = bits(0), bits(2)

MSR_VMX_BASIC = 0x480
MSR_VMX_PIN, MSR_VMX_PRIMARY, MSR_VMX_EXIT, MSR_VMX_ENTRY = 0x481, 0x482, 0x483, 0x484
MSR_VMX_MISC = 0x485
MSR_VMX_CR0_FIXED0, MSR_VMX_CR0_FIXED1 = 0x486, 0x487
MSR_VMX_CR4_FIXED0, MSR_VMX_CR4_FIXED1 = 0x488, 0x489
MSR_VMX_VMCS_ENUM, MSR_VMX_SECONDARY, MSR_VMX_EPT_VPID = 0x48A, 0x48B, 0x48C
MSR_VMX_TRUE_PIN, MSR_VMX_TRUE_PRIMARY = 0x48D, 0x48E
MSR_VMX_TRUE_EXIT, MSR_VMX_TRUE_ENTRY = 0x48F, 0x490

CR0_FIXED0 = bits(0, 5, 31)
"""PE, NE and PG: always 1 in VMX operation (§23.8); a guest's PE and PG may be 0 if it is unrestricted."""
CR0_FIXED1 = 0xFFFF_FFFF
CR4_FIXED0 = bits(13)
CR4_FIXED1 = CR4_SILICON
"""No LA57 and no PCIDE: four levels, one PCID."""

CR3_TARGETS = 4
MSR_LIST_LIMIT = 512
TIMER_SHIFT = 0
"""The preemption timer counts at the TSC's rate (IA32_VMX_MISC bits 4:0): one a guest instruction."""

EPT_VPID = (
    bits(6, 8, 14, 16, 17)  # four levels; memory types UC and WB; pages of 2 MiB and of 1 GiB
    | bits(20, 21, 25, 26)  # INVEPT: one context, all; accessed and dirty flags
    | bits(32, 40, 41, 42, 43)  # INVVPID: an address, one context, all, all but globals
)

CAPABILITIES: dict[int, int] = {
    # A region is 4 KiB, write-back; INS and OUTS report their operands; there are TRUE MSRs (§A.1).
    MSR_VMX_BASIC: REVISION | 4096 << 32 | 6 << 50 | bits(54, 55),
    MSR_VMX_PIN: control_msr(every(Pin), DEFAULT1_PIN, true=False),
    MSR_VMX_TRUE_PIN: control_msr(every(Pin), DEFAULT1_PIN, true=True),
    MSR_VMX_PRIMARY: control_msr(every(Primary), DEFAULT1_PRIMARY, true=False),
    MSR_VMX_TRUE_PRIMARY: control_msr(every(Primary), DEFAULT1_PRIMARY, true=True),
    MSR_VMX_SECONDARY: control_msr(every(Secondary), 0, true=True),
    MSR_VMX_EXIT: control_msr(every(ExitControl), DEFAULT1_EXIT, true=False),
    MSR_VMX_TRUE_EXIT: control_msr(every(ExitControl), DEFAULT1_EXIT, true=True),
    MSR_VMX_ENTRY: control_msr(every(EntryControl), DEFAULT1_ENTRY, true=False),
    MSR_VMX_TRUE_ENTRY: control_msr(every(EntryControl), DEFAULT1_ENTRY, true=True),
    # VM exits store LMA in the entry controls; a guest may be entered in HLT, shutdown, wait-for-SIPI (§A.6).
    MSR_VMX_MISC: TIMER_SHIFT | bits(5, 6, 7, 8) | CR3_TARGETS << 16,
    MSR_VMX_CR0_FIXED0: CR0_FIXED0,
    MSR_VMX_CR0_FIXED1: CR0_FIXED1,
    MSR_VMX_CR4_FIXED0: CR4_FIXED0,
    MSR_VMX_CR4_FIXED1: CR4_FIXED1,
    MSR_VMX_VMCS_ENUM: max(field & 0x3FE for field in Field),
    MSR_VMX_EPT_VPID: EPT_VPID,
}


def unsupported(value: int, msr: int) -> int:
    """Bits of a control register that its MSR does not allow."""
    allowed = CAPABILITIES[msr]
    return (allowed & 0xFFFF_FFFF & ~value) | (value & ~(allowed >> 32))


def fits(address: int) -> bool:
    """Whether a physical address is within MAXPHYADDR."""
    return not address >> PHYSICAL_BITS
