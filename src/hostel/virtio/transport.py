"""What the PCI and the MMIO transport share: status, features, queue set-up, activation, reset.

::

    0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK          (virtio 1.2 §3.1.1)
    ▲                              checks the     hands the queues
    └── write 0: reset, from any   features       to the device
        state; synchronous

``LADDER`` is that picture as a table. A transport is a set of registers over this class, and says
where interrupts go (``call_fd``, ``interrupt_config``). Only modern devices: a driver that does not
take VERSION_1 gets no FEATURES_OK.

The registers belong to ``lock``: a vCPU may come through a BAR, another one through PCI config space.
The device's two callbacks take no lock (see ``device.py``).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from hostel.abi import virtio as abi
from hostel.errors import HostelError
from hostel.memory import GuestMemory

from .device import QueueWiring, VirtioDevice

ACKNOWLEDGE = abi.CONFIG_S_ACKNOWLEDGE
DRIVER = abi.CONFIG_S_DRIVER
FEATURES_OK = abi.CONFIG_S_FEATURES_OK
DRIVER_OK = abi.CONFIG_S_DRIVER_OK
NEEDS_RESET = abi.CONFIG_S_NEEDS_RESET
FAILED = abi.CONFIG_S_FAILED


class QueueSetup(msgspec.Struct):
    """One queue's registers."""

    max_size: int
    kick: int
    size: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    vector: int = abi.MSI_NO_VECTOR
    enabled: bool = False

    def reset(self) -> None:
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.vector = abi.MSI_NO_VECTOR
        self.enabled = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.kick)


