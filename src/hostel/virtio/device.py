"""What a virtio device is, whatever its transport (PCI, MMIO) and its data plane.

::

    transport ── activate(memory, features, queues) ──► device ──► data plane
              ◄─ config_changed(), needs_reset() ─────

Contract of the life cycle, from the transport's side:

* ``prepare`` is called before the driver looks at the features.
* ``activate`` is called once the driver set DRIVER_OK, with the queues that it enabled, and again
  only after ``reset``.
* When ``reset`` returns, no thread and no helper process touches guest memory for this device.
* ``config_changed`` and ``needs_reset`` may be called from any thread, with the device's locks held;
  they take no lock and do not block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hostel.abi import virtio as abi
from hostel.errors import HostelError
from hostel.memory import GuestMemory

RING_FEATURES = 1 << abi.RING_F_INDIRECT_DESC | 1 << abi.RING_F_EVENT_IDX
"""What ``queue.Queue`` can do."""


class QueueWiring(msgspec.Struct, frozen=True):
    """Everything a data plane needs of one queue, in this process or in another.

    ``desc``, ``avail`` and ``used`` are guest addresses that nobody has checked yet. The eventfds
    belong to the transport and outlive the activation.
    """

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick: int
    """Readable when the guest notified (an ioeventfd writes it)."""
    call: int
    """Write 1 to interrupt the guest (an irqfd reads it)."""


def _nothing() -> None:
    pass


def _unheard(device: VirtioDevice, error: HostelError) -> None:
    pass


class VirtioDevice:
    """A device with a read-only config space in ``config``."""

    device_id: int
    name: str
    """Unique in its machine: it names the device in statistics and errors."""
    features = 1 << abi.F_VERSION_1 | RING_FEATURES
    queue_sizes: tuple[int, ...]
    config = b""

    def __init__(self) -> None:
        self.config_changed: Callable[[], None] = _nothing
        self.needs_reset: Callable[[], None] = _nothing
        self.on_fault: Callable[[VirtioDevice, HostelError], None] = _unheard
        """Set by the monitor, to hear of a device that stopped."""
        self.fault: HostelError | None = None
        """Why the device stopped until its next reset."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Bytes behind the end read as zero."""
        return self.config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Most devices have nothing to write."""

    def prepare(self) -> None:
        """A driver was found (status DRIVER): the last moment to settle ``features`` and ``config``."""

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back. Reset comes first."""

    def save(self) -> dict[str, Any]:
        """Plain data, while the vCPUs are paused."""
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        """Before ``activate``, which goes on from here."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        return {"fault": str(self.fault) if self.fault else ""}

    def fail(self, error: HostelError) -> None:
        """The device cannot go on: DEVICE_NEEDS_RESET (§2.1.2). The machine lives."""
        self.fault = error
        self.on_fault(self, error)  # first: who sees the guest react may ask why
        self.needs_reset()
