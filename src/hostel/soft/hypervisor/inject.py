"""What interrupts a vCPU, looked at before each entry.

By priority: an event whose delivery a VM exit broke off, or an exception that a handler answered with; NMI;
an interrupt of the local APIC or the PIC. What cannot be taken yet opens a window: the exit comes as soon
as it can (SDM vol. 3C §26.6.5, §26.6.6). INIT and SIPI act on a vCPU that does not run (§25.2, SDM vol. 3A
§8.4.3).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from hostel.soft.exceptions import NMI
from hostel.soft.silicon import Event, EventType, Primary
from hostel.soft.state import (
    BLOCKED_BY_MOV_SS,
    BLOCKED_BY_NMI,
    BLOCKED_BY_STI,
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    RDX,
    RFLAGS_IF,
    RIGHTS_CODE16,
    CpuState,
    Segment,
)
from hostel.soft.vmx.fields import Field

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

_SHADOW = BLOCKED_BY_STI | BLOCKED_BY_MOV_SS
_WINDOWS = Primary.INTERRUPT_WINDOW | Primary.NMI_WINDOW


class Activity(Enum):
    RUNNING = "running"
    HALTED = "halted"
    WAITS_FOR_SIPI = "waits for its start-up message"


def idle(vcpu: SoftVcpu) -> bool:
    """Whether there is nothing to run, and nothing that wakes it."""
    lapic = vcpu.lapic
    if vcpu.activity is Activity.RUNNING or lapic.init:
        return False
    if vcpu.activity is Activity.WAITS_FOR_SIPI:
        return lapic.sipi is None
    return not lapic.nmi and not (vcpu.halted_open and lapic.pending is not None)


def wake(vcpu: SoftVcpu) -> bool:
    """Act on INIT, SIPI and what ends a HLT; False: it is idle. Its VMCS is loaded."""
    lapic = vcpu.lapic
    if lapic.init:
        lapic.init = False
        _reset(vcpu)
    if idle(vcpu):
        return False
    if vcpu.activity is Activity.WAITS_FOR_SIPI and lapic.sipi is not None:
        _start(vcpu, lapic.sipi)
    lapic.sipi = None
    vcpu.activity = Activity.RUNNING
    return True


def before_entry(vcpu: SoftVcpu) -> None:
    """Fill the VM-entry interruption-information field, and ask for the windows."""
    lapic = vcpu.lapic
    event, vcpu.event = vcpu.event, None
    quiet = event is None and not lapic.nmi and not vcpu.primary & _WINDOWS
    if quiet and lapic.pending is None:
        return
    windows = 0
    blocked = vcpu.read(Field.GUEST_INTERRUPTIBILITY)
    if lapic.nmi:
        if event is None and not blocked & (_SHADOW | BLOCKED_BY_NMI):
            lapic.nmi = False
            event = Event(NMI, EventType.NMI)
        else:
            windows |= Primary.NMI_WINDOW
    if lapic.pending is not None:
        if event is None and not blocked & _SHADOW and vcpu.read(Field.GUEST_RFLAGS) & RFLAGS_IF:
            vector = vcpu.machine.irqchip.take(vcpu.id)
            event = None if vector is None else Event(vector, EventType.EXTERNAL)
        if lapic.pending is not None:
            windows |= Primary.INTERRUPT_WINDOW
    if event is not None:
        _write_event(vcpu, event, blocked)
    if vcpu.primary & _WINDOWS != windows:
        vcpu.primary = vcpu.primary & ~_WINDOWS | windows
        vcpu.write(Field.PRIMARY_CONTROLS, vcpu.primary)


def _write_event(vcpu: SoftVcpu, event: Event, blocked: int) -> None:
    if event.error is not None and not vcpu.read(Field.GUEST_CR0) & CR0_PE:
        event = Event(event.vector, event.type)  # real mode has no error codes (§26.2.1.3)
    vcpu.write(Field.ENTRY_INTERRUPTION_INFO, event.info)
    if event.error is not None:
        vcpu.write(Field.ENTRY_EXCEPTION_ERROR, event.error)
    vcpu.write(Field.ENTRY_INSTRUCTION_LENGTH, event.length)
    if (
        blocked & _SHADOW
    ):  # it was delivered from under the shadow before; entry would refuse it (§26.3.1.5)
        vcpu.write(Field.GUEST_INTERRUPTIBILITY, blocked & ~_SHADOW)


def _reset(vcpu: SoftVcpu) -> None:
    """INIT (SDM vol. 3A table 9-1): the boot processor starts at the reset vector, the others wait."""
    state = CpuState(cr0=CR0_CD | CR0_NW | CR0_ET, rip=0xFFF0)
    state.cs = Segment(0xF000, 0xFFFF_0000, 0xFFFF, RIGHTS_CODE16)
    state.gpr[RDX] = 0x600
    sipi = vcpu.lapic.sipi  # it may have come already, after the INIT
    vcpu.lapic.reset()
    vcpu.lapic.sipi = sipi
    vcpu.event = None
    vcpu.import_state(state)
    vcpu.activity = Activity.WAITS_FOR_SIPI if vcpu.id else Activity.RUNNING


def _start(vcpu: SoftVcpu, vector: int) -> None:
    """A start-up message: real mode at the page that it names."""
    state = vcpu.export_state()
    state.cs = Segment(vector << 8, vector << 12, 0xFFFF, RIGHTS_CODE16)
    state.rip = 0
    vcpu.import_state(state)
