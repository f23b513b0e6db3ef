"""VM exit: the guest's state saved, the exit recorded, the host's state loaded (SDM vol. 3C ch. 27)."""

from __future__ import annotations

from operator import attrgetter

from hostel.soft.silicon import Event, Pin, Reason, VmExit
from hostel.soft.state import (
    ACTIVE,
    BLOCKED_BY_NMI,
    EFER_LMA,
    EFER_LME,
    MSR_DEBUGCTL,
    MSR_PAT,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RFLAGS_ONE,
    RIGHTS_CODE32,
    RIGHTS_CODE64,
    RIGHTS_DATA32,
    RIGHTS_TSS64,
    RIGHTS_UNUSABLE,
    RSP,
    CpuState,
    Segment,
    Table,
)
from hostel.soft.vmx.capabilities import EntryControl, ExitControl
from hostel.soft.vmx.enter import (
    CR0_KEPT,
    DEBUGCTL,
    DR7,
    EFER,
    EVENT_VALID,
    PAT,
    TIMER,
    decode,
)
from hostel.soft.vmx.fields import GUEST, HOST, SEGMENTS, Field
from hostel.soft.vmx.vmcs import Decoded, Vmcs

ENTRY_FAILURE = 1 << 31
"""Of the exit-reason field: this exit is a failed VM entry (§26.7)."""
LINK, SMBASE = GUEST.index(Field.VMCS_LINK_POINTER), GUEST.index(Field.GUEST_SMBASE)
PDPTES = slice(GUEST.index(Field.GUEST_PDPTE0), GUEST.index(Field.GUEST_PDPTE3) + 1)

HOST_SELECTORS = slice(0, HOST.index(Field.HOST_TR_SELECTOR) + 1)
HOST_PAT, HOST_CR0, HOST_FS_BASE, HOST_SYSENTER_ESP, HOST_RSP = (
    HOST.index(field)
    for field in (
        Field.HOST_PAT,
        Field.HOST_CR0,
        Field.HOST_FS_BASE,
        Field.HOST_SYSENTER_ESP,
        Field.HOST_RSP,
    )
)
"""In the host-state area; after them EFER and SYSENTER_CS; CR3 and CR4; the bases of GS, TR, GDTR, IDTR …"""


def record(vmcs: Vmcs, out: VmExit) -> None:
    """§27.2: the exit-information fields, in the order of ``fields.EXIT``; the injected event is spent."""
    info, error = _event_fields(out.interruption)
    vectoring, vectoring_error = _event_fields(out.vectoring)
    vmcs.save_exit_area(
        (
            out.physical,
            vmcs.read(Field.INSTRUCTION_ERROR),
            out.reason,
            info,
            error,
            vectoring,
            vectoring_error,
            out.length,
            out.instruction_info,
            out.qualification,
            *(0, 0, 0, 0),  # of an I/O instruction in SMM
            out.linear,
        )
    )
    event = vmcs.read(Field.ENTRY_INTERRUPTION_INFO)
    if event & EVENT_VALID:
        vmcs.write(Field.ENTRY_INTERRUPTION_INFO, event & ~EVENT_VALID)


def _event_fields(event: Event | None) -> tuple[int, int]:
    return (0, 0) if event is None else (event.info, event.error or 0)


def record_failure(vmcs: Vmcs, out: VmExit) -> None:
    """§26.7: of a failed entry only reason and qualification are told; an event stays to be injected."""
    vmcs.write(Field.EXIT_REASON, out.reason | ENTRY_FAILURE)
    vmcs.write(Field.EXIT_QUALIFICATION, out.qualification)


_SELECTORS, _LIMITS, _RIGHTS, _BASES = (
    attrgetter(*(f"{name}.{part}" for name in names))
    for part, names in (
        ("selector", SEGMENTS),
        ("limit", (*SEGMENTS, "gdtr", "idtr")),
        ("rights", SEGMENTS),
        ("base", (*SEGMENTS, "gdtr", "idtr")),
    )
)
"""Each gets all of them from a ``CpuState`` in one go, in the order of the fields."""