class Transport:
    """The registers' meaning. ``call_fd`` and ``interrupt_config`` are the subclass's."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory) -> None:
        self.device = device
        self.memory = memory
        self.lock = threading.RLock()
        self.queues = [
            QueueSetup(size, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            for size in device.queue_sizes
        ]
        self.generation = 0
        self._met_at = 0
        """The generation when the driver came: it knows of no earlier one."""
        self._clear()
        device.config_changed = self._config_changed
        device.needs_reset = self._needs_reset

    def call_fd(self, queue: QueueSetup) -> int:
        raise NotImplementedError

    def interrupt_config(self) -> None:
        """Tell the driver that the config space or DEVICE_NEEDS_RESET changed."""
        raise NotImplementedError

    def _clear(self) -> None:
        self._status = 0
        self._broken = False
        self.driver_features = 0
        self.feature_select = [0, 0]
        """Which 32 bits are seen: of the device's features, of the driver's."""
        self.queue_select = 0
        for queue in self.queues:
            queue.reset()

    # -- status -------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return self._status | (NEEDS_RESET if self._broken else 0)

    def write_status(self, value: int) -> None:
        if not value:
            self.reset()
            return
        for bit, needed, step in LADDER:
            if value & bit & ~self._status and self._status & needed == needed:
                step(self, bit)

    @property
    def running(self) -> bool:
        return bool(self._status & DRIVER_OK)

    def reset(self) -> None:
        """Synchronous: when it returns the data plane is quiet (§2.4.1)."""
        with self.lock:
            if self.running:
                self.device.reset()
            self._clear()

    def _advance(self, bit: int) -> None:
        self._status |= bit

    def _meet(self, bit: int) -> None:
        self._status |= bit
        try:
            self.device.prepare()
        except HostelError as error:
            self.device.fail(error)
        self._met_at = self.generation

    def _accept_features(self, bit: int) -> None:
        """§3.1.1 step 5: the bit stays 0 unless we can work with what the driver chose."""
        chosen = self.driver_features
        if chosen & ~self.device.features == 0 and chosen >> abi.F_VERSION_1 & 1:
            self._status |= bit

    def _start(self, bit: int) -> None:
        self._status |= bit
        try:
            self.device.activate(self.memory, self.driver_features, self._wirings())
        except HostelError as error:
            self.device.fail(error)
        if self.generation != self._met_at:  # it may have read what was there before
            self.interrupt_config()

    def _wirings(self) -> list[QueueWiring]:
        return [
            QueueWiring(
                index,
                queue.size,
                queue.desc,
                queue.avail,
                queue.used,
                queue.kick,
                self.call_fd(queue),
            )
            for index, queue in enumerate(self.queues)
            if queue.enabled
        ]

    # -- from the device, on any thread -------------------------------------------------------

    def _config_changed(self) -> None:
        """No notification before DRIVER_OK (§2.5.1); ``_start`` makes up for it."""
        self.generation = (self.generation + 1) & 0xFF
        if self.running:
            self.interrupt_config()

    def _needs_reset(self) -> None:
        self._broken = True
        if self.running:
            self.interrupt_config()

    # -- registers ----------------------------------------------------------------------------

    @property
    def device_features_window(self) -> int:
        return _window(self.device.features, self.feature_select[0])

    @property
    def driver_features_window(self) -> int:
        return _window(self.driver_features, self.feature_select[1])

    def select_device_features(self, value: int) -> None:
        self.feature_select[0] = value

    def select_driver_features(self, value: int) -> None:
        self.feature_select[1] = value

    def write_driver_features(self, value: int) -> None:
        """Frozen once FEATURES_OK is set (§3.1.1 step 5); there are 64 bits."""
        select = self.feature_select[1]
        if select < 2 and not self._status & FEATURES_OK:
            kept = self.driver_features & ~(0xFFFF_FFFF << 32 * select)
            self.driver_features = kept | value << 32 * select

    @property
    def queue(self) -> QueueSetup | None:
        """The queue that queue_select names, if there is one."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    @property
    def queue_in_setup(self) -> QueueSetup | None:
        """The same while its registers may be written: before it is enabled and DRIVER_OK."""
        queue = self.queue
        return None if queue is None or queue.enabled or self.running else queue

    def select_queue(self, value: int) -> None:
        self.queue_select = value

    def set_queue_size(self, value: int) -> None:
        """At most what we offered. That it is a power of two is looked at on activation."""
        queue = self.queue_in_setup
        if queue is not None and 0 < value <= queue.max_size:
            queue.size = value

    def set_ring_address(self, ring: str, high: bool, value: int) -> None:
        """Half of the address of ``desc``, ``avail`` or ``used``."""
        queue = self.queue_in_setup
        if queue is not None:
            shift = 32 if high else 0
            kept = getattr(queue, ring) & ~(0xFFFF_FFFF << shift)
            setattr(queue, ring, kept | value << shift)

    def enable_queue(self) -> None:
        if (queue := self.queue_in_setup) is not None:
            queue.enabled = True

    def notify(self, index: int) -> None:
        """A notification that came as an exit, where the ioeventfd did not take it."""
        if index < len(self.queues):
            os.eventfd_write(self.queues[index].kick, 1)

    # -- life cycle ---------------------------------------------------------------------------

    def close(self) -> None:
        self.reset()
        self.device.close()
        for queue in self.queues:
            os.close(queue.kick)
        self.queues = []

    def save(self) -> dict[str, Any]:
        with self.lock:
            return {
                "status": self._status,
                "broken": self._broken,
                "generation": self.generation,
                "driver_features": self.driver_features,
                "feature_select": list(self.feature_select),
                "queue_select": self.queue_select,
                "queues": [
                    [q.size, q.desc, q.avail, q.used, q.vector, q.enabled] for q in self.queues
                ],
                "device": self.device.save(),
            }

    def load(self, state: dict[str, Any]) -> None:
        """Into a transport after reset; starts the device if it ran."""
        with self.lock:
            self.reset()
            self.generation = state["generation"]
            self.driver_features = state["driver_features"]
            self.feature_select = list(state["feature_select"])
            self.queue_select = state["queue_select"]
            for queue, saved in zip(self.queues, state["queues"], strict=True):
                queue.size, queue.desc, queue.avail, queue.used = saved[:4]
                queue.vector, queue.enabled = saved[4:]
            self.device.load(state["device"])
            self._status = state["status"]
            self._broken = state["broken"]
            if self.running and not self._broken:
                self._meet(DRIVER)
                self._start(DRIVER_OK)


Step = Callable[[Transport, int], None]
# A bit of the status, the bits that have to be there already, and what setting it does. A bit out of
# turn stays 0, and so does everything above it; no bit is ever cleared but by reset.
LADDER: tuple[tuple[int, int, Step], ...] = (
    (ACKNOWLEDGE, 0, Transport._advance),
    (DRIVER, ACKNOWLEDGE, Transport._meet),
    (FEATURES_OK, DRIVER, Transport._accept_features),
    (DRIVER_OK, FEATURES_OK, Transport._start),
    (FAILED, 0, Transport._advance),
)


def ring_writer(ring: str, high: bool) -> Callable[[Transport, int], None]:
    """What writing one of the six address registers does."""
    return lambda transport, value: transport.set_ring_address(ring, high, value)


def _window(features: int, select: int) -> int:
    return features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
