"""The MMIO transport (virtio 1.2 §4.2), version 2.

::

    offset 0x000 .. 0x0fc  registers, 32 bits each       0x100 ..  device configuration

All queues notify at one address, with the queue's index as the value: an ioeventfd with a data match
for each. One edge-triggered interrupt serves all queues and configuration changes, by an irqfd: the
ACPI tables must describe the GSI as edge, active high.

A data plane interrupts by the eventfd alone and never touches a register, so InterruptStatus says
"used buffers" whenever the device runs. A driver then looks at queues that may hold nothing new, which
§2.7.13 allows for; it never misses one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hostel.abi import virtio as abi
from hostel.errors import HostError
from hostel.hypervisor import Vm
from hostel.memory import GuestMemory

from .device import VirtioDevice
from .transport import QueueSetup, Transport, ring_writer

VERSION = 2
VENDOR = int.from_bytes(b"HSTL", "little")


class VirtioMmio(Transport):
    """A virtio device on the MMIO bus: ``bus.add(address, 0x1000, VirtioMmio(...), device.name)``."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, vm: Vm, *, address: int, gsi: int
    ) -> None:
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._vm = vm
        self._gsi = gsi
        self._notify = address + abi.MMIO_QUEUE_NOTIFY
        self._ioeventfds: list[tuple[int, int]] = []
        super().__init__(device, memory)
        vm.irqfd(gsi, self._call)
        self._listen()

    def _listen(self) -> None:
        for index, queue in enumerate(self.queues):
            try:
                self._vm.ioeventfd(self._notify, 4, queue.kick, match=index)
            except HostError:  # KVM has a limit of them: the write then is an exit
                return
            self._ioeventfds.append((index, queue.kick))

    def _clear(self) -> None:
        super()._clear()
        self._config_pending = False

    def call_fd(self, queue: QueueSetup) -> int:
        return self._call

    def interrupt_config(self) -> None:
        self._config_pending = True
        os.eventfd_write(self._call, 1)

    # -- the guest's accesses -----------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Registers by aligned 32-bit accesses only (§4.2.2.2); anything else reads as zero."""
        with self.lock:
            if offset >= abi.MMIO_CONFIG:
                return self.device.read_config(offset - abi.MMIO_CONFIG, size)
            read = _READS.get(offset) if size == 4 else None
            return (read(self) if read else 0).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        with self.lock:
            if offset >= abi.MMIO_CONFIG:
                self.device.write_config(offset - abi.MMIO_CONFIG, data)
            elif len(data) == 4 and (write := _WRITES.get(offset)) is not None:
                write(self, int.from_bytes(data, "little"))

    def _interrupt_status(self) -> int:
        config = abi.MMIO_INT_CONFIG if self._config_pending else 0
        return config | (abi.MMIO_INT_VRING if self.running else 0)

    def _acknowledge(self, value: int) -> None:
        if value & abi.MMIO_INT_CONFIG:
            self._config_pending = False

    def _write_ready(self, value: int) -> None:
        """0 takes a queue back, which a driver does after reset (§4.2.3.2)."""
        if value == 1:
            self.enable_queue()
        elif self.queue is not None and not self.running:
            self.queue.enabled = False

    # -- life cycle ---------------------------------------------------------------------------

    def close(self) -> None:
        for index, fd in self._ioeventfds:
            self._vm.ioeventfd(self._notify, 4, fd, match=index, assign=False)
        self._ioeventfds = []
        self._vm.irqfd(self._gsi, self._call, assign=False)
        super().close()
        os.close(self._call)

    def save(self) -> dict[str, Any]:
        return {**super().save(), "config_pending": self._config_pending}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._config_pending = state["config_pending"]

    def statistics(self) -> dict[str, Any]:
        return self.device.statistics()


_READS: dict[int, Callable[[VirtioMmio], int]] = {
    abi.MMIO_MAGIC_VALUE: lambda t: abi.MMIO_MAGIC,
    abi.MMIO_VERSION: lambda t: VERSION,
    abi.MMIO_DEVICE_ID: lambda t: t.device.device_id,
    abi.MMIO_VENDOR_ID: lambda t: VENDOR,
    abi.MMIO_DEVICE_FEATURES: lambda t: t.device_features_window,
    abi.MMIO_QUEUE_NUM_MAX: lambda t: t.queue.max_size if t.queue else 0,
    abi.MMIO_QUEUE_READY: lambda t: int(t.queue is not None and t.queue.enabled),
    abi.MMIO_INTERRUPT_STATUS: VirtioMmio._interrupt_status,
    abi.MMIO_STATUS: lambda t: t.status,
    # No shared memory region: a length of all ones (§4.2.2.1).
    abi.MMIO_SHM_LEN_LOW: lambda t: 0xFFFF_FFFF,
    abi.MMIO_SHM_LEN_HIGH: lambda t: 0xFFFF_FFFF,
    abi.MMIO_CONFIG_GENERATION: lambda t: t.generation,
}
_WRITES: dict[int, Callable[[VirtioMmio, int], None]] = {
    abi.MMIO_DEVICE_FEATURES_SEL: Transport.select_device_features,
    abi.MMIO_DRIVER_FEATURES_SEL: Transport.select_driver_features,
    abi.MMIO_DRIVER_FEATURES: Transport.write_driver_features,
    abi.MMIO_QUEUE_SEL: Transport.select_queue,
    abi.MMIO_QUEUE_NUM: VirtioMmio.set_queue_size,
    abi.MMIO_QUEUE_READY: VirtioMmio._write_ready,
    abi.MMIO_QUEUE_NOTIFY: VirtioMmio.notify,
    abi.MMIO_INTERRUPT_ACK: VirtioMmio._acknowledge,
    abi.MMIO_STATUS: Transport.write_status,
    abi.MMIO_QUEUE_DESC_LOW: ring_writer("desc", False),
    abi.MMIO_QUEUE_DESC_HIGH: ring_writer("desc", True),
    abi.MMIO_QUEUE_AVAIL_LOW: ring_writer("avail", False),
    abi.MMIO_QUEUE_AVAIL_HIGH: ring_writer("avail", True),
    abi.MMIO_QUEUE_USED_LOW: ring_writer("used", False),
    abi.MMIO_QUEUE_USED_HIGH: ring_writer("used", True),
}
