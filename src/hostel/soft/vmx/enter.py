"""VM entry, once all is checked: the guest's state, the controls, the event (SDM vol. 3C §26.3.2, §26.5).

What has no field in the VMCS stays as it is in the processor, for the hypervisor to load before: general
registers, CR2, CR8, XCR0, DR0–3, DR6, the FPU, and MSRs such as LSTAR and KERNEL_GS_BASE.
"""

from __future__ import annotations

from hostel.soft.silicon import Controls, Event, EventType, Primary
from hostel.soft.state import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    MSR_DEBUGCTL,
    MSR_PAT,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RSP,
    CpuState,
    Segment,
    Table,
)
from hostel.soft.vmx.capabilities import CR3_TARGETS, EntryControl
from hostel.soft.vmx.fields import GUEST, Field
from hostel.soft.vmx.vmcs import Decoded, Vmcs

CR0_KEPT = CR0_ET | CR0_NW | CR0_CD | 0x1FFD_FFC0 & ~(1 << 16 | 1 << 18)
"""What VM entry does not load: ET, NW, CD, and the reserved bits (§26.3.2.1)."""
SELECTORS, LIMITS, RIGHTS, BASES = (
    slice(GUEST.index(first), GUEST.index(first) + 8)
    for first in (
        Field.GUEST_ES_SELECTOR,
        Field.GUEST_ES_LIMIT,
        Field.GUEST_ES_RIGHTS,
        Field.GUEST_ES_BASE,
    )
)
"""Where ES … TR are in the guest-state area."""
DEBUGCTL, PAT, EFER, INTERRUPTIBILITY, SYSENTER_CS, TIMER, RIP = (
    GUEST.index(field)
    for field in (
        Field.GUEST_DEBUGCTL,
        Field.GUEST_PAT,
        Field.GUEST_EFER,
        Field.GUEST_INTERRUPTIBILITY,
        Field.GUEST_SYSENTER_CS,
        Field.PREEMPTION_TIMER,
        Field.GUEST_RIP,
    )
)
GDTR_LIMIT, GDTR_BASE, CR0, DR7, RSP_AT, SYSENTER_ESP = (
    GUEST.index(field)
    for field in (
        Field.GUEST_GDTR_LIMIT,
        Field.GUEST_GDTR_BASE,
        Field.GUEST_CR0,
        Field.GUEST_DR7,
        Field.GUEST_RSP,
        Field.GUEST_SYSENTER_ESP,
    )
)
"""Others; the next ones in ``fields.GUEST`` follow: IDTR, CR3 and CR4, RIP and RFLAGS …"""
EVENT_VALID, EVENT_ERROR = 1 << 31, 1 << 11


def load_guest(state: CpuState, vmcs: Vmcs) -> None:
    """§26.3.2: what the guest-state area held (``vmcs.guest``), into the processor."""
    area, decoded = vmcs.guest, decode(vmcs)
    decoded.controls.timer = area[TIMER]
    _load_control_registers(state, area, decoded.entry)
    _load_segments(state, area)
    state.gpr[RSP], state.rip, state.rflags = area[RSP_AT : RSP_AT + 3]
    state.interruptibility, state.activity = area[INTERRUPTIBILITY : INTERRUPTIBILITY + 2]


def _load_control_registers(state: CpuState, area: tuple[int, ...], entry: int) -> None:
    cr0 = area[CR0]
    state.cr0 = cr0 & ~CR0_KEPT | state.cr0 & CR0_KEPT
    state.cr3, state.cr4 = area[CR0 + 1 : CR0 + 3]
    msrs = state.msrs
    msrs[MSR_SYSENTER_CS] = area[SYSENTER_CS]
    msrs[MSR_SYSENTER_ESP], msrs[MSR_SYSENTER_EIP] = area[SYSENTER_ESP : SYSENTER_ESP + 2]
    if entry & EntryControl.LOAD_DEBUG:
        state.dr7 = area[DR7] & 0xFFFF_2FFF | 0x400
        msrs[MSR_DEBUGCTL] = area[DEBUGCTL]
    if entry & EntryControl.LOAD_PAT:
        msrs[MSR_PAT] = area[PAT]
    if entry & EntryControl.LOAD_EFER:
        state.efer = area[EFER]
    else:
        state.efer = efer_of_mode(state.efer, cr0, entry & EntryControl.GUEST_64)


