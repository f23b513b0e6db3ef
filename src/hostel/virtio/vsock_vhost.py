"""Sockets between guest and host, served by the kernel (virtio 1.2 §5.10 on vhost-vsock).

::

    rx, tx queue ──► the kernel's worker ──► AF_VSOCK sockets of the host, at CID 2
    event queue  ──► here: after a restored snapshot the guest hears that its connections are gone

A guest's address is unique on the host, and belongs to an open ``/dev/vhost-vsock`` until that is
closed: ``claim`` takes the first that is free. Closing it also ends the guest's connections.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from hostel.abi import virtio as abi
from hostel.errors import HostError, QueueError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import RING_FEATURES, QueueWiring
from .plane import QueueDevice, ServedQueue
from .queue import fill
from .vhost import Vhost, forget

DEVICE = "/dev/vhost-vsock"
RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 256
EVENT_QUEUE_SIZE = 16
FIRST_CID = 3
LAST_CID = 1 << 16

KNOWN = 1 << abi.F_VERSION_1 | RING_FEATURES | 1 << abi.VSOCK_F_SEQPACKET
"""Of what the kernel offers. It has no bit for streams: they are what a socket device is without one."""


def claim(first: int = FIRST_CID) -> tuple[Vhost, int]:
    """A descriptor, and the address that is its from now on."""
    vhost = Vhost(DEVICE)
    try:
        return vhost, _take_cid(vhost, first)
    except HostError:
        vhost.close()
        raise


def _take_cid(vhost: Vhost, first: int) -> int:
    for cid in range(first, LAST_CID):
        try:
            vhost.vsock_set_guest_cid(cid)
        except HostError as error:
            if not _is_taken(error):
                raise
        else:
            return cid
    raise HostError("no vsock address is free on this host", cure="end some machines")


def _is_taken(error: HostError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE


class VhostVsock(QueueDevice):
    """``vhost`` is the device's from now on, and ``cid`` its address."""

    device_id = abi.ID_VSOCK
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE)

    def __init__(self, loop: EventLoop, vhost: Vhost, cid: int, *, name: str = "vsock") -> None:
        super().__init__(loop)
        self.name = name
        self.cid = cid
        self.config = abi.VSOCK_CONFIG.pack(cid)
        self._vhost = vhost
        self._error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """The kernel signals it when a ring breaks the rules."""
        self._memory: GuestMemory | None = None
        self._rings: list[QueueWiring] = []
        self._restored = False
        vhost.set_owner()
        self.features = vhost.get_features() & KNOWN
        loop.add(self._error, self._on_error)

    def serve(self, queue: ServedQueue) -> None:
        """§5.10.6.7: the driver ends its connections and reads its address anew."""
        if self._restored and (chain := queue.pop()) is not None:
            self._restored = False
            event = abi.VSOCK_EVENT.pack(abi.VSOCK_EVENT_TRANSPORT_RESET)
            queue.push(chain, fill(chain.writable, event))
            queue.interrupt()

    # -- life cycle ---------------------------------------------------------------------------

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        with self.lock:
            rings = [wiring for wiring in queues if wiring.index != EVENT]
            if len(rings) != EVENT:
                raise QueueError("a socket device without its receive or its transmit queue")
            bases = dict(self._positions)
            super().activate(memory, features, [one for one in queues if one.index == EVENT])
            self._memory = memory
            self._vhost.set_features(features)
            self._vhost.set_mem_table(memory)
            for wiring in rings:
                base = bases.get(wiring.index, (0, 0))[0]
                self._rings.append(wiring)
                self._vhost.start_ring(wiring.index, memory, wiring, base=base, err=self._error)
            self._vhost.vsock_set_running(True)

    def reset(self) -> None:
        with self.lock:
            self._stop_rings()
            super().reset()

    def close(self) -> None:
        self.reset()
        with self.lock:
            self.loop.remove(self._error)
            os.close(self._error)
            self._vhost.close()

    def save(self) -> dict[str, Any]:
        """The kernel's worker rests while its positions are read."""
        with self.lock:
            state = super().save()
            if self._memory is not None:
                self._vhost.vsock_set_running(False)
                for ring in self._rings:
                    base = self._vhost.get_vring_base(ring.index)
                    used = self._memory.read_u16(ring.used + 2)
                    state["queues"].append([ring.index, base, used])
                self._vhost.vsock_set_running(True)
            return state

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._restored = True

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "cid": self.cid, "plane": "vhost"}

    def _stop_rings(self) -> None:
        """When it returns the kernel does not touch guest memory."""
        if self._memory is not None:
            self._vhost.vsock_set_running(False)
            for ring in self._rings:
                self._vhost.stop_ring(ring.index, self._memory, ring)
            forget(self._error)  # what nobody has read yet is not the next driver's
        self._memory, self._rings = None, []

    def _on_error(self) -> None:
        with self.lock:
            if forget(self._error) and self._memory is not None:
                self._stop_rings()
                self.broken(QueueError("the kernel found a broken ring"))
