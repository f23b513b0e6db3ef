"""The PCI transport (virtio 1.2 §4.1), modern only.

::

    BAR 0   0x0000 common configuration     BAR 1   MSI-X table, pending bits
            0x1000 ISR status                       vector 0 .. n-1: one for each queue,
            0x2000 device configuration             vector n: configuration changes
            0x3000 notifications, 4 bytes a queue   (the driver chooses who uses which)

Neither direction passes through the interpreter once the driver runs: the guest's write to a queue's
notification address signals the queue's kick eventfd inside KVM (ioeventfd; registered again whenever
BAR 0 moves), and a write to a vector's eventfd interrupts the guest (irqfd).

There is no INTx: every driver of modern virtio-pci knows MSI-X. The ISR byte only tells of
configuration changes.
"""

from __future__ import annotations

from collections.abc import Callable
from os import EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, eventfd_write
from typing import Any

from hostel.abi import pci as pci_abi
from hostel.abi import virtio as abi
from hostel.errors import HostError
from hostel.hypervisor import Vm
from hostel.memory import GuestMemory
from hostel.vmm.bus import Device
from hostel.vmm.irq import InterruptTable
from hostel.vmm.msix import MsixTable
from hostel.vmm.pci import PciFunction

from .device import VirtioDevice
from .transport import QueueSetup, Transport, ring_writer

COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
REGION = 0x1000
BAR_SIZE = 0x4000
NOTIFY_STRIDE = 4
REGISTERS_BAR, MSIX_BAR = 0, 1

# PCI Code and ID Assignment 1.11: base class, sub-class, interface.
CLASS_CODES = {
    abi.ID_NET: 0x02_0000,
    abi.ID_BLOCK: 0x01_8000,
    abi.ID_CONSOLE: 0x07_8000,
    abi.ID_FS: 0x01_8000,
}
CLASS_OTHER = 0xFF_0000


class _PciTransport(Transport):
    """Interrupts by MSI-X; and the common configuration's registers, which are not in it."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory, irqs: InterruptTable) -> None:
        self.slots = [irqs.allocate_msi() for _ in range(len(device.queue_sizes) + 1)]
        self.sink = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        """Where interrupts go that have no vector."""
        super().__init__(device, memory)

    def _clear(self) -> None:
        super()._clear()
        self.config_vector = abi.MSI_NO_VECTOR
        self.isr = 0

    def _vector_fd(self, vector: int) -> int:
        return self.slots[vector].eventfd if vector < len(self.slots) else self.sink

    def call_fd(self, queue: QueueSetup) -> int:
        """The vector that the queue has at DRIVER_OK holds until reset: a data plane keeps it."""
        return self._vector_fd(queue.vector)

    def interrupt_config(self) -> None:
        self.isr |= abi.PCI_ISR_CONFIG
        eventfd_write(self._vector_fd(self.config_vector), 1)

    def usable_vector(self, vector: int) -> int:
        """What reads back tells the driver whether it got the vector (§4.1.5.1.2.1)."""
        return vector if vector < len(self.slots) else abi.MSI_NO_VECTOR

    # -- common configuration (§4.1.4.3) ------------------------------------------------------

    def read_common(self) -> bytes:
        queue = self.queue
        registers = QueueSetup(0, -1) if queue is None else queue
        return abi.PCI_COMMON_CFG.pack(
            self.feature_select[0],
            self.device_features_window,
            self.feature_select[1],
            self.driver_features_window,
            self.config_vector,
            len(self.queues),
            self.status,
            self.generation,
            self.queue_select,
            registers.size,
            registers.vector,
            registers.enabled,
            self.queue_select if queue else 0,
            *(
                half
                for ring in (registers.desc, registers.avail, registers.used)
                for half in (ring & 0xFFFF_FFFF, ring >> 32)
            ),
        )

    def write_common(self, offset: int, data: bytes) -> None:
        """By the field's own width, 64-bit ones by halves or whole (§4.1.3.1); else ignored."""
        if len(data) == 8 and offset in _WIDE:
            self.write_common(offset, data[:4])
            self.write_common(offset + 4, data[4:])
        elif (write := _WRITES.get((offset, len(data)))) is not None:
            write(self, int.from_bytes(data, "little"))

    def _write_config_vector(self, value: int) -> None:
        self.config_vector = self.usable_vector(value)

    def _write_queue_vector(self, value: int) -> None:
        if (queue := self.queue_in_setup) is not None:
            queue.vector = self.usable_vector(value)

    def _write_queue_enable(self, value: int) -> None:
        if value == 1:
            self.enable_queue()

    def close(self) -> None:
        super().close()
        close(self.sink)


