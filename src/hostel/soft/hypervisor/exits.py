"""One handler for each exit reason (SDM vol. 3D appendix C); for another: a function, a line in the table.

A handler acts on the vCPU and returns None to enter the guest again, or an ``Exit`` for the monitor. An
exit that is not in the table is a mistake of ours, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hostel.hypervisor import Exit, HaltExit, InternalError, ShutdownExit
from hostel.soft.exceptions import GP, PF, UD, fault
from hostel.soft.paging.virtualizer import Do, Verdict
from hostel.soft.silicon import EventType, PageFault, Reason, VmExit
from hostel.soft.state import RAX, RBX, RCX, RDX, canonical

from . import control_registers, emulation, io, msrs, task_switch

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

Handler = Callable[["SoftVcpu", VmExit], Exit | None]


def dispatch(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    handler = HANDLERS.get(exit.reason)
    return handler(vcpu, exit) if handler else _unknown(vcpu, exit)


def _unknown(vcpu: SoftVcpu, exit: VmExit) -> Exit:
    return InternalError(
        exit.reason,
        (exit.qualification, exit.length),
        f"the software hypervisor has no handler for the exit {exit.reason.name}",
    )


def _exception(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    """Only #PF is asked for, by shadow paging. The linear address is the qualification."""
    event = exit.interruption
    if event is None or event.vector != PF or event.type != EventType.HARDWARE_EXCEPTION:
        return _unknown(vcpu, exit)
    code = event.error or 0
    verdict = vcpu.paging.on_page_fault(vcpu.translation_state(), exit.qualification, code)
    return _obey(vcpu, exit, verdict, exit.qualification)


def _ept_violation(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    state = vcpu.translation_state()
    verdict = vcpu.paging.on_ept_violation(state, exit.physical, exit.qualification, exit.linear)
    return _obey(vcpu, exit, verdict, exit.linear)


def _obey(vcpu: SoftVcpu, exit: VmExit, verdict: Verdict, linear: int) -> Exit | None:
    if verdict.do is Do.RETRY:
        return None
    if verdict.do is Do.REFLECT:
        vcpu.inject_page_fault(PageFault(linear, verdict.code))
        return None
    return emulation.begin(vcpu, verdict.gpa)


def _misconfiguration(vcpu: SoftVcpu, exit: VmExit) -> Exit:
    words = f"an EPT entry of ours is not well formed, at GPA {exit.physical:#x}"
    return InternalError(exit.reason, (exit.physical,), words)


def _again(vcpu: SoftVcpu, exit: VmExit) -> None:
    """It was for the hypervisor, which looks at what is to be done before each entry anyway."""


def _skip(vcpu: SoftVcpu, exit: VmExit) -> None:
    vcpu.skip(exit)


def _undefined(vcpu: SoftVcpu, exit: VmExit) -> None:
    """What CPUID does not offer."""
    vcpu.inject(fault(UD))


def _general_protection(vcpu: SoftVcpu, exit: VmExit) -> None:
    vcpu.inject(fault(GP))


def _cpuid(vcpu: SoftVcpu, exit: VmExit) -> None:
    leaf, index = vcpu.register(RAX), vcpu.register(RCX)
    values = vcpu.cpuid(leaf, index, lambda: control_registers.cr4(vcpu))
    for register, value in zip((RAX, RBX, RCX, RDX), values, strict=True):
        vcpu.set_register(register, value)
    vcpu.skip(exit)


def _control_register(vcpu: SoftVcpu, exit: VmExit) -> None:
    control_registers.handle(vcpu, exit)


def _invlpg(vcpu: SoftVcpu, exit: VmExit) -> None:
    """Of an address that is not canonical it does nothing (SDM vol. 2A, INVLPG); INVVPID would fail."""
    if canonical(exit.qualification):
        vcpu.paging.on_invlpg(exit.qualification)
    vcpu.skip(exit)


def _halt(vcpu: SoftVcpu, exit: VmExit) -> Exit | None:
    """Without chips nothing of ours can wake it: the monitor may."""
    vcpu.skip(exit)
    if not vcpu.machine.has_chips:
        return HaltExit()
    vcpu.halt()
    return None


def _pause(vcpu: SoftVcpu, exit: VmExit) -> None:
    """It waits for another processor: its slice is over."""
    vcpu.skip(exit)
    vcpu.pauses = True


def _triple_fault(vcpu: SoftVcpu, exit: VmExit) -> Exit:
    return ShutdownExit()


def _failed_entry(vcpu: SoftVcpu, exit: VmExit) -> Exit:
    """What the guest has loaded is no state of a processor; our own mistakes are VMfail."""
    why = vcpu.pcpu.entry_failure if vcpu.pcpu else ""
    words = f"the processor refused to enter the guest: {why}"
    return InternalError(exit.reason, (exit.qualification,), words)


def _xsetbv(vcpu: SoftVcpu, exit: VmExit) -> None:
    """XCR0 (SDM vol. 1 §13.3): x87 always, AVX only with SSE; CPUID offers no XSAVE, a core may."""
    value = vcpu.register(RDX) << 32 | vcpu.register(RAX) & 0xFFFF_FFFF
    if vcpu.register(RCX) & 0xFFFF_FFFF or not value & 1 or value & ~7 or value & 6 == 4:
        vcpu.inject(fault(GP))
        return
    vcpu.state.xcr0 = value
    vcpu.skip(exit)


HANDLERS: dict[Reason, Handler] = {
    Reason.EXCEPTION_NMI: _exception,
    Reason.EXTERNAL_INTERRUPT: _again,
    Reason.TRIPLE_FAULT: _triple_fault,
    Reason.INTERRUPT_WINDOW: _again,
    Reason.NMI_WINDOW: _again,
    Reason.TASK_SWITCH: task_switch.handle,
    Reason.CPUID: _cpuid,
    Reason.HLT: _halt,
    Reason.INVD: _skip,
    Reason.INVLPG: _invlpg,
    Reason.RDPMC: _general_protection,
    Reason.RSM: _undefined,
    Reason.VMCALL: _undefined,
    Reason.VMCLEAR: _undefined,
    Reason.VMLAUNCH: _undefined,
    Reason.VMPTRLD: _undefined,
    Reason.VMPTRST: _undefined,
    Reason.VMREAD: _undefined,
    Reason.VMRESUME: _undefined,
    Reason.VMWRITE: _undefined,
    Reason.VMXOFF: _undefined,
    Reason.VMXON: _undefined,
    Reason.INVEPT: _undefined,
    Reason.INVVPID: _undefined,
    Reason.CR_ACCESS: _control_register,
    Reason.IO: io.handle,
    Reason.RDMSR: msrs.handle_read,
    Reason.WRMSR: msrs.handle_write,
    Reason.ENTRY_GUEST_STATE: _failed_entry,
    Reason.ENTRY_MSR_LOADING: _failed_entry,
    Reason.MWAIT: _undefined,
    Reason.MONITOR: _undefined,
    Reason.PAUSE: _pause,
    Reason.EPT_VIOLATION: _ept_violation,
    Reason.EPT_MISCONFIGURATION: _misconfiguration,
    Reason.PREEMPTION_TIMER: _again,
    Reason.WBINVD: _skip,
    Reason.XSETBV: _xsetbv,
}
