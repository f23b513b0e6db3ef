"""One virtual processor: run it, kick it, and its state. api.rst: "vcpu ioctls".

::

    its thread                          any other thread
    run: KVM_RUN ── guest runs          kick: 1. immediate_exit = 1
         <── EINTR ─────────────────          2. signal to the vCPU's thread
         immediate_exit = 0; Interrupted

No kick is lost: one that comes before KVM_RUN is found in ``immediate_exit`` by the kernel, which
first completes the exit before (a read's value reaches the guest); one that comes later is the signal.
Kicks are not counted: several may end as one ``Interrupted``.

All but ``kick`` belong to the thread that calls ``run``; state is read and set between runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from struct import Struct
from types import TracebackType

from hostel.abi import kvm as abi
from hostel.hypervisor import Exit, Interrupted
from hostel.memory import map_shared

from . import exits
from .ioctl import call, refused
from .kick import here, kick_thread
from .lists import cpuid_entries, empty_cpuid, get_msrs, pack_cpuid, set_msrs
from .stats import Stats

_RUN, _IO, _MMIO = abi.RUN, abi.EXIT_IO, abi.EXIT_MMIO
_exit_reason = Struct("<8xI").unpack_from
_IMMEDIATE_EXIT = 1  # the byte of kvm_run
_U64 = Struct("<Q")
_INTERRUPTED = Interrupted()


class Vcpu:
    """Made by ``Vm.create_vcpu``. Implements ``hypervisor.Vcpu``. A context manager."""

    def __init__(self, fd: int, id: int, page_size: int, xsave_size: int) -> None:
        self.fd = fd
        self.id = id
        self._page = map_shared(fd, page_size)
        self._xsave_size = xsave_size
        self._thread = 0

    # --- Running ---

    def run(self) -> Exit:
        """KVM_RUN, api.rst §4.10: enter the guest until something is ours to answer."""
        self._thread = here.thread
        page = self._page
        try:
            ioctl(self.fd, _RUN)
        except (InterruptedError, BlockingIOError):
            # EAGAIN: an application processor that nobody has started yet was woken.
            page[_IMMEDIATE_EXIT] = 0
            return _INTERRUPTED
        except OSError as error:
            raise refused("KVM_RUN", error) from error
        (reason,) = _exit_reason(page)
        if reason == _IO:
            return exits.pio(page)
        if reason == _MMIO:
            return exits.mmio(page)
        return exits.parse(page, reason)

    def kick(self) -> None:
        """Make a running or the next ``run`` return ``Interrupted`` soon. From any thread."""
        page = self._page
        if not page:
            return
        page[_IMMEDIATE_EXIT] = 1
        if self._thread:
            kick_thread(self._thread)

    def finish_msr(self, value: int = 0, *, fault: bool = False) -> None:
        """Answer an ``MsrExit``: the value read, or #GP in the guest (api.rst §5)."""
        self._page[exits.AT] = fault
        _U64.pack_into(self._page, exits.MSR_DATA, value)

    def finish_hypercall(self, result: int) -> None:
        """Answer a ``HypercallExit``: what the guest finds in RAX."""
        _U64.pack_into(self._page, exits.HYPERCALL_RESULT, result)

    # --- Registers ---

    def get_regs(self) -> abi.Regs:
        """KVM_GET_REGS, api.rst §4.11: general registers, RIP, RFLAGS."""
        regs = abi.Regs()
        call(self.fd, "KVM_GET_REGS", abi.GET_REGS, regs)
        return regs

    def set_regs(self, regs: abi.Regs) -> None:
        """KVM_SET_REGS, api.rst §4.12."""
        call(self.fd, "KVM_SET_REGS", abi.SET_REGS, regs)

    def get_sregs(self) -> abi.Sregs:
        """KVM_GET_SREGS, api.rst §4.13: segments, descriptor tables, control registers, EFER."""
        sregs = abi.Sregs()
        call(self.fd, "KVM_GET_SREGS", abi.GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: abi.Sregs) -> None:
        """KVM_SET_SREGS, api.rst §4.14."""
        call(self.fd, "KVM_SET_SREGS", abi.SET_SREGS, sregs)

    def get_fpu(self) -> abi.Fpu:
        """KVM_GET_FPU, api.rst §4.22: x87 and SSE registers."""
        fpu = abi.Fpu()
        call(self.fd, "KVM_GET_FPU", abi.GET_FPU, fpu)
        return fpu

    def set_fpu(self, fpu: abi.Fpu) -> None:
        """KVM_SET_FPU, api.rst §4.23."""
        call(self.fd, "KVM_SET_FPU", abi.SET_FPU, fpu)

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE2, api.rst §4.134, of whatever size this CPU needs (KVM_GET_XSAVE, §4.42,
        and 4 KiB, where KVM has no other): all extended state."""
        buffer = bytearray(max(self._xsave_size, 4096))
        if self._xsave_size:
            call(self.fd, "KVM_GET_XSAVE2", abi.GET_XSAVE2, buffer)
        else:
            call(self.fd, "KVM_GET_XSAVE", abi.GET_XSAVE, buffer)
        return bytes(buffer)

    def set_xsave(self, state: bytes) -> None:
        """KVM_SET_XSAVE, api.rst §4.43: what ``get_xsave`` gave on a CPU with these features."""
        buffer = bytearray(state).ljust(max(self._xsave_size, 4096), b"\0")
        call(self.fd, "KVM_SET_XSAVE", abi.SET_XSAVE, buffer)

    def get_xcrs(self) -> abi.Xcrs:
        """KVM_GET_XCRS, api.rst §4.44: extended control registers."""
        xcrs = abi.Xcrs()
        call(self.fd, "KVM_GET_XCRS", abi.GET_XCRS, xcrs)
        return xcrs

    def set_xcrs(self, xcrs: abi.Xcrs) -> None:
        """KVM_SET_XCRS, api.rst §4.45."""
        call(self.fd, "KVM_SET_XCRS", abi.SET_XCRS, xcrs)

    def get_debugregs(self) -> abi.Debugregs:
        """KVM_GET_DEBUGREGS, api.rst §4.33."""
        registers = abi.Debugregs()
        call(self.fd, "KVM_GET_DEBUGREGS", abi.GET_DEBUGREGS, registers)
        return registers

    def set_debugregs(self, registers: abi.Debugregs) -> None:
        """KVM_SET_DEBUGREGS, api.rst §4.34."""
        call(self.fd, "KVM_SET_DEBUGREGS", abi.SET_DEBUGREGS, registers)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS, api.rst §4.18. An MSR that this vCPU has not is a ``KvmError``."""
        return get_msrs(self.fd, indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS, api.rst §4.19."""
        set_msrs(self.fd, values)

    # --- What the guest sees of its CPU ---

    def get_cpuid(self) -> list[abi.CpuidEntry2]:
        """KVM_GET_CPUID2, which api.rst leaves out: what ``set_cpuid`` was given."""
        buffer = empty_cpuid(256)
        call(self.fd, "KVM_GET_CPUID2", abi.GET_CPUID2, buffer)
        return cpuid_entries(buffer)

    def set_cpuid(self, entries: Sequence[abi.CpuidEntry2]) -> None:
        """KVM_SET_CPUID2, api.rst §4.20 (with KVM_SET_CPUID). Before the first ``run``."""
        call(self.fd, "KVM_SET_CPUID2", abi.SET_CPUID2, pack_cpuid(entries))

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ, api.rst §4.56."""
        return call(self.fd, "KVM_GET_TSC_KHZ", abi.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ, api.rst §4.55. Far from the host's own: needs KVM_CAP_TSC_CONTROL."""
        call(self.fd, "KVM_SET_TSC_KHZ", abi.SET_TSC_KHZ, khz)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL, api.rst §4.70: tell the guest that it was paused, so that its
        watchdogs forgive. An error if the guest does not use kvm-clock."""
        call(self.fd, "KVM_KVMCLOCK_CTRL", abi.KVMCLOCK_CTRL)

    # --- Interrupts and events ---

    def get_lapic(self) -> abi.LapicState:
        """KVM_GET_LAPIC, api.rst §4.57; needs an in-kernel irqchip."""
        state = abi.LapicState()
        call(self.fd, "KVM_GET_LAPIC", abi.GET_LAPIC, state)
        return state

    def set_lapic(self, state: abi.LapicState) -> None:
        """KVM_SET_LAPIC, api.rst §4.58."""
        call(self.fd, "KVM_SET_LAPIC", abi.SET_LAPIC, state)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE, api.rst §4.38: one of MP_STATE_*."""
        state = abi.MpState()
        call(self.fd, "KVM_GET_MP_STATE", abi.GET_MP_STATE, state)
        value: int = state.mp_state
        return value

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE, api.rst §4.39."""
        call(self.fd, "KVM_SET_MP_STATE", abi.SET_MP_STATE, abi.MpState(state))

    def get_events(self) -> abi.VcpuEvents:
        """KVM_GET_VCPU_EVENTS, api.rst §4.31: pending exceptions, interrupts, NMIs."""
        events = abi.VcpuEvents()
        call(self.fd, "KVM_GET_VCPU_EVENTS", abi.GET_VCPU_EVENTS, events)
        return events

    def set_events(self, events: abi.VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS, api.rst §4.32."""
        call(self.fd, "KVM_SET_VCPU_EVENTS", abi.SET_VCPU_EVENTS, events)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT, api.rst §4.16: inject a vector; only without an in-kernel irqchip."""
        call(self.fd, "KVM_INTERRUPT", abi.INTERRUPT, abi.Interrupt(vector))

    def nmi(self) -> None:
        """KVM_NMI, api.rst §4.64."""
        call(self.fd, "KVM_NMI", abi.NMI)

    # --- Looking inside ---

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG, api.rst §4.87: GUESTDBG_* bits, and DR0 to DR7 for hardware
        breakpoints."""
        request = abi.GuestDebug(control=control)
        request.arch.debugreg[: len(debugreg)] = list(debugreg)
        call(self.fd, "KVM_SET_GUEST_DEBUG", abi.SET_GUEST_DEBUG, request)

    def translate(self, address: int) -> abi.Translation:
        """KVM_TRANSLATE, api.rst §4.15: GVA → GPA by the guest's own page tables."""
        request = abi.Translation(linear_address=address)
        call(self.fd, "KVM_TRANSLATE", abi.TRANSLATE, request)
        return request

    def open_stats(self) -> Stats:
        """KVM_GET_STATS_FD, api.rst §4.133."""
        return Stats(call(self.fd, "KVM_GET_STATS_FD", abi.GET_STATS_FD))

    def close(self) -> None:
        """Not while ``run`` runs. A view that an exit handed out stays readable."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._page = memoryview(b"")

    def __enter__(self) -> Vcpu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