def efer_of_mode(efer: int, cr0: int, long: int) -> int:
    """LMA is the control's; so is LME, if the guest pages (§26.3.2.1)."""
    touched = EFER_LMA | (EFER_LME if cr0 & CR0_PG else 0)
    return efer & ~touched | (touched if long else 0)


def _load_segments(state: CpuState, area: tuple[int, ...]) -> None:
    (state.es, state.cs, state.ss, state.ds, state.fs, state.gs, state.ldtr, state.tr) = map(
        Segment, area[SELECTORS], area[BASES], area[LIMITS], area[RIGHTS]
    )
    state.gdtr = Table(area[GDTR_BASE], area[GDTR_LIMIT])
    state.idtr = Table(area[GDTR_BASE + 1], area[GDTR_LIMIT + 1])


def event_to_inject(vmcs: Vmcs) -> Event | None:
    """§26.5.1: the event of the VM-entry interruption-information field."""
    info = vmcs.read(Field.ENTRY_INTERRUPTION_INFO)
    if not info & EVENT_VALID:
        return None
    return Event(
        vector=info & 0xFF,
        type=EventType(info >> 8 & 7),
        error=vmcs.read(Field.ENTRY_EXCEPTION_ERROR) if info & EVENT_ERROR else None,
        length=vmcs.read(Field.ENTRY_INSTRUCTION_LENGTH),
    )


def decode(vmcs: Vmcs) -> Decoded:
    """The control fields as entries and exits use them; again only after a VMWRITE to one."""
    if vmcs.decoded is None:
        read = vmcs.read
        offsetting = read(Field.PRIMARY_CONTROLS) & Primary.TSC_OFFSETTING
        vmcs.decoded = Decoded(
            controls=_execution_controls(vmcs),
            entry=read(Field.ENTRY_CONTROLS),
            leave=read(Field.EXIT_CONTROLS),
            tsc_offset=read(Field.TSC_OFFSET) if offsetting else 0,
            entry_load=(read(Field.ENTRY_MSR_LOAD_ADDRESS), read(Field.ENTRY_MSR_LOAD_COUNT)),
            exit_store=(read(Field.EXIT_MSR_STORE_ADDRESS), read(Field.EXIT_MSR_STORE_COUNT)),
            exit_load=(read(Field.EXIT_MSR_LOAD_ADDRESS), read(Field.EXIT_MSR_LOAD_COUNT)),
        )
    return vmcs.decoded


def _execution_controls(vmcs: Vmcs) -> Controls:
    read = vmcs.read
    primary = read(Field.PRIMARY_CONTROLS)
    targets = tuple(read(Field.CR3_TARGET0 + 2 * number) for number in range(CR3_TARGETS))
    return Controls(
        pin=read(Field.PIN_CONTROLS),
        primary=primary | Primary.TSC_OFFSETTING,
        secondary=secondary_of(vmcs),
        exception_bitmap=read(Field.EXCEPTION_BITMAP),
        pf_mask=read(Field.PAGE_FAULT_MASK),
        pf_match=read(Field.PAGE_FAULT_MATCH),
        io_bitmap_a=read(Field.IO_BITMAP_A),
        io_bitmap_b=read(Field.IO_BITMAP_B),
        msr_bitmap=read(Field.MSR_BITMAP),
        cr0_mask=read(Field.CR0_MASK),
        cr0_shadow=read(Field.CR0_SHADOW),
        cr4_mask=read(Field.CR4_MASK),
        cr4_shadow=read(Field.CR4_SHADOW),
        cr3_targets=targets[: read(Field.CR3_TARGET_COUNT)],
        ept_pointer=read(Field.EPT_POINTER),
        vpid=read(Field.VPID),
    )


def secondary_of(vmcs: Vmcs) -> int:
    """All zero unless the primary controls activate them (§24.6.2)."""
    active = vmcs.read(Field.PRIMARY_CONTROLS) & Primary.SECONDARY
    return vmcs.read(Field.SECONDARY_CONTROLS) if active else 0
