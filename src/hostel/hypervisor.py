"""The contract between the monitor and what runs vCPUs: KVM (``kvm/``), or our own hypervisor (``soft/``).

A raw exit is parsed once, by the hypervisor, into one of the values below; the monitor dispatches on
their type and nobody else looks at a ``kvm_run`` page.

The ``data`` of a PIO or MMIO exit is a view into the page that the hypervisor shares with us, valid
until the next ``run`` of that vCPU. For a read the monitor fills it; the value reaches the guest when
the vCPU is entered again (KVM api.rst, "KVM_EXIT_IO").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from .abi import kvm as abi
from .memory import Region


class PioExit(msgspec.Struct):
    """``in``/``out``; ``rep ins``/``outs`` arrive as one exit with ``count`` > 1."""

    port: int
    size: int
    count: int
    is_write: bool
    data: memoryview
    """``size * count`` bytes."""


class MmioExit(msgspec.Struct):
    address: int
    is_write: bool
    data: memoryview
    """1 to 8 bytes."""


class HaltExit(msgspec.Struct):
    """``hlt`` with no in-kernel irqchip to wait in."""


class ShutdownExit(msgspec.Struct):
    """A triple fault."""


class SystemEvent(msgspec.Struct):
    type: int


class DebugExit(msgspec.Struct):
    exception: int
    pc: int
    dr6: int
    dr7: int


class MsrExit(msgspec.Struct):
    """An MSR access handed to user space (KVM_CAP_X86_USER_SPACE_MSR)."""

    index: int
    is_write: bool
    value: int
    reason: int


class HypercallExit(msgspec.Struct):
    number: int
    args: tuple[int, ...]


class IoapicEoi(msgspec.Struct):
    """A level-triggered interrupt was acknowledged (split irqchip)."""

    vector: int


class InternalError(msgspec.Struct):
    """The hypervisor could not go on with what the guest did."""

    suberror: int
    data: tuple[int, ...]
    words: str = ""
    """What it was, where the hypervisor says more than a number."""


class FailEntry(msgspec.Struct):
    """The processor refused to enter the guest."""

    reason: int


class Interrupted(msgspec.Struct):
    """``kick`` was called, or a signal came in. Nothing happened in the guest."""


class UnknownExit(msgspec.Struct):
    reason: int


Exit = (
    PioExit
    | MmioExit
    | HaltExit
    | ShutdownExit
    | SystemEvent
    | DebugExit
    | MsrExit
    | HypercallExit
    | IoapicEoi
    | InternalError
    | FailEntry
    | Interrupted
    | UnknownExit
)


class MsiMessage(msgspec.Struct, frozen=True):
    """Address and data of a message-signalled interrupt (SDM vol. 3A §11.11)."""

    address: int
    data: int


class GsiRoute(msgspec.Struct, frozen=True):
    """Where a GSI leads: an irqchip pin, or a message."""

    gsi: int
    target: MsiMessage | tuple[int, int]
    """A message, or ``(irqchip, pin)`` with KVM_IRQCHIP_* numbers."""


class Statistics(Protocol):
    """Counters of a VM or a vCPU, readable while it runs."""

    def read(self) -> dict[str, int | list[int]]: ...
    def close(self) -> None: ...


class Vcpu(Protocol):
    """One virtual processor. All but ``kick`` belong to the thread that runs it.

    A new one waits for its start-up message, but for number 0, which waits to be given its state.
    """

    id: int

    def run(self) -> Exit: ...
    def kick(self) -> None:
        """Make a running or the next ``run`` return ``Interrupted`` soon. From any thread."""

    def get_regs(self) -> abi.Regs: ...
    def set_regs(self, regs: abi.Regs) -> None: ...
    def get_sregs(self) -> abi.Sregs: ...
    def set_sregs(self, sregs: abi.Sregs) -> None: ...
    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]: ...
    def set_msrs(self, values: Mapping[int, int]) -> None: ...
    def set_cpuid(self, entries: Sequence[abi.CpuidEntry2]) -> None:
        """Before the first ``run``."""

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """GUESTDBG_* of KVM. With ENABLE and SINGLESTEP each instruction ends in a ``DebugExit``; one that
        the monitor has to answer is such an exit first; one at which an interrupt or a fault comes may end
        behind the handler's first. Breakpoints and ``debugreg``: KVM only."""

    def get_tsc_khz(self) -> int: ...
    def get_lapic(self) -> abi.LapicState: ...
    def set_lapic(self, state: abi.LapicState) -> None: ...
    def open_stats(self) -> Statistics: ...
    def close(self) -> None: ...


class Vm(Protocol):
    """One virtual machine. Thread-safe as the kernel is."""

    def map(
        self, slot: int, region: Region, *, read_only: bool = False, log_dirty: bool = False
    ) -> None: ...
    def unmap(self, slot: int) -> None: ...
    def create_chipset(self, reserved: int) -> None:
        """PICs, IOAPIC, PIT, and with each vCPU a LAPIC. ``reserved``: the GPA of four pages without RAM
        and devices, which the hypervisor may need for itself."""

    def create_vcpu(self, id: int) -> Vcpu: ...
    def irq_line(self, gsi: int, level: bool) -> None: ...
    def signal_msi(self, message: MsiMessage) -> bool: ...
    def ioeventfd(
        self,
        address: int,
        size: int,
        fd: int,
        *,
        match: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None: ...
    def irqfd(self, gsi: int, fd: int, *, assign: bool = True) -> None: ...
    def set_gsi_routes(self, routes: list[GsiRoute]) -> None: ...
    def open_stats(self) -> Statistics: ...
    def close(self) -> None: ...


class System(Protocol):
    """A hypervisor: what it can show a guest, and new VMs, which live on after ``close``."""

    def supported_cpuid(self) -> list[abi.CpuidEntry2]: ...
    def has_tsc_deadline(self) -> bool:
        """Whether its LAPIC timer has a TSC-deadline mode; no CPUID leaf of ``supported_cpuid`` says so."""

    def create_vm(self) -> Vm: ...
    def close(self) -> None: ...
