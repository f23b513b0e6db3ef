"""VM entry's checks of the guest-state area (SDM vol. 3C §26.3.1), in the manual's order.

Here the processor has left the hypervisor's instruction behind: the first check that fails is a VM exit
(reason 33) whose qualification is 0, but where a check says otherwise (§26.7). Segments are checked in
``check_segments.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from hostel.soft.paging.walk import PDPTE_RESERVED
from hostel.soft.physical import PhysicalMemory
from hostel.soft.register_checks import EFER_KNOWN, valid_pat
from hostel.soft.silicon import EventType, Pin, Secondary
from hostel.soft.state import (
    ACTIVE,
    BLOCKED_BY_MOV_SS,
    BLOCKED_BY_NMI,
    BLOCKED_BY_SMI,
    BLOCKED_BY_STI,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    HALTED,
    LINEAR_BITS,
    RFLAGS_IF,
    RFLAGS_ONE,
    RFLAGS_RESERVED,
    RFLAGS_TF,
    RFLAGS_VM,
    SHUTDOWN,
    WAIT_FOR_SIPI,
    canonical,
)
from hostel.soft.vmx.capabilities import (
    CR0_FIXED0,
    CR0_FIXED1,
    CR4_FIXED0,
    CR4_FIXED1,
    NO_VMCS,
    REVISION,
    EntryControl,
    fits,
)
from hostel.soft.vmx.check_host import fixed
from hostel.soft.vmx.check_segments import check_segments
from hostel.soft.vmx.enter import EVENT_VALID, secondary_of
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.vmcs import Decoded, Vmcs, region

GENERAL, PDPTE, NMI_BLOCKED, LINK_POINTER = 0, 2, 3, 4
"""Exit qualifications of a failed entry (§26.7)."""

GuestChecks = Iterator[tuple[bool, str, int]]
"""What must hold, where the manual says so, the qualification if it does not."""

_U32 = Struct("<I")
CODE_64 = 1 << 13
DEBUGCTL_KNOWN, DEBUGCTL_BTF = 3, 2
PENDING_BS = 1 << 14
PENDING_RESERVED = ~0x1_FFFF | 1 << 16 | 0xFF0 | 1 << 13 | 1 << 15


def ruled_by(vmcs: Vmcs, decoded: Decoded) -> tuple[int, ...]:
    """What the rules depend on: while it is the same, what was right and was not written is right."""
    protected = vmcs.read(Field.GUEST_CR0) & CR0_PE
    v8086 = vmcs.read(Field.GUEST_RFLAGS) & RFLAGS_VM
    controls = decoded.controls
    return (decoded.entry, controls.pin, controls.secondary, protected, v8086)


def check_guest(vmcs: Vmcs, memory: PhysicalMemory, current: int, *, segments: bool) -> GuestChecks:
    yield from _general(_control_registers(vmcs))
    if segments:
        yield from _general(check_segments(vmcs))
    yield from _general(_tables(vmcs))
    yield from _general(check_rip(vmcs))
    yield from _general(_rflags(vmcs))
    yield from check_activity(vmcs)
    yield from _pending_debug(vmcs)
    yield from _link_pointer(vmcs, memory, current)
    yield from _pdptes(vmcs, memory)


def _general(checks: Iterator[tuple[bool, str]]) -> GuestChecks:
    for held, what in checks:
        yield held, what, GENERAL


def _long(vmcs: Vmcs) -> bool:
    return bool(vmcs.read(Field.ENTRY_CONTROLS) & EntryControl.GUEST_64)


def _injected(vmcs: Vmcs) -> tuple[int, int] | None:
    """Type and vector."""
    info = vmcs.read(Field.ENTRY_INTERRUPTION_INFO)
    return (info >> 8 & 7, info & 0xFF) if info & EVENT_VALID else None


# --- §26.3.1.1 control registers, debug registers, MSRs ---


def _control_registers(vmcs: Vmcs) -> Iterator[tuple[bool, str]]:
    cr0, cr4 = vmcs.read(Field.GUEST_CR0), vmcs.read(Field.GUEST_CR4)
    secondary = secondary_of(vmcs)
    paged_real = bool(secondary & Secondary.PAGED_REAL_MODE)
    fixed0 = CR0_FIXED0 & ~CR0_PE if paged_real else CR0_FIXED0
    if secondary & Secondary.UNRESTRICTED_GUEST:
        fixed0 &= ~(CR0_PE | CR0_PG)
    yield (
        fixed(cr0, fixed0, CR0_FIXED1),
        "§26.3.1.1: CR0 has bits that VMX operation does not allow",
    )
    yield not cr0 & CR0_PG or bool(cr0 & CR0_PE) or paged_real, "§26.3.1.1: CR0.PG without CR0.PE"
    yield (
        fixed(cr4, CR4_FIXED0, CR4_FIXED1),
        "§26.3.1.1: CR4 has bits that VMX operation does not allow",
    )
    entry = vmcs.read(Field.ENTRY_CONTROLS)
    if entry & EntryControl.LOAD_DEBUG:
        yield not vmcs.read(Field.GUEST_DEBUGCTL) & ~DEBUGCTL_KNOWN, "§26.3.1.1: DEBUGCTL"
    if _long(vmcs):
        yield bool(cr0 & CR0_PG and cr4 & CR4_PAE), "§26.3.1.1: IA-32e mode without PG and PAE"
    yield fits(vmcs.read(Field.GUEST_CR3)), "§26.3.1.1: CR3 is beyond the physical addresses"
    if entry & EntryControl.LOAD_DEBUG:
        yield not vmcs.read(Field.GUEST_DR7) >> 32, "§26.3.1.1: bits 63:32 of DR7"
    for field in (Field.GUEST_SYSENTER_ESP, Field.GUEST_SYSENTER_EIP):
        yield canonical(vmcs.read(field)), f"§26.3.1.1: {field.name} is not canonical"
    if entry & EntryControl.LOAD_PAT:
        yield valid_pat(vmcs.read(Field.GUEST_PAT)), "§26.3.1.1: PAT"
    if entry & EntryControl.LOAD_EFER:
        yield from _efer(vmcs, cr0)


def _efer(vmcs: Vmcs, cr0: int) -> Iterator[tuple[bool, str]]:
    efer = vmcs.read(Field.GUEST_EFER)
    yield not efer & ~EFER_KNOWN, "§26.3.1.1: reserved bits of EFER"
    yield bool(efer & EFER_LMA) == _long(vmcs), "§26.3.1.1: EFER.LMA is not the IA-32e mode control"
    yield (
        not cr0 & CR0_PG or bool(efer & EFER_LMA) == bool(efer & EFER_LME),
        "§26.3.1.1: EFER.LMA and LME differ while CR0.PG is set",
    )


# --- §26.3.1.3 descriptor tables; §26.3.1.4 RIP and RFLAGS ---


def _tables(vmcs: Vmcs) -> Iterator[tuple[bool, str]]:
    for field in (Field.GUEST_GDTR_BASE, Field.GUEST_IDTR_BASE):
        yield canonical(vmcs.read(field)), f"§26.3.1.3: {field.name} is not canonical"
    for field in (Field.GUEST_GDTR_LIMIT, Field.GUEST_IDTR_LIMIT):
        yield not vmcs.read(field) >> 16, f"§26.3.1.3: bits 31:16 of {field.name}"


def check_rip(vmcs: Vmcs) -> Iterator[tuple[bool, str]]:
    rip = vmcs.read(Field.GUEST_RIP)
    if _long(vmcs) and vmcs.read(Field.GUEST_CS_RIGHTS) & CODE_64:
        high = rip >> LINEAR_BITS
        yield high in (0, (1 << 64 - LINEAR_BITS) - 1), "§26.3.1.4: bits 63:48 of RIP differ"
    else:
        yield not rip >> 32, "§26.3.1.4: bits 63:32 of RIP"


def _rflags(vmcs: Vmcs) -> Iterator[tuple[bool, str]]:
    rflags = vmcs.read(Field.GUEST_RFLAGS)
    yield (
        not rflags & RFLAGS_RESERVED and bool(rflags & RFLAGS_ONE),
        "§26.3.1.4: reserved bits of RFLAGS",
    )
    protected = vmcs.read(Field.GUEST_CR0) & CR0_PE
    yield (
        not rflags & RFLAGS_VM or bool(protected and not _long(vmcs)),
        "§26.3.1.4: RFLAGS.VM in IA-32e mode or without CR0.PE",
    )


# --- §26.3.1.5 non-register state ---

INJECTABLE_HALTED = frozenset({1, 18})


def _injectable(activity: int, kind: int, vector: int) -> bool:
    """Whether an event may be injected into a guest of this activity state."""
    exception = kind == EventType.HARDWARE_EXCEPTION
    if activity == HALTED:
        return kind in (EventType.EXTERNAL, EventType.NMI) or (
            exception and vector in INJECTABLE_HALTED
        )
    if activity == SHUTDOWN:
        return kind == EventType.NMI or (exception and vector == 18)
    return activity != WAIT_FOR_SIPI


def check_activity(vmcs: Vmcs) -> GuestChecks:
    """With the interruptibility state and the part of RFLAGS.IF that an injected event asks for."""
    activity = vmcs.read(Field.GUEST_ACTIVITY)
    blocking = vmcs.read(Field.GUEST_INTERRUPTIBILITY)
    shadow = blocking & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS)
    event = _injected(vmcs)
    if event and event[0] == EventType.EXTERNAL:
        yield (
            bool(vmcs.read(Field.GUEST_RFLAGS) & RFLAGS_IF),
            "§26.3.1.4: an interrupt is injected, but RFLAGS.IF is 0",
            GENERAL,
        )
    yield activity <= WAIT_FOR_SIPI, "§26.3.1.5: activity state", GENERAL
    privileged = vmcs.read(Field.GUEST_SS_RIGHTS) >> 5 & 3
    yield activity != HALTED or not privileged, "§26.3.1.5: HLT state with SS.DPL above 0", GENERAL
    yield (
        activity == ACTIVE or not shadow,
        "§26.3.1.5: blocking by STI or MOV SS, not active",
        GENERAL,
    )
    if event:
        yield _injectable(activity, *event), "§26.3.1.5: event for this activity state", GENERAL
    yield from _interruptibility(vmcs, blocking, event)


def _interruptibility(vmcs: Vmcs, blocking: int, event: tuple[int, int] | None) -> GuestChecks:
    sti, mov_ss = blocking & BLOCKED_BY_STI, blocking & BLOCKED_BY_MOV_SS
    yield not blocking & ~0xF, "§26.3.1.5: reserved bits of the interruptibility state", GENERAL
    yield not (sti and mov_ss), "§26.3.1.5: blocking by STI and by MOV SS", GENERAL
    enabled = vmcs.read(Field.GUEST_RFLAGS) & RFLAGS_IF
    yield bool(enabled) or not sti, "§26.3.1.5: blocking by STI with RFLAGS.IF 0", GENERAL
    kind = event[0] if event else None
    yield (
        kind != EventType.EXTERNAL or not (sti or mov_ss),
        "§26.3.1.5: an interrupt is injected into a guest that blocks it",
        GENERAL,
    )
    yield kind != EventType.NMI or not mov_ss, "§26.3.1.5: an NMI blocked by MOV SS", GENERAL
    yield not blocking & BLOCKED_BY_SMI, "§26.3.1.5: blocking by SMI outside SMM", GENERAL
    yield kind != EventType.NMI or not sti, "§26.3.1.5: an NMI blocked by STI", NMI_BLOCKED
    virtual = vmcs.read(Field.PIN_CONTROLS) & Pin.VIRTUAL_NMI
    yield (
        not (kind == EventType.NMI and virtual and blocking & BLOCKED_BY_NMI),
        "§26.3.1.5: an NMI blocked by another",
        GENERAL,
    )


def _pending_debug(vmcs: Vmcs) -> GuestChecks:
    pending = vmcs.read(Field.GUEST_PENDING_DEBUG)
    yield (
        not pending & PENDING_RESERVED,
        "§26.3.1.5: reserved bits of pending debug exceptions",
        GENERAL,
    )
    blocking = vmcs.read(Field.GUEST_INTERRUPTIBILITY) & (BLOCKED_BY_STI | BLOCKED_BY_MOV_SS)
    if blocking or vmcs.read(Field.GUEST_ACTIVITY) == HALTED:
        stepping = vmcs.read(Field.GUEST_RFLAGS) & RFLAGS_TF
        branches = vmcs.read(Field.GUEST_DEBUGCTL) & DEBUGCTL_BTF
        yield (
            bool(pending & PENDING_BS) == bool(stepping and not branches),
            "§26.3.1.5: pending single step is not as RFLAGS.TF",
            GENERAL,
        )


def _link_pointer(vmcs: Vmcs, memory: PhysicalMemory, current: int) -> GuestChecks:
    link = vmcs.read(Field.VMCS_LINK_POINTER)
    if link == NO_VMCS:
        return
    yield not link & 0xFFF and fits(link), "§26.3.1.5: VMCS link pointer", LINK_POINTER
    found = region(memory, link)
    yield (
        found is not None and _U32.unpack_from(found)[0] == REVISION,
        "§26.3.1.5: revision of the VMCS linked to",
        LINK_POINTER,
    )
    yield link != current, "§26.3.1.5: VMCS link pointer to the current VMCS", LINK_POINTER


# --- §26.3.1.6 page-directory-pointer-table entries ---


def _pdptes(vmcs: Vmcs, memory: PhysicalMemory) -> GuestChecks:
    pages = vmcs.read(Field.GUEST_CR0) & CR0_PG and vmcs.read(Field.GUEST_CR4) & CR4_PAE
    if not pages or _long(vmcs):
        return
    if secondary_of(vmcs) & Secondary.EPT:
        entries = [vmcs.read(Field.GUEST_PDPTE0 + 2 * number) for number in range(4)]
    else:
        table = region(memory, vmcs.read(Field.GUEST_CR3) & 0xFFFF_F000)
        at = vmcs.read(Field.GUEST_CR3) & 0xFE0
        entries = [
            int.from_bytes(table[at + 8 * n : at + 8 * n + 8], "little") if table else NO_VMCS
            for n in range(4)
        ]
    for number, entry in enumerate(entries):
        held = not entry & 1 or not entry & PDPTE_RESERVED
        yield held, f"§26.3.1.6: reserved bits of PDPTE {number}", PDPTE
