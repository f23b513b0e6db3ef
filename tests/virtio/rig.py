"""A machine without vCPUs: buses, event loop, memory, and drivers that work as a guest's would.

``FakeVm`` records what KVM would be told, and plays its part: ``Rig.write`` is a guest's store, which
goes to a matching ioeventfd or, if there is none, to the bus.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable
from typing import Any

from hostel.abi import pci as pci_abi
from hostel.abi import virtio as abi
from hostel.errors import KvmError
from hostel.hypervisor import GsiRoute, MsiMessage, Statistics, Vcpu, Vm
from hostel.memory import GuestMemory, Region
from hostel.virtio.device import VirtioDevice
from hostel.virtio.mmio import VirtioMmio
from hostel.virtio.mock import Completion, DriverQueue
from hostel.virtio.pci import VirtioPci
from hostel.virtio.transport import Transport
from hostel.vmm import layout
from hostel.vmm.bus import Bus
from hostel.vmm.irq import InterruptTable
from hostel.vmm.loop import EventLoop
from hostel.vmm.pci import PciBus

PATIENCE = 10.0
MEMORY = 32 << 20
ALWAYS = 1 << abi.F_VERSION_1 | 1 << abi.RING_F_INDIRECT_DESC
EVENT_INDEX = 1 << abi.RING_F_EVENT_IDX
RUNNING = (
    abi.CONFIG_S_ACKNOWLEDGE
    | abi.CONFIG_S_DRIVER
    | abi.CONFIG_S_FEATURES_OK
    | abi.CONFIG_S_DRIVER_OK
)


class FakeVm:
    """Keeps what it is told; ``limit`` ioeventfds, as KVM has a limit."""

    def __init__(self) -> None:
        self.ioeventfds: dict[tuple[int, int, int | None], int] = {}
        self.irqfds: dict[int, int] = {}
        self.routes: dict[int, Any] = {}
        self.limit = 1000
        self.levels: dict[int, bool] = {}

    def ioeventfd(
        self,
        address: int,
        size: int,
        fd: int,
        *,
        match: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        key = (address, size, match)
        if not assign:
            assert self.ioeventfds.pop(key) == fd
            return
        if len(self.ioeventfds) >= self.limit or key in self.ioeventfds:
            raise KvmError("no room for another ioeventfd")
        self.ioeventfds[key] = fd

    def irqfd(self, gsi: int, fd: int, *, assign: bool = True) -> None:
        if assign:
            self.irqfds[gsi] = fd
        else:
            assert self.irqfds.pop(gsi) == fd

    def set_gsi_routes(self, routes: list[GsiRoute]) -> None:
        self.routes = {route.gsi: route.target for route in routes}

    def map(
        self, slot: int, region: Region, *, read_only: bool = False, log_dirty: bool = False
    ) -> None: ...
    def unmap(self, slot: int) -> None: ...
    def create_chipset(self, reserved: int) -> None: ...
    def create_vcpu(self, id: int) -> Vcpu:
        raise AssertionError("no vCPUs here")

    def irq_line(self, gsi: int, level: bool) -> None:
        self.levels[gsi] = level

    def signal_msi(self, message: MsiMessage) -> bool:
        return True

    def open_stats(self) -> Statistics:
        raise AssertionError("no counters here")

    def close(self) -> None: ...


class Rig:
    """``close`` checks that nothing is left in the fake KVM. A real VM may take its place."""

    def __init__(self, memory: GuestMemory | None = None, vm: Vm | None = None) -> None:
        self.errors: list[Exception] = []
        self.memory = memory or GuestMemory(MEMORY)
        self.loop = EventLoop(self.errors.append)
        self.vm = FakeVm()
        self.kvm: Vm = vm or self.vm
        self.irqs = InterruptTable(self.kvm)
        self.mmio = Bus()
        self.ports = Bus()
        self.pci = PciBus(self.mmio, ports=self.ports)
        self.mmio.add(layout.ECAM_START, layout.ECAM_SIZE, self.pci, "pci")
        self.loop.start()
        self._seats: list[VirtioPci | VirtioMmio] = []

    def close(self) -> None:
        for seat in self._seats:
            seat.close()
        self.loop.stop()
        self.irqs.close()
        self.memory.close()
        assert not self.errors
        assert not self.vm.ioeventfds
        assert not self.vm.irqfds

    # -- a guest's loads and stores -----------------------------------------------------------

    def read(self, address: int, size: int) -> int:
        return int.from_bytes(self.mmio.read(address, size), "little")

    def write(self, address: int, size: int, value: int) -> None:
        for key in ((address, 0, None), (address, size, None), (address, size, value)):
            if (fd := self.vm.ioeventfds.get(key)) is not None:
                os.eventfd_write(fd, 1)
                return
        self.mmio.write(address, value.to_bytes(size, "little"))

    # -- devices ------------------------------------------------------------------------------

    def on_pci(self, device: VirtioDevice) -> PciDriver:
        seat = VirtioPci(device, self.memory, self.kvm, self.irqs)
        self._seats.append(seat)
        return PciDriver(self, device, seat, self.pci.add(seat))

    def on_mmio(self, device: VirtioDevice) -> MmioDriver:
        number = len(self._seats)
        address = layout.VIRTIO_MMIO_START + number * layout.VIRTIO_MMIO_STRIDE
        gsi = layout.VIRTIO_MMIO_GSIS[number]
        seat = VirtioMmio(device, self.memory, self.kvm, address=address, gsi=gsi)
        self._seats.append(seat)
        self.mmio.add(address, layout.VIRTIO_MMIO_STRIDE, seat, device.name)
        return MmioDriver(self, device, seat, address, gsi)

    def unseat(self, driver: Driver) -> None:
        """Take a device away, as at the machine's end."""
        self._seats.remove(driver.seat)
        driver.seat.close()

    def seat(self, transport: str, device: VirtioDevice) -> Driver:
        return self.on_pci(device) if transport == "pci" else self.on_mmio(device)


