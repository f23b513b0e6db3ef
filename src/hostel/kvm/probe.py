"""What this host's KVM is worth: there, allowed, and fast in ring 0?

A KVM may exist and still be no place for Linux: without hardware virtualization a kernel module can
offer the whole interface and interpret the guest's ring 0. So a guest of two instructions is run in
ring 0 for a few milliseconds and its loops are counted.

What is fast? Measured: an interpreting KVM does about 1 million loops a second; hardware 500 million and
more; hardware that is itself emulated (a KVM inside QEMU's TCG) 70 million, and next to none while its host
is busy. Where the CPU has VMX or SVM, KVM runs ring 0 on it by construction: there, the guest has to get
ahead at all. Without, it has to be as fast as hardware. A slow count is repeated before it is believed,
each time with twice the time.
"""

from __future__ import annotations

import os
import threading
import time

import msgspec

from hostel.abi import kvm as abi
from hostel.errors import HostelError, KvmError
from hostel.hypervisor import Interrupted
from hostel.memory import GuestMemory

from .system import DEVICE, System
from .vcpu import Vcpu

AT_SPEED = {True: 10_000, False: 20_000_000}
"""Loops a second from which ring 0 counts as run, not interpreted; with and without VMX or SVM."""

_TRIES = {True: 6, False: 2}
_CAPABILITIES = {
    "irqchip": abi.CAP_IRQCHIP,
    "split_irqchip": abi.CAP_SPLIT_IRQCHIP,
    "irqfd": abi.CAP_IRQFD,
    "irqfd_resample": abi.CAP_IRQFD_RESAMPLE,
    "ioeventfd": abi.CAP_IOEVENTFD,
    "immediate_exit": abi.CAP_IMMEDIATE_EXIT,
    "pit2": abi.CAP_PIT2,
    "tsc_control": abi.CAP_TSC_CONTROL,
    "tsc_deadline_timer": abi.CAP_TSC_DEADLINE_TIMER,
    "guest_debug": abi.CAP_SET_GUEST_DEBUG,
    "user_space_msr": abi.CAP_X86_USER_SPACE_MSR,
    "dirty_log_manual_protect": abi.CAP_MANUAL_DIRTY_LOG_PROTECT2,
    "dirty_log_ring": abi.CAP_DIRTY_LOG_RING,
    "binary_stats": abi.CAP_BINARY_STATS_FD,
    "nested": abi.CAP_NESTED_STATE,
    "memslots": abi.CAP_NR_MEMSLOTS,
}

_PML4, _PDPT, _PD, _CODE = 0x1000, 0x2000, 0x3000, 0x4000
_LOOP = bytes.fromhex("48 ff c0 eb fb")  # inc %rax; jmp back to it
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_CR0_PE_PG, _CR4_PAE, _EFER_LME_LMA = 0x8000_0001, 0x20, 0x500


class KvmReport(msgspec.Struct, frozen=True):
    """``usable`` decides; ``reason`` tells a person why, in one line."""

    present: bool
    openable: bool
    error: str = ""
    """Why it does not open, or why the trial guest did not run."""
    api_version: int = 0
    hardware: str = ""
    """``vmx`` (Intel), ``svm`` (AMD) or nothing: what the CPU says it has."""
    loops_per_second: int = 0
    ring0_at_speed: bool = False
    max_vcpus: int = 0
    capabilities: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.openable and not self.error and self.ring0_at_speed

    @property
    def reason(self) -> str:
        if self.error:
            return self.error
        flag = f"CPU flag {self.hardware}" if self.hardware else "no CPU flag vmx or svm"
        speed = f"{self.loops_per_second / 1e6:,.1f} million loops/s in ring 0, {flag}"
        if self.ring0_at_speed:
            return f"KVM runs guests at speed ({speed})"
        return f"KVM is here but interprets the guest's kernel ({speed}): Linux would not boot"


def probe(deadline: float = 0.003) -> KvmReport:
    """Look at ``/dev/kvm``; never raises, never hangs. ``deadline``: seconds for one count."""
    hardware = _hardware_flag()
    try:
        system = System()
    except HostelError as error:
        return KvmReport(_exists(), False, str(error), hardware=hardware)
    with system:
        try:
            speed, fast = _measure(system, deadline, bool(hardware))
            problem = ""
        except HostelError as error:
            speed, fast, problem = 0, False, f"a trial guest did not run: {error}"
        return KvmReport(
            present=True,
            openable=True,
            error=problem,
            api_version=system.api_version(),
            hardware=hardware,
            loops_per_second=speed,
            ring0_at_speed=fast,
            max_vcpus=system.max_vcpus(),
            capabilities={name: system.check(number) for name, number in _CAPABILITIES.items()},
        )


def _exists() -> bool:
    return os.path.exists(DEVICE)


def _hardware_flag() -> str:
    """From the first CPU of /proc/cpuinfo: reading all of a large host's would take milliseconds."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return ""
    return next((flag for flag in ("vmx", "svm") if flag in flags), "")


def _measure(system: System, seconds: float, hardware: bool) -> tuple[int, bool]:
    """Loops a second in ring 0, and whether that is at speed."""
    enough = AT_SPEED[hardware]
    with system.create_vm() as vm, GuestMemory(2 << 20) as memory:
        vm.map(0, memory.regions[0])
        with vm.create_vcpu(0) as vcpu:
            _enter_long_mode(memory, vcpu)
            speed = 0
            for turn in range(_TRIES[hardware]):
                speed = max(speed, _count(vcpu, seconds * 2**turn))
                if speed >= enough:
                    break
            return speed, speed >= enough


def _count(vcpu: Vcpu, seconds: float) -> int:
    watchdog = threading.Timer(seconds, vcpu.kick)
    before = vcpu.get_regs().rax
    watchdog.start()
    start = time.perf_counter()
    exit = vcpu.run()
    elapsed = time.perf_counter() - start
    watchdog.cancel()
    watchdog.join()
    if not isinstance(exit, Interrupted):
        raise KvmError(f"unexpected {exit}")
    return int((vcpu.get_regs().rax - before) / elapsed)


def _enter_long_mode(memory: GuestMemory, vcpu: Vcpu) -> None:
    """The shortest way into ring 0 with 64 bits: no descriptor table is ever read, for no segment
    is loaded and no interrupt comes (SDM vol. 3A §10.8.5 lists what the registers must hold)."""
    memory.write_u64(_PML4, _PDPT | _PRESENT_WRITABLE)
    memory.write_u64(_PDPT, _PD | _PRESENT_WRITABLE)
    memory.write_u64(_PD, _PRESENT_WRITABLE | _LARGE)
    memory.write(_CODE, _LOOP)
    sregs = vcpu.get_sregs()
    sregs.cr3, sregs.cr4, sregs.cr0 = _PML4, _CR4_PAE, _CR0_PE_PG
    sregs.efer = _EFER_LME_LMA
    sregs.cs.base, sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.g = 0, 8, 1, 0, 1
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.Regs(rip=_CODE, rflags=2))