_AT = abi.PCI_COMMON_CFG.offsets
# (offset, width) → what a write of that field does. Fields that are not here are read-only.
_WRITES: dict[tuple[int, int], Callable[[_PciTransport, int], None]] = {
    (_AT["device_feature_select"], 4): Transport.select_device_features,
    (_AT["guest_feature_select"], 4): Transport.select_driver_features,
    (_AT["guest_feature"], 4): Transport.write_driver_features,
    (_AT["msix_config"], 2): _PciTransport._write_config_vector,
    (_AT["device_status"], 1): Transport.write_status,
    (_AT["queue_select"], 2): Transport.select_queue,
    (_AT["queue_size"], 2): Transport.set_queue_size,
    (_AT["queue_msix_vector"], 2): _PciTransport._write_queue_vector,
    (_AT["queue_enable"], 2): _PciTransport._write_queue_enable,
    (_AT["queue_desc_lo"], 4): ring_writer("desc", False),
    (_AT["queue_desc_hi"], 4): ring_writer("desc", True),
    (_AT["queue_avail_lo"], 4): ring_writer("avail", False),
    (_AT["queue_avail_hi"], 4): ring_writer("avail", True),
    (_AT["queue_used_lo"], 4): ring_writer("used", False),
    (_AT["queue_used_hi"], 4): ring_writer("used", True),
}
_WIDE = {_AT["queue_desc_lo"], _AT["queue_avail_lo"], _AT["queue_used_lo"]}


