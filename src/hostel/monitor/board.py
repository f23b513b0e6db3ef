"""One power-on of a machine: everything that a reset throws away.

``_build`` and ``seat`` read top to bottom as a start-up list; ``close`` undoes it from the bottom. The
console and the event loop are the monitor's and outlive it.

::

    Loading ── the kernel, into memory ──┐
    _build ─── VM, tables, vCPUs ────────┴─ start ── the guest's kernel begins ── finds a device ──►
                                              └───── seat: ports, PCI, virtio ────────┘

A kernel runs for a while before it looks for devices. So it is started before they are there: their
buses are held back, and a vCPU that comes to one early waits. Not on engine ``soft``, where nothing may
come at a moment that is the host's to choose, and not on transport mmio, whose devices the tables name.

In the hypervisor are: the PIC, the IOAPIC, the LAPICs (each would cost an exit an interrupt) and the PIT,
which a kernel that knows kvm-clock never touches, but which small kernels live by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Protocol

from hostel.boot.acpi import AcpiConfig, MmioDevice, write_tables
from hostel.console import Console
from hostel.errors import HostelError
from hostel.hypervisor import System, Vcpu, Vm
from hostel.plan import Ending, Plan
from hostel.vmm import cpu, layout
from hostel.vmm.bus import Bus, Device
from hostel.vmm.irq import InterruptTable
from hostel.vmm.loop import EventLoop
from hostel.vmm.vcpu_thread import JOIN_SECONDS, VcpuThread

from .loading import Loading

if TYPE_CHECKING:
    from hostel.boot.acpi import PciPin
    from hostel.virtio.device import VirtioDevice
    from hostel.vmm.pci import PciBus, PciFunction

    from .soft import SoftSide
    from .terminal import Terminal


def _open_kvm() -> System:
    from hostel.kvm import System as KvmSystem

    return KvmSystem()


class Named(Protocol):
    """A virtio device, or a card."""

    name: str


class Owner(Protocol):
    """Who is told what becomes of the board; on any thread, a vCPU's too."""

    def poweroff(self) -> None: ...
    def reset(self) -> None: ...
    def debug_exit(self, code: int) -> None: ...
    def system_event(self, type: int) -> None: ...
    def failed(self, error: HostelError) -> None: ...
    def device_failed(self, device: Named, error: HostelError) -> None: ...