def save_guest(state: CpuState, vmcs: Vmcs, elapsed: int) -> None:
    """§27.3: the guest-state area; what the exit controls leave out keeps its value of the entry."""
    old, decoded = vmcs.guest, decode(vmcs)
    leave, msrs = decoded.leave, state.msrs
    debug = leave & ExitControl.SAVE_DEBUG
    vmcs.save_guest_area(
        (
            *_SELECTORS(state),
            old[LINK],
            msrs.get(MSR_DEBUGCTL, 0) if debug else old[DEBUGCTL],
            msrs.get(MSR_PAT, 0) if leave & ExitControl.SAVE_PAT else old[PAT],
            state.efer if leave & ExitControl.SAVE_EFER else old[EFER],
            *old[PDPTES],
            *_LIMITS(state),
            *_RIGHTS(state),
            state.interruptibility,
            state.activity,
            old[SMBASE],
            msrs.get(MSR_SYSENTER_CS, 0),
            _timer(decoded, old[TIMER], elapsed),
            state.cr0,
            state.cr3,
            state.cr4,
            *_BASES(state),
            state.dr7 if debug else old[DR7],
            state.gpr[RSP],
            state.rip,
            state.rflags,
            0,  # pending debug exceptions: a core delivers a #DB before it leaves the guest
            msrs.get(MSR_SYSENTER_ESP, 0),
            msrs.get(MSR_SYSENTER_EIP, 0),
        )
    )
    _save_mode(state, vmcs, decoded)


def _timer(decoded: Decoded, loaded: int, elapsed: int) -> int:
    """§27.3.4, §25.5.1: what is left of the preemption timer; 0 once it has expired."""
    counts = decoded.controls.pin & Pin.PREEMPTION_TIMER
    saved = decoded.leave & ExitControl.SAVE_TIMER
    return max(0, loaded - elapsed) if counts and saved else loaded


def _save_mode(state: CpuState, vmcs: Vmcs, decoded: Decoded) -> None:
    """§27.2: LMA is stored in the entry controls, so that the guest is entered in the mode it left."""
    mode = EntryControl.GUEST_64 if state.efer & EFER_LMA else 0
    if decoded.entry & EntryControl.GUEST_64 != mode:
        vmcs.write(Field.ENTRY_CONTROLS, decoded.entry ^ EntryControl.GUEST_64)


def load_host(state: CpuState, vmcs: Vmcs, reason: Reason) -> None:
    """§27.5: the host-state area, and what an exit gives fixed values."""
    area, leave = vmcs.host_area(), decode(vmcs).leave
    _load_host_control_registers(state, area, leave)
    _load_host_segments(state, area, leave & ExitControl.HOST_64)
    state.gpr[RSP], state.rip = area[HOST_RSP : HOST_RSP + 2]
    state.rflags = RFLAGS_ONE
    state.activity = ACTIVE
    state.interruptibility = BLOCKED_BY_NMI if reason == Reason.EXCEPTION_NMI else 0


def _load_host_control_registers(state: CpuState, area: tuple[int, ...], leave: int) -> None:
    """§27.5.1."""
    state.cr0 = area[HOST_CR0] & ~CR0_KEPT | state.cr0 & CR0_KEPT
    state.cr3, state.cr4 = area[HOST_CR0 + 1 : HOST_CR0 + 3]
    state.dr7 = 0x400
    pat, efer, sysenter_cs = area[HOST_PAT : HOST_PAT + 3]
    esp, eip = area[HOST_SYSENTER_ESP : HOST_SYSENTER_ESP + 2]
    msrs = state.msrs
    msrs[MSR_DEBUGCTL] = 0
    msrs[MSR_SYSENTER_CS], msrs[MSR_SYSENTER_ESP], msrs[MSR_SYSENTER_EIP] = sysenter_cs, esp, eip
    if leave & ExitControl.LOAD_PAT:
        msrs[MSR_PAT] = pat
    if leave & ExitControl.LOAD_EFER:
        state.efer = efer
    else:
        both = EFER_LMA | EFER_LME
        state.efer = state.efer & ~both | (both if leave & ExitControl.HOST_64 else 0)


def _load_host_segments(state: CpuState, area: tuple[int, ...], long: int) -> None:
    """§27.5.2, §27.5.3: selectors and bases are the VMCS's; all else has fixed values."""
    es, cs, ss, ds, fs, gs, tr = area[HOST_SELECTORS]
    fs_base, gs_base, tr_base, gdtr, idtr = area[HOST_FS_BASE : HOST_FS_BASE + 5]
    state.cs = Segment(cs, 0, 0xFFFF_FFFF, RIGHTS_CODE64 if long else RIGHTS_CODE32)
    state.es, state.ss, state.ds = _flat(es, 0), _flat(ss, 0), _flat(ds, 0)
    state.fs, state.gs = _flat(fs, fs_base), _flat(gs, gs_base)
    state.tr = Segment(tr, tr_base, 0x67, RIGHTS_TSS64)
    state.ldtr = Segment(0, 0, 0, RIGHTS_UNUSABLE)
    state.gdtr, state.idtr = Table(gdtr, 0xFFFF), Table(idtr, 0xFFFF)


def _flat(selector: int, base: int) -> Segment:
    rights = RIGHTS_DATA32 if selector else RIGHTS_DATA32 | RIGHTS_UNUSABLE
    return Segment(selector, base, 0xFFFF_FFFF, rights)