class _Registers:
    """BAR 0."""

    def __init__(self, transport: _PciTransport) -> None:
        self._transport = transport

    def read(self, offset: int, size: int) -> bytes:
        transport, (region, at) = self._transport, divmod(offset, REGION)
        with transport.lock:
            if region == COMMON // REGION:
                return transport.read_common()[at : at + size].ljust(size, b"\0")
            if region == DEVICE // REGION:
                return transport.device.read_config(at, size)
            if region == ISR // REGION and at == 0:
                isr, transport.isr = transport.isr, 0  # reading clears it (§4.1.4.5)
                return isr.to_bytes(size, "little")
            return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        transport, (region, at) = self._transport, divmod(offset, REGION)
        with transport.lock:
            if region == COMMON // REGION:
                transport.write_common(at, data)
            elif region == DEVICE // REGION:
                transport.device.write_config(at, data)
            elif region == NOTIFY // REGION:
                transport.notify(at // NOTIFY_STRIDE)

    def reset(self) -> None:
        """The function resets all of it."""

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """The function loads all of it."""


class VirtioPci(PciFunction):
    """A virtio device as a PCI function: ``pci_bus.add(VirtioPci(device, memory, vm, irqs))``."""

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, vm: Vm, irqs: InterruptTable
    ) -> None:
        super().__init__(
            device.name,
            ids=(abi.PCI_VENDOR, abi.PCI_DEVICE_BASE + device.device_id),
            class_code=CLASS_CODES.get(device.device_id, CLASS_OTHER),
            revision=1,
            subsystem=(abi.PCI_VENDOR, abi.PCI_DEVICE_BASE + device.device_id),
        )
        self.device = device
        self.transport = _PciTransport(device, memory, irqs)
        self._vm = vm
        self._ioeventfds: list[tuple[int, int]] = []
        bar = self.add_bar(REGISTERS_BAR, BAR_SIZE, _Registers(self.transport))
        bar.on_move = self._moved
        self._msix = MsixTable(self, MSIX_BAR, self.transport.slots)
        notify_size = NOTIFY_STRIDE * len(device.queue_sizes)
        config_size = max(len(device.config), 4)
        self._add_structure(abi.PCI_CAP_COMMON_CFG, COMMON, abi.PCI_COMMON_CFG.size)
        self._add_structure(abi.PCI_CAP_ISR_CFG, ISR, 1)
        self._add_structure(abi.PCI_CAP_DEVICE_CFG, DEVICE, config_size)
        stride = NOTIFY_STRIDE.to_bytes(4, "little")
        self._add_structure(abi.PCI_CAP_NOTIFY_CFG, NOTIFY, notify_size, stride)
        self._window = self._add_window()

    def _add_structure(self, kind: int, offset: int, size: int, more: bytes = b"") -> None:
        length = abi.PCI_CAP.size + len(more)
        body = abi.PCI_CAP.pack(0, 0, length, kind, REGISTERS_BAR, 0, b"", offset, size) + more
        self.add_capability(pci_abi.CAP_ID_VNDR, body[2:])

    # -- notifications ------------------------------------------------------------------------

    def _moved(self, before: int | None, after: int | None) -> None:
        for address, fd in self._ioeventfds:
            self._vm.ioeventfd(address, 0, fd, assign=False)
        self._ioeventfds = []
        for index, queue in enumerate(self.transport.queues if after is not None else ()):
            address = (after or 0) + NOTIFY + NOTIFY_STRIDE * index
            try:
                self._vm.ioeventfd(address, 0, queue.kick)
            except HostError:
                # KVM has a limit of them, or the guest chose an address that KVM refuses. The write
                # then is an exit, and ``notify`` does the same.
                return
            self._ioeventfds.append((address, queue.kick))

    # -- configuration space ------------------------------------------------------------------

    def _add_window(self) -> int:
        """§4.1.4.9: a window on the BARs for who cannot map them. The driver writes where to look."""
        head = abi.PCI_CAP.pack(0, 0, abi.PCI_CAP.size + 4, abi.PCI_CAP_PCI_CFG, 0, 0, b"", 0, 0)
        mask = abi.PCI_CAP.pack(0, 0, 0, 0, 0xFF, 0, b"", 0xFFFF_FFFF, 0xFFFF_FFFF) + b"\xff" * 4
        return self.add_capability(pci_abi.CAP_ID_VNDR, head[2:] + bytes(4), mask[2:])

    def read_config(self, offset: int, size: int) -> bytes:
        data = self._window + abi.PCI_CAP.size
        if offset < data + 4 and data < offset + size and (target := self._target()):
            device, at, length = target
            self.config[data : data + length] = device.read(at, length)
        return super().read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        super().write_config(offset, data)
        if self._msix.touches(offset, len(data)):
            self._msix.update()
        start = self._window + abi.PCI_CAP.size
        if offset < start + 4 and self._window < offset + len(data):
            self.reads_exit()  # the window is in use: what a read of it gives is not in memory
        if offset < start + 4 and start < offset + len(data) and (target := self._target()):
            device, at, length = target
            device.write(at, bytes(self.config[start : start + length]))

    def _target(self) -> tuple[Device, int, int] | None:
        """Where the window looks, if the driver filled it in as it has to (§4.1.4.9.1)."""
        fields = abi.PCI_CAP.unpack_from(self.config, self._window)
        bar, offset, length = self.bars.get(fields[4]), fields[7], fields[8]
        if bar is None or length not in (1, 2, 4) or offset % length:
            return None
        return (bar.device, offset, length) if offset + length <= bar.size else None

    # -- life cycle ---------------------------------------------------------------------------

    def reset(self) -> None:
        self.transport.reset()
        super().reset()
        self._msix.reset()

    def close(self) -> None:
        super().close()
        self.transport.close()
        self._msix.close()

    def save(self) -> dict[str, Any]:
        return {
            **super().save(),
            "msix": self._msix.save(),
            "transport": self.transport.save(),
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._msix.load(state["msix"])
        self.transport.load(state["transport"])

    def statistics(self) -> dict[str, Any]:
        return self.device.statistics()
