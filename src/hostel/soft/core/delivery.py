"""Exceptions and interrupts of a running guest: to the hypervisor if it asked, else to the guest's IDT.

SDM vol. 3C §25.2 (what exits), vol. 3A §6.15 (an exception while one is being delivered: #DF, shutdown).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.soft.exceptions import DB, DF, GP, PF, TripleFault, combine
from hostel.soft.silicon import EptFault, Event, EventType, Reason, VmExit
from hostel.soft.state import ACTIVE, BLOCKED_BY_MOV_SS, BLOCKED_BY_NMI, BLOCKED_BY_STI

from . import tasks
from .breakpoints import DETECT
from .events import SOFTWARE, Fault, TaskGate, deliver

if TYPE_CHECKING:
    from .translate import TranslatingCore

SHADOWED = BLOCKED_BY_STI | BLOCKED_BY_MOV_SS
_TRAPS = EventType.SOFTWARE_EXCEPTION, EventType.PRIVILEGED_SOFTWARE_EXCEPTION


class Delivery:
    """Works on the core's ``state``, which must be in step with the engine; returns an exit, or None when the
    guest goes on in its handler."""

    def __init__(self, core: TranslatingCore) -> None:
        self._core = core

    def fault(self, fault: Fault) -> VmExit | None:
        """An exception of the instruction at RIP."""
        return self._intercepted(fault, None) or self._through(
            self._armed(fault), self._core.state.rip
        )

    def software(self, event: Event) -> VmExit | None:
        """INT n, INT1, INT3, INTO at RIP. The last three are subject to the bitmap; INT n is not."""
        if event.type in _TRAPS and self._core.controls.exception_bitmap >> event.vector & 1:
            exit = _exception_exit(Fault(event.vector), event, None)
            exit.length = event.length
            return exit
        return self._through(event, self._core.state.rip + event.length)

    def inject(self, event: Event) -> VmExit | None:
        """At VM entry: nothing intercepts it (§26.5.1.2)."""
        self._core.state.activity = ACTIVE
        return self._through(event, self._core.state.rip + event.length)

    def _armed(self, fault: Fault) -> Event:
        """CR2 and DR6 change when the guest gets its exception, not when the hypervisor does (§27.1)."""
        if fault.vector == PF:
            self._core.state.cr2 = fault.cr2
        elif fault.vector == DB:
            self._core.state.dr6 |= fault.dr6
            self._core.state.dr7 &= ~DETECT
        return fault.event

    def _intercepted(self, fault: Fault, vectoring: Event | None) -> VmExit | None:
        """By the exception bitmap; for #PF with mask and match."""
        controls = self._core.controls
        wanted = bool(controls.exception_bitmap >> fault.vector & 1)
        if fault.vector == PF:
            wanted = wanted is ((fault.error or 0) & controls.pf_mask == controls.pf_match)
        return _exception_exit(fault, fault.event, vectoring) if wanted else None

    def _deliver(self, event: Event, return_rip: int) -> None:
        state, memory = self._core.state, self._core.memory
        try:
            deliver(state, memory, event, return_rip)
        except TaskGate as gate:
            external = int(event.type not in SOFTWARE)
            raise TaskGate(
                tasks.to_tss(state, memory, gate.selector, GP, external=external)
            ) from None

    def _through(self, event: Event, return_rip: int) -> VmExit | None:
        """Through the IDT, with all that can go wrong on the way."""
        core, state = self._core, self._core.state
        while True:
            try:
                self._deliver(event, return_rip)
                break
            except EptFault as refused:
                return ept_exit(refused, event)
            except TaskGate as gate:
                return VmExit(
                    Reason.TASK_SWITCH,
                    gate.selector | tasks.BY_IDT << 30,
                    event.length,
                    vectoring=event,
                )
            except Fault as second:
                # The bitmap first: what exits is the second exception, not yet a #DF made of both.
                if exit := self._intercepted(second, event):
                    return exit
                try:
                    fault = _combined(event, second)
                except TripleFault:
                    return VmExit(Reason.TRIPLE_FAULT)
                if exit := self._intercepted(fault, event):
                    return exit
                if second.vector == PF:
                    state.cr2 = second.cr2  # also where a #DF is made of it
                event, return_rip = self._armed(fault), state.rip
        core.statistics.events_delivered += 1
        core.spend()
        state.interruptibility &= ~SHADOWED
        if event.type is EventType.NMI:
            state.interruptibility |= BLOCKED_BY_NMI
        return None


def _combined(first: Event, second: Fault) -> Fault:
    event = second.event
    return second if combine(first, event) is event else Fault(DF, 0)


def _exception_exit(fault: Fault, event: Event, vectoring: Event | None) -> VmExit:
    qualification = 0
    if event.type is EventType.HARDWARE_EXCEPTION:
        qualification = {PF: fault.cr2, DB: fault.dr6}.get(event.vector, 0)
    return VmExit(Reason.EXCEPTION_NMI, qualification, interruption=event, vectoring=vectoring)


def ept_exit(fault: EptFault, vectoring: Event | None = None) -> VmExit:
    return VmExit(
        Reason(fault.reason),
        fault.qualification,
        linear=fault.linear,
        physical=fault.physical,
        vectoring=vectoring,
    )