class Driver:
    """What a driver does on any transport. Memory from 1 MiB on is its own, 2 MiB for each queue."""

    seat: VirtioPci | VirtioMmio
    transport: Transport

    def __init__(self, rig: Rig, device: VirtioDevice) -> None:
        self.rig = rig
        self.device = device
        self.queues: dict[int, DriverQueue] = {}

    # -- by transport -------------------------------------------------------------------------

    def read_features(self) -> int: ...  # type: ignore[empty-body]
    def write_features(self, features: int) -> None: ...
    def get_status(self) -> int: ...  # type: ignore[empty-body]
    def set_status(self, status: int) -> None: ...
    def set_up(self, index: int, queue: DriverQueue) -> None: ...
    def kick(self, index: int) -> None: ...
    def call_fd(self, index: int) -> int: ...  # type: ignore[empty-body]
    def config_fd(self) -> int: ...  # type: ignore[empty-body]
    def config_address(self, offset: int) -> int: ...  # type: ignore[empty-body]
    def generation(self) -> int: ...  # type: ignore[empty-body]

    def config(self, offset: int, size: int) -> int:
        return self.rig.read(self.config_address(offset), size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.rig.write(self.config_address(offset), size, value)

    # -- common -------------------------------------------------------------------------------

    def start(
        self,
        features: int = 0,
        *,
        size: int = 16,
        heap: int = 1 << 20,
        indexes: tuple[int, ...] | None = None,
        base: int = 1 << 20,
    ) -> None:
        """§3.1.1 from reset to DRIVER_OK; ``features`` besides ALWAYS."""
        self.negotiate(features)
        if indexes is None:
            indexes = tuple(range(len(self.device.queue_sizes)))
        for index in indexes:
            queue = DriverQueue(
                self.rig.memory,
                base + (index << 21),
                min(size, self.device.queue_sizes[index]),
                heap=heap,
                event_index=bool(features & EVENT_INDEX),
            )
            self.queues[index] = queue
            self.set_up(index, queue)
        self.set_status(RUNNING)

    def negotiate(self, features: int = 0) -> None:
        self.set_status(0)
        self.set_status(abi.CONFIG_S_ACKNOWLEDGE)
        self.set_status(abi.CONFIG_S_ACKNOWLEDGE | abi.CONFIG_S_DRIVER)
        wanted = features | ALWAYS
        assert self.read_features() & wanted == wanted
        self.write_features(wanted)
        self.set_status(RUNNING & ~abi.CONFIG_S_DRIVER_OK)
        assert self.get_status() & abi.CONFIG_S_FEATURES_OK

    def wait(self, index: int, count: int = 1) -> list[Completion]:
        """Completions, by interrupt, as they come."""
        queue, call = self.queues[index], self.call_fd(index)
        done = queue.completed()
        while len(done) < count:
            assert wait_fd(call), f"no interrupt of queue {index}; {self.device.fault}"
            done += queue.completed()
        return done

    def request(self, index: int, *args: Any, **keywords: Any) -> Completion:
        self.queues[index].add(*args, **keywords)
        self.kick(index)
        return self.wait(index)[0]

    @property
    def needs_reset(self) -> bool:
        return bool(self.get_status() & abi.CONFIG_S_NEEDS_RESET)


class PciDriver(Driver):
    """Finds everything by configuration space, and lets each vector interrupt."""

    def __init__(self, rig: Rig, device: VirtioDevice, seat: VirtioPci, number: int) -> None:
        super().__init__(rig, device)
        self.seat = seat
        self.transport = seat.transport
        self.slots = seat.transport.slots
        self.ecam = layout.ECAM_START + (number << 15)
        rig.write(self.ecam + pci_abi.COMMAND, 2, pci_abi.COMMAND_MEMORY | pci_abi.COMMAND_MASTER)
        self.structures: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        self.msix = 0
        self.notify_stride = 0
        for at, kind in self.capabilities():
            if kind == pci_abi.CAP_ID_MSIX:
                self.msix = at
            else:
                self._structure(at)
        self._unmask_vectors()

    def capabilities(self) -> list[tuple[int, int]]:
        found, at = [], self.rig.read(self.ecam + pci_abi.CAPABILITY_LIST, 1)
        while at:
            found.append((at, self.rig.read(self.ecam + at, 1)))
            at = self.rig.read(self.ecam + at + 1, 1)
        return found

    def bar(self, index: int) -> int:
        return self.rig.read(self.ecam + pci_abi.BASE_ADDRESS_0 + 4 * index, 4) & ~0xF

    def _structure(self, at: int) -> None:
        raw = b"".join(self.rig.mmio.read(self.ecam + at + n, 1) for n in range(16))
        _, _, _, kind, bar, _, _, offset, length = abi.PCI_CAP.unpack(raw)
        if kind == abi.PCI_CAP_PCI_CFG:
            self.window = at
            return
        self.structures[kind] = self.bar(bar) + offset
        self.lengths[kind] = length
        if kind == abi.PCI_CAP_NOTIFY_CFG:
            self.notify_stride = self.rig.read(self.ecam + at + 16, 4)

    def _unmask_vectors(self) -> None:
        table = self.rig.read(self.ecam + self.msix + pci_abi.MSIX_TABLE, 4)
        self.table = self.bar(table & 7) + (table & ~7)
        for vector in range(len(self.device.queue_sizes) + 1):
            entry = pci_abi.MSIX_ENTRY.pack(0xFEE0_0000, 0, 0x30 + vector, 0)
            for at, word in enumerate(struct.unpack("<4I", entry)):
                self.rig.write(self.table + 16 * vector + 4 * at, 4, word)
        self.rig.write(self.ecam + self.msix + 2, 2, pci_abi.MSIX_FLAGS_ENABLE)

    def _field(self, name: str) -> int:
        return self.structures[abi.PCI_CAP_COMMON_CFG] + abi.PCI_COMMON_CFG.offsets[name]

    def get(self, name: str, size: int) -> int:
        return self.rig.read(self._field(name), size)

    def set(self, name: str, size: int, value: int) -> None:
        self.rig.write(self._field(name), size, value)

    def read_features(self) -> int:
        features = 0
        for half in (0, 1):
            self.set("device_feature_select", 4, half)
            features |= self.get("device_feature", 4) << 32 * half
        return features

    def write_features(self, features: int) -> None:
        for half in (0, 1):
            self.set("guest_feature_select", 4, half)
            self.set("guest_feature", 4, features >> 32 * half & 0xFFFF_FFFF)

    def get_status(self) -> int:
        return self.get("device_status", 1)

    def set_status(self, status: int) -> None:
        self.set("device_status", 1, status)

    def set_up(self, index: int, queue: DriverQueue) -> None:
        self.set("msix_config", 2, len(self.device.queue_sizes))
        self.set("queue_select", 2, index)
        self.set("queue_size", 2, queue.size)
        self.set("queue_msix_vector", 2, index)
        for ring, address in (("desc", queue.desc), ("avail", queue.avail), ("used", queue.used)):
            self.set(f"queue_{ring}_lo", 4, address & 0xFFFF_FFFF)
            self.set(f"queue_{ring}_hi", 4, address >> 32)
        self.set("queue_enable", 2, 1)

    def kick(self, index: int) -> None:
        self.set("queue_select", 2, index)
        offset = self.get("queue_notify_off", 2) * self.notify_stride
        self.rig.write(self.structures[abi.PCI_CAP_NOTIFY_CFG] + offset, 2, index)

    def call_fd(self, index: int) -> int:
        return self.slots[index].eventfd

    def config_fd(self) -> int:
        return self.call_fd(len(self.device.queue_sizes))

    def config_address(self, offset: int) -> int:
        return self.structures[abi.PCI_CAP_DEVICE_CFG] + offset

    def generation(self) -> int:
        return self.get("config_generation", 1)


class MmioDriver(Driver):
    def __init__(
        self, rig: Rig, device: VirtioDevice, seat: VirtioMmio, address: int, gsi: int
    ) -> None:
        super().__init__(rig, device)
        self.seat = self.transport = seat
        self.address = address
        self.gsi = gsi

    def get(self, offset: int) -> int:
        return self.rig.read(self.address + offset, 4)

    def set(self, offset: int, value: int) -> None:
        self.rig.write(self.address + offset, 4, value)

    def read_features(self) -> int:
        features = 0
        for half in (0, 1):
            self.set(abi.MMIO_DEVICE_FEATURES_SEL, half)
            features |= self.get(abi.MMIO_DEVICE_FEATURES) << 32 * half
        return features

    def write_features(self, features: int) -> None:
        for half in (0, 1):
            self.set(abi.MMIO_DRIVER_FEATURES_SEL, half)
            self.set(abi.MMIO_DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)

    def get_status(self) -> int:
        return self.get(abi.MMIO_STATUS)

    def set_status(self, status: int) -> None:
        self.set(abi.MMIO_STATUS, status)

    def set_up(self, index: int, queue: DriverQueue) -> None:
        self.set(abi.MMIO_QUEUE_SEL, index)
        self.set(abi.MMIO_QUEUE_NUM, queue.size)
        for register, address in (
            (abi.MMIO_QUEUE_DESC_LOW, queue.desc),
            (abi.MMIO_QUEUE_AVAIL_LOW, queue.avail),
            (abi.MMIO_QUEUE_USED_LOW, queue.used),
        ):
            self.set(register, address & 0xFFFF_FFFF)
            self.set(register + 4, address >> 32)
        self.set(abi.MMIO_QUEUE_READY, 1)

    def kick(self, index: int) -> None:
        self.set(abi.MMIO_QUEUE_NOTIFY, index)

    def call_fd(self, index: int) -> int:
        return self.rig.vm.irqfds[self.gsi]

    def config_fd(self) -> int:
        return self.rig.vm.irqfds[self.gsi]

    def config_address(self, offset: int) -> int:
        return self.address + abi.MMIO_CONFIG + offset

    def generation(self) -> int:
        return self.get(abi.MMIO_CONFIG_GENERATION)


def wait_fd(fd: int, seconds: float = PATIENCE) -> bool:
    """Whether an eventfd was signalled; it is read."""
    if not select.select([fd], [], [], seconds)[0]:
        return False
    os.eventfd_read(fd)
    return True


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether it came true in time."""
    step = 0.002
    for _ in range(int(seconds / step)):
        if condition():
            return True
        select.select([], [], [], step)
    return False