class Board:
    """Built, then ``start``, then ``seat``, then ``close``."""

    console: Console
    owner: Owner
    vm: Vm
    interrupts: InterruptTable
    terminal: Terminal | None = None
    pci: PciBus | None = None

    def __init__(
        self,
        plan: Plan,
        loading: Loading,
        loop: EventLoop,
        console: Console,
        owner: Owner,
        *,
        agent_fd: int | None = None,
        soft: SoftSide | None = None,
    ) -> None:
        self.plan = plan
        self.take_input: Callable[[int], bytes] = console.take
        self.clock: Callable[[], float] = time.time
        """Of the day."""
        self.timer: Callable[[], int] = time.monotonic_ns
        self.agent_fd = agent_fd
        """The guest's end of the agent's stream; not ours to close."""
        self.virtio: list[VirtioDevice] = []
        self.virtio_mmio: list[MmioDevice] = []
        self.cards: list[PciFunction] = []
        """PCI functions that are no virtio devices."""
        self.memory = loading.memory
        self.loop = loop
        self.console = console
        self.owner = owner
        self._soft = soft
        self._seats_first = soft is not None or plan.spec.transport == "mmio"
        self._seating = threading.Lock()
        self._closed = False
        self._undo = ExitStack()
        self._undo.callback(loading.cancel)
        try:
            self._build(loading)
        except BaseException:
            self._undo.close()
            raise

    def _build(self, loading: Loading) -> None:
        with closing(self._soft.system() if self._soft else _open_kvm()) as system:
            self.vm = system.create_vm()
            self._undo.callback(self.vm.close)
            if self._soft is not None:
                self._soft.wire(self)
            self._map_memory()
            self.vm.create_chipset(layout.HYPERVISOR_PAGES)
            self.interrupts = InterruptTable(self.vm)
            self._undo.callback(self.interrupts.close)
            self.ports, self.mmio = Bus(), Bus()
            self.ports.hold()
            self.mmio.hold()
            if self._seats_first:
                self._seat_devices()
                self._seat_virtio()
            self._write_tables()
            self.vcpus = [self._create_vcpu(id) for id in range(self.plan.spec.cpus)]
            self._prepare_vcpus(system)
            self._open_statistics()
            loading.entry().apply(self.vcpus[0])
            if self._soft is not None:
                self._soft.power_on(self)
        self.threads = [self._create_thread(vcpu) for vcpu in self.vcpus]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def seat(self) -> None:
        """The rest of the devices, while the guest's kernel begins. If it raises, ``close`` is next."""
        with self._seating:
            if self._closed:
                return
            if not self._seats_first:
                self._seat_devices()
                self.ports.release()
                self._seat_virtio()
            self.ports.release()
            self.mmio.release()
        self.loop.call_soon(self.poll_input)  # what was typed meanwhile

    def halt(self) -> None:
        """Ask every vCPU to come out; from any thread."""
        for thread in self.threads:
            thread.request_stop()
        self.ports.release()
        self.mmio.release()

    def close(self, ending: Ending) -> str:
        """Give all back. Where a vCPU's thread that does not end is: it keeps what it may still use."""
        with self._seating:
            self._closed = True
        self.halt()
        deadline = time.monotonic() + JOIN_SECONDS
        if stuck := [t.place for t in self.threads if not t.stop(deadline - time.monotonic())]:
            return ", ".join(stuck)
        for device in self.ports.devices():
            if flush := getattr(device, "flush", None):
                self.enter(device, flush)
        with self._undo:
            if self._soft is not None:
                self._soft.power_off(self, ending)
        return ""

    # -- the list's steps ---------------------------------------------------------------------

    def _map_memory(self) -> None:
        for slot, region in enumerate(self.memory.regions):
            self.vm.map(slot, region)

    def _seat_devices(self) -> None:
        from . import seats

        for seat in seats.SEATS:
            self.ports.add(seat.port, seat.size, seat.make(self), seat.name, width=seat.width)

    def _seat_virtio(self) -> None:
        from .virtio import seat_on_mmio, seat_on_pci

        seat = seat_on_pci if self.plan.spec.transport == "pci" else seat_on_mmio
        try:
            seat(self, self._undo)
        finally:
            if self.terminal is not None:
                self._undo.callback(self.terminal.close)
        for device in self.virtio:
            device.on_fault = self.owner.device_failed

    def _write_tables(self) -> None:
        """Beside the kernel that is being loaded, at an address that it knows."""
        tables = AcpiConfig(
            apic_ids=range(self.plan.spec.cpus),
            pci=self.plan.spec.transport == "pci",
            pci_pins=self._pci_pins(),
            virtio_mmio=self.virtio_mmio,
        )
        write_tables(self.memory, tables)

    def _pci_pins(self) -> Sequence[PciPin]:
        if not self.plan.nics:
            return ()
        from .nic import e1000_pins

        return e1000_pins(self.plan)

    def _create_vcpu(self, id: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(id)
        self._undo.callback(vcpu.close)
        return vcpu

    def _prepare_vcpus(self, system: System) -> None:
        """The boot processor enters the kernel; the others wait, in the hypervisor, for its start-up
        message."""
        supported = system.supported_cpuid()
        tsc_deadline = system.has_tsc_deadline()
        tsc_khz = self.vcpus[0].get_tsc_khz()
        for vcpu in self.vcpus:
            vcpu.set_cpuid(
                cpu.cpuid(
                    supported,
                    vcpu=vcpu.id,
                    count=len(self.vcpus),
                    tsc_khz=tsc_khz,
                    tsc_deadline=tsc_deadline,
                )
            )
            vcpu.set_msrs(cpu.initial_msrs())
        first = self.vcpus[0]
        first.set_lapic(cpu.wire_lapic(first.get_lapic()))

    def _create_thread(self, vcpu: Vcpu) -> VcpuThread:
        pin = self.plan.spec.pin
        return VcpuThread(
            vcpu,
            self.ports,
            self.mmio,
            on_event=self.owner.system_event,
            on_error=self.owner.failed,
            pcpu=pin[vcpu.id] if pin else None,
        )

    # -- devices from the host's side ---------------------------------------------------------

    def enter(self, device: Device, call: Callable[[], None]) -> None:
        """Call into ``device`` as the bus would: alone."""
        with self.ports.lock(device):
            call()

    def enter_later(self, seconds: float, device: Device, call: Callable[[], None]) -> None:
        self.loop.call_later(seconds, lambda: self.enter(device, call))

    def poll_input(self) -> None:
        """The console has input. On the event loop."""
        if self._closed:
            return
        if self._soft is not None and self._soft.tell():
            return
        if self.terminal is not None and self.terminal.is_dev_console:
            self.terminal.poll_input()
        else:
            self.poll_devices()

    def poll_devices(self) -> None:
        """They take what they have room for."""
        for device in self.ports.devices():
            if poll := getattr(device, "poll_input", None):
                self.enter(device, poll)

    def resize_disk(self, index: int, size: int) -> None:
        from .virtio import Resizable, disk_name

        disk = next(device for device in self.virtio if device.name == disk_name(index))
        assert isinstance(disk, Resizable)
        disk.resize(size)

    # -- statistics ---------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        return {
            "memory": self.memory.size,
            "memory_allocated": self.memory.allocated,
            "devices": self.ports.statistics() | self.mmio.statistics(),
            "unclaimed": {
                "ports": _by_address(self.ports),
                "mmio": _by_address(self.mmio),
            },
            "virtio": {device.name: device.statistics() for device in self.virtio},
            "cards": {card.name: card.statistics() for card in self.cards},
            "exits": [thread.exits for thread in self.threads],
            self.plan.engine: self._hypervisor_statistics(),
        }

    def _open_statistics(self) -> None:
        """Before the vCPUs run: each ioctl on a vCPU, this one too, waits until it comes out."""
        self._vm_stats = self.vm.open_stats()
        self._undo.callback(self._vm_stats.close)
        self._vcpu_stats = [vcpu.open_stats() for vcpu in self.vcpus]
        for stats in self._vcpu_stats:
            self._undo.callback(stats.close)

    def _hypervisor_statistics(self) -> dict[str, Any]:
        return {
            "vm": self._vm_stats.read(),
            "vcpus": [stats.read() for stats in self._vcpu_stats],
        }


def _by_address(bus: Bus) -> dict[str, int]:
    """The accesses that nobody answered; of a copy, for a vCPU may add to them meanwhile."""
    return {f"{address:#x}": count for address, count in dict(bus.unclaimed).items()}
