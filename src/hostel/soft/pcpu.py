"""A physical processor: a core, its VMX operation, and the VMX instructions (SDM vol. 3C ch. 30).

::

    VMX off ──vmxon──> root mode ──vmlaunch, vmresume──> non-root mode
       <────vmxoff────  (Python)  <───── VM exit ──────  (the core runs the guest)

A method is an instruction. It makes the manual's checks in the manual's order, sets RFLAGS as VMsucceed
or VMfail do, and takes ``ROOT_TIME``; ``vmlaunch`` and ``vmresume`` come back when the VM exit has loaded
the host's state. ``state`` is what is in the registers now: in root mode the host's, but for what VMX does
not switch (general registers but RSP, CR2, CR8, XCR0, DR0–3, DR6, the FPU, MSRs without a field): these
are still the guest's after an exit, and whoever enters another guest loads its own first.

Time is counted in guest instructions: the TSC moves by one for each, and by fixed steps in root mode, so
that the same run gives the same timeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NoReturn, Protocol

from hostel.soft.paging.tlb import Invept, Invvpid
from hostel.soft.silicon import Controls, Core, Event, EventType, Reason, Secondary, VmExit
from hostel.soft.state import BLOCKED_BY_MOV_SS, EFER_LMA, SHUTDOWN, CpuState, canonical
from hostel.soft.vmx import check_guest, enter, leave, msrs
from hostel.soft.vmx.capabilities import ExitControl
from hostel.soft.vmx.check_controls import check_controls, check_event, valid_eptp
from hostel.soft.vmx.check_guest import GuestChecks
from hostel.soft.vmx.check_host import check_address_space, check_host
from hostel.soft.vmx.events import Mode, TraceEvent
from hostel.soft.vmx.fields import Field
from hostel.soft.vmx.operation import Package, VmxOperation
from hostel.soft.vmx.results import AbortCause, VmError, VmxAbort
from hostel.soft.vmx.vmcs import (
    CLEAR,
    CONTROLS_CHANGED,
    HOST_CHANGED,
    LAUNCHED,
    SEGMENTS_CHANGED,
    UNCHECKED,
    Decoded,
    Vmcs,
)

TRANSITION_TIME = 500
"""What a VM entry takes, and a VM exit."""


class TaggedTlb(Protocol):
    """Of the ``Mmu`` behind the core: translations tagged by VPID and EPT root."""

    def invvpid(self, type: Invvpid, vpid: int, address: int = 0) -> None: ...
    def invept(self, type: Invept, pointer: int = 0) -> None: ...
    def flush(self, controls: Controls, *, keep_global: bool) -> None: ...


class PhysicalCpu(VmxOperation):
    """Not thread-safe, but for ``interrupt``."""

    def __init__(self, id: int, package: Package, core: Core, tlb: TaggedTlb) -> None:
        super().__init__(id, package)
        self.core = core
        self.tlb = tlb
        self.pending: deque[int] = deque()
        """Vectors of the host's interrupts, waiting."""
        self.entry_failure = ""
        """Which check of the last entry that failed (exit 33) did not hold."""
        self._context: tuple[int, ...] = ()
        """Whose translations the core holds."""

    # --- Forgetting translations ---

    def invept(self, kind: int, eptp: int = 0) -> None:
        """1: mappings of one EPT; 2: of all."""
        self._admit("INVEPT")
        if kind not in (1, 2) or (kind == 1 and not valid_eptp(eptp)):
            self._fail("INVEPT", VmError.INVALID_OPERAND, kind, eptp)
        self.tlb.invept(Invept(kind), eptp)
        self.core.flush()
        self._succeed("INVEPT", kind, eptp)

    def invvpid(self, kind: int, vpid: int = 0, address: int = 0) -> None:
        """0: an address of one VPID; 1: one VPID; 2: all but VPID 0; 3: one, but its global pages."""
        self._admit("INVVPID")
        named = kind == 2 or vpid > 0
        good = kind in range(4) and not vpid >> 16 and named and (kind or canonical(address))
        if not good:
            self._fail("INVVPID", VmError.INVALID_OPERAND, kind, vpid, address)
        self.tlb.invvpid(Invvpid(kind), vpid, address)
        self.core.flush()
        self._succeed("INVVPID", kind, vpid, address)

    # --- VM entry ---

    def vmlaunch(self) -> VmExit:
        return self._enter("VMLAUNCH", CLEAR, VmError.VMLAUNCH_NOT_CLEAR)

    def vmresume(self) -> VmExit:
        return self._enter("VMRESUME", LAUNCHED, VmError.VMRESUME_NOT_LAUNCHED)

    def _enter(self, name: str, wanted: int, otherwise: VmError) -> VmExit:
        vmcs = self._current(name)
        if self.state.interruptibility & BLOCKED_BY_MOV_SS:
            self._fail(name, VmError.ENTRY_MOV_SS)
        if vmcs.launch_state != wanted:
            self._fail(name, otherwise)
        if wanted == LAUNCHED and vmcs.launched_by != self._operation:
            self._fail(name, VmError.VMRESUME_AFTER_VMXOFF)
        self._check_entry(name, vmcs)
        self._retire(name, (vmcs.hpa,), "VM entry")
        self.tsc += TRANSITION_TIME
        broken = self._load_guest(vmcs)
        if broken is not None:
            return self._leave_failed(vmcs, broken)
        vmcs.set_launched(self._operation)
        return self._run(vmcs)

    def _check_entry(self, name: str, vmcs: Vmcs) -> None:
        """§26.2: the controls, then the host's state."""
        changed, long = vmcs.changed, bool(self.state.efer & EFER_LMA)
        if changed & CONTROLS_CHANGED:
            self._hold(name, check_controls(vmcs), VmError.ENTRY_CONTROLS)
        if vmcs.read(Field.ENTRY_INTERRUPTION_INFO) & enter.EVENT_VALID:
            self._hold(name, check_event(vmcs), VmError.ENTRY_CONTROLS)
        if changed & HOST_CHANGED:
            self._hold(name, check_host(vmcs), VmError.ENTRY_HOST_STATE)
        if changed & (HOST_CHANGED | CONTROLS_CHANGED) or not long:
            self._hold(name, check_address_space(vmcs, long=long), VmError.ENTRY_HOST_STATE)

    def _hold(self, name: str, checks: Iterator[tuple[bool, str]], error: VmError) -> None:
        for held, what in checks:
            if not held:
                self._fail(name, error, why=what)

    def _load_guest(self, vmcs: Vmcs) -> VmExit | None:
        """§26.3, §26.4; the exit, if this fails."""
        decoded = enter.decode(vmcs)
        vmcs.guest = vmcs.guest_area()
        for held, what, qualification in self._guest_checks(vmcs, decoded):
            if not held:
                self.entry_failure = what
                return VmExit(Reason.ENTRY_GUEST_STATE, qualification=qualification)
        vmcs.changed = 0
        enter.load_guest(self.state, vmcs)
        entry = msrs.load_area(self.state, self.memory, *decoded.entry_load)
        return VmExit(Reason.ENTRY_MSR_LOADING, qualification=entry) if entry else None

    def _guest_checks(self, vmcs: Vmcs, decoded: Decoded) -> GuestChecks:
        """§26.3.1, but for what an earlier entry found right."""
        if vmcs.changed & ~UNCHECKED:
            ruled_by = check_guest.ruled_by(vmcs, decoded)
            segments = bool(vmcs.changed & SEGMENTS_CHANGED) or ruled_by != vmcs.checked_as
            yield from check_guest.check_guest(vmcs, self.memory, vmcs.hpa, segments=segments)
            vmcs.checked_as = ruled_by
            return
        if vmcs.guest[enter.RIP] >> 32:
            for held, what in check_guest.check_rip(vmcs):
                yield held, what, check_guest.GENERAL
        if vmcs.read(Field.ENTRY_INTERRUPTION_INFO) & enter.EVENT_VALID:
            yield from check_guest.check_activity(vmcs)

    # --- Non-root mode, and VM exit ---

    def _run(self, vmcs: Vmcs) -> VmExit:
        decoded = enter.decode(vmcs)
        controls = decoded.controls
        self._switch_context(controls)
        event = enter.event_to_inject(vmcs)
        self.statistics.entries += 1
        before = self.core.statistics.instructions
        # A core counts its own instructions only: all else of its guest's TSC is in what it adds.
        controls.tsc_offset = self.tsc + decoded.tsc_offset - before
        self.mode = Mode.NON_ROOT
        try:
            out = self.core.enter(self.state, controls, event)
        except BaseException:
            leave.load_host(self.state, vmcs, Reason.TRIPLE_FAULT)  # so that all can be put away
            raise
        finally:
            self.mode = Mode.ROOT
        elapsed = self.core.statistics.instructions - before
        self.tsc += elapsed
        self.statistics.guest_time += elapsed
        return self._leave(vmcs, out, elapsed)

    def _switch_context(self, controls: Controls) -> None:
        """§28.3.3.1: without VPIDs an entry forgets all of VPID 0; with one, nothing: its tag tells.

        A core has no tags: it forgets when the address space is not the one that it knows.
        """
        if not controls.secondary & Secondary.VPID:
            self.tlb.flush(controls, keep_global=False)
            self.core.flush()
        elif _context(controls, self.state) != self._context:
            self.core.flush()

    def _leave(self, vmcs: Vmcs, out: VmExit, elapsed: int) -> VmExit:
        """Chapter 27: record, save, load."""
        decoded = enter.decode(vmcs)
        self._note_context(decoded.controls)
        if decoded.leave & ExitControl.ACKNOWLEDGE_INTERRUPT:
            self._acknowledge(out)
        leave.record(vmcs, out)
        leave.save_guest(self.state, vmcs, elapsed)
        if entry := msrs.store_area(self.memory, *decoded.exit_store, self._msr):
            self._abort(
                vmcs, AbortCause.SAVING_MSRS, f"entry {entry} of the VM-exit MSR-store area"
            )
        self._load_host(vmcs, out)
        self._trace_exit(out, Mode.NON_ROOT)
        return out

    def _leave_failed(self, vmcs: Vmcs, out: VmExit) -> VmExit:
        """§26.7: no guest state is saved, for none was used; the host's is loaded as by any exit."""
        leave.record_failure(vmcs, out)
        self._load_host(vmcs, out)
        self._trace_exit(out, Mode.ROOT)
        return out

    def _note_context(self, controls: Controls) -> None:
        self._context = _context(controls, self.state)
        if not controls.secondary & Secondary.VPID:
            self.tlb.flush(controls, keep_global=False)

    def _acknowledge(self, out: VmExit) -> None:
        """§27.2.2: with "acknowledge interrupt on exit" the exit tells the vector."""
        if out.reason == Reason.EXTERNAL_INTERRUPT and self.pending:
            out.interruption = Event(self.pending.popleft(), EventType.EXTERNAL)

    def _load_host(self, vmcs: Vmcs, out: VmExit) -> None:
        """§27.5, §27.6."""
        decoded = enter.decode(vmcs)
        if self.state.efer & EFER_LMA and not decoded.leave & ExitControl.HOST_64:
            self._abort(vmcs, AbortCause.HOST_ADDRESS_SPACE, "a 64-bit guest left to a 32-bit host")
        leave.load_host(self.state, vmcs, out.reason)
        if entry := msrs.load_area(self.state, self.memory, *decoded.exit_load):
            self._abort(
                vmcs, AbortCause.LOADING_MSRS, f"entry {entry} of the VM-exit MSR-load area"
            )
        self.tsc += TRANSITION_TIME
        self.statistics.exits[out.reason] += 1

    def _abort(self, vmcs: Vmcs, cause: AbortCause, why: str) -> NoReturn:
        """§27.7."""
        vmcs.set_abort(cause)
        self.state.activity = SHUTDOWN
        raise VmxAbort(cause, why)

    # --- Interrupts of the host ---

    def interrupt(self, vector: int) -> None:
        """From any thread: the guest is left with "external interrupt" soon, or at the next entry."""
        self.pending.append(vector)
        self.core.interrupt()

    def _trace_exit(self, out: VmExit, mode: Mode) -> None:
        if self.trace is not None:
            operands = (out.reason, out.qualification)
            self.trace(TraceEvent(self.tsc, self.id, mode, "VM exit", operands, out.reason.name))


def _context(controls: Controls, state: CpuState) -> tuple[int, ...]:
    """What the translations that a core holds depend on."""
    tag = controls.vpid if controls.secondary & Secondary.VPID else 0
    root = controls.ept_pointer if controls.secondary & Secondary.EPT else 0
    return (tag, root, state.cr3, state.cr0, state.cr4, state.efer)
