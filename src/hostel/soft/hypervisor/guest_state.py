"""The guest-state area by VMREAD and VMWRITE (SDM vol. 3C §24.4), from and to a ``CpuState``.

Real registers go in and come out here; what the guest believes is in CR0, CR3, CR4 and EFER is the
matter of ``paging`` and of the read shadows. General registers but RSP are in no VMCS.
"""

from __future__ import annotations

from collections.abc import Callable

from hostel.soft.state import (
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RSP,
    CpuState,
    Segment,
    Table,
)
from hostel.soft.vmx.fields import SEGMENTS, Field

Read = Callable[[int], int]
Write = Callable[[int, int], None]

_SEGMENT_FIELDS = tuple(
    (
        name,
        Field[f"GUEST_{name.upper()}_SELECTOR"],
        Field[f"GUEST_{name.upper()}_BASE"],
        Field[f"GUEST_{name.upper()}_LIMIT"],
        Field[f"GUEST_{name.upper()}_RIGHTS"],
    )
    for name in SEGMENTS
)
_MSR_FIELDS = (
    (MSR_SYSENTER_CS, Field.GUEST_SYSENTER_CS),
    (MSR_SYSENTER_ESP, Field.GUEST_SYSENTER_ESP),
    (MSR_SYSENTER_EIP, Field.GUEST_SYSENTER_EIP),
)
_PLAIN = (
    ("rip", Field.GUEST_RIP),
    ("rflags", Field.GUEST_RFLAGS),
    ("cr0", Field.GUEST_CR0),
    ("cr3", Field.GUEST_CR3),
    ("cr4", Field.GUEST_CR4),
    ("efer", Field.GUEST_EFER),
    ("dr7", Field.GUEST_DR7),
    ("activity", Field.GUEST_ACTIVITY),
    ("interruptibility", Field.GUEST_INTERRUPTIBILITY),
)


def load(state: CpuState, read: Read) -> None:
    """Into ``state``, all of it."""
    for name, field in _PLAIN:
        setattr(state, name, read(field))
    for name, selector, base, limit, rights in _SEGMENT_FIELDS:
        segment = Segment(read(selector), read(base), read(limit), read(rights))
        setattr(state, name, segment)
    state.gdtr = Table(read(Field.GUEST_GDTR_BASE), read(Field.GUEST_GDTR_LIMIT))
    state.idtr = Table(read(Field.GUEST_IDTR_BASE), read(Field.GUEST_IDTR_LIMIT))
    state.gpr[RSP] = read(Field.GUEST_RSP)
    for msr, field in _MSR_FIELDS:
        state.msrs[msr] = read(field)


def load_translation(state: CpuState, read: Read) -> None:
    """Only what decides how a linear address is translated: a page fault needs no more."""
    state.cr0, state.cr3 = read(Field.GUEST_CR0), read(Field.GUEST_CR3)
    state.cr4, state.efer = read(Field.GUEST_CR4), read(Field.GUEST_EFER)
    state.rflags = read(Field.GUEST_RFLAGS)
    state.ss.rights = read(Field.GUEST_SS_RIGHTS)


def store(state: CpuState, write: Write) -> None:
    """From ``state``, all of it."""
    for name, field in _PLAIN:
        write(field, getattr(state, name))
    for name, selector, base, limit, rights in _SEGMENT_FIELDS:
        segment: Segment = getattr(state, name)
        write(selector, segment.selector)
        write(base, segment.base)
        write(limit, segment.limit)
        write(rights, segment.rights)
    write(Field.GUEST_GDTR_BASE, state.gdtr.base)
    write(Field.GUEST_GDTR_LIMIT, state.gdtr.limit)
    write(Field.GUEST_IDTR_BASE, state.idtr.base)
    write(Field.GUEST_IDTR_LIMIT, state.idtr.limit)
    write(Field.GUEST_RSP, state.gpr[RSP])
    for msr, field in _MSR_FIELDS:
        write(field, state.msrs.get(msr, 0))
