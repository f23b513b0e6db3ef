"""The vhost plane of a NIC: frames go between the guest's rings and a tap inside the host's kernel.

::

    driver ─ kick (ioeventfd) ──► vhost worker ── frames ──► tap ─► bridge ─► wire
    driver ◄ call (irqfd) ──────  vhost worker ◄─ frames ──  tap ◄─ bridge ◄─ wire
                                  one descriptor of /dev/vhost-net and one of the tap a pair

This process sets it up and is not on the path. A pair runs while its rings have the tap as their
backend; without one the worker does nothing. So do ``set_pairs``, ``set_link`` and ``stop`` work.

What a driver can get wrong in a ring reaches us as the ring's error eventfd, which tells no more. MAC and
VLAN filters are nobody's here: the guest gets all that the tap gets, and drops the rest itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hostel.abi import vhost as vhost_abi
from hostel.abi import virtio_net as abi
from hostel.errors import HostelError, HostError, QueueError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import RING_FEATURES, QueueWiring
from .net_plane import Filter, unheard
from .net_port import NetPort
from .vhost import Vhost, forget

DEVICE = "/dev/vhost-net"
RX, TX = 0, 1


class Pair:
    """A receive and a transmit queue: one vhost descriptor on one queue of the tap. Owns both."""

    def __init__(self, port: NetPort) -> None:
        self.port = port
        self.running = False
        self.wirings: dict[int, QueueWiring] = {}
        self.errors = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in (RX, TX)]
        self.vhost: Vhost | None = None

    def open(self) -> Vhost:
        self.vhost = Vhost(DEVICE)
        self.vhost.set_owner()
        return self.vhost

    def close(self) -> None:
        if self.vhost is not None:
            self.vhost.close()
        self.port.close()
        for fd in self.errors:
            os.close(fd)

    def set_up(
        self, memory: GuestMemory, features: int, rings: Sequence[tuple[QueueWiring, int]]
    ) -> None:
        """``rings``: each with its next available index."""
        assert self.vhost is not None
        self.vhost.set_features(features)
        self.vhost.set_mem_table(memory)
        for ring, (wiring, base) in enumerate(rings):
            self.vhost.start_ring(ring, memory, wiring, base=base, err=self.errors[ring])
            self.wirings[ring] = wiring

    def run(self, on: bool) -> None:
        """When it has stopped the worker is done with both rings."""
        if self.vhost is None or on == self.running or not self.wirings:
            return
        self.running = on
        for ring in (RX, TX):
            self.vhost.net_set_backend(ring, self.port.fd if on else vhost_abi.FILE_UNBIND)

    def tear_down(self, memory: GuestMemory) -> dict[int, tuple[int, int]]:
        """Where the rings stand, by the queue's index."""
        assert self.vhost is not None
        positions = {
            wiring.index: self.vhost.stop_ring(ring, memory, wiring)
            for ring, wiring in self.wirings.items()
        }
        self.wirings = {}
        return positions


class VhostPlane:
    """On the queues of one tap or macvtap, opened with headers; they belong to the plane from now on."""

    def __init__(self, loop: EventLoop, ports: Sequence[NetPort]) -> None:
        self.on_fault: Callable[[HostelError], None] = unheard
        self.max_pairs = len(ports)
        self._loop = loop
        self._memory: GuestMemory | None = None
        self._wirings: Sequence[QueueWiring] = ()
        self._enabled = 1
        self._link = True
        self._pairs = [Pair(port) for port in ports]
        try:
            for pair in self._pairs:
                self._offered = pair.open().get_features()  # the kernel's, always the same
        except HostError:
            self.close()
            raise
        self.features = ports[0].features | self._offered & 1 << abi.F_MRG_RXBUF
        self.without = RING_FEATURES & ~self._offered

    def prepare(self) -> None:
        """There is nobody to meet: the kernel has answered already."""

    # -- life cycle ---------------------------------------------------------------------------

    def start(
        self,
        memory: GuestMemory,
        features: int,
        wirings: Sequence[QueueWiring],
        positions: Sequence[tuple[int, int]],
        pairs: int,
    ) -> None:
        self._memory, self._wirings, self._enabled = memory, wirings, pairs
        rings = {w.index: (w, base) for w, (base, _) in zip(wirings, positions, strict=True)}
        for number, pair in enumerate(self._pairs):
            for ring, fd in enumerate(pair.errors):
                self._loop.add(fd, partial(self._broken, fd, 2 * number + ring))
        try:
            for number, pair in enumerate(self._pairs):
                own = [rings[at] for at in (2 * number, 2 * number + 1) if at in rings]
                if len(own) == 2:  # a driver may leave queues out (§5.1.2)
                    pair.set_up(memory, features & self._offered, own)
            self._update()
        except HostelError:
            self.stop()
            raise

    def stop(self) -> list[tuple[int, int]]:
        if self._memory is None:
            return []
        positions: dict[int, tuple[int, int]] = {}
        for pair in self._pairs:
            pair.run(False)
            positions |= pair.tear_down(self._memory)
            for fd in pair.errors:
                self._loop.remove(fd)
                forget(fd)  # what nobody has read yet is not the next driver's
        stopped = [positions.get(wiring.index, (0, 0)) for wiring in self._wirings]
        self._memory, self._wirings = None, ()
        return stopped

    def close(self) -> None:
        self.stop()
        for pair in self._pairs:
            pair.close()
        self._pairs = []

    # -- what the device wants ----------------------------------------------------------------

    def set_pairs(self, pairs: int) -> None:
        self._enabled = pairs
        self._try_update()

    def set_link(self, up: bool) -> None:
        self._link = up
        self._try_update()

    def set_filter(self, filter: Filter) -> None:
        """See the module."""

    def set_offloads(self, offloads: int) -> None:
        """They are the whole tap's; its first queue is always attached."""
        self._pairs[0].port.set_offloads(offloads)

    def _try_update(self) -> None:
        try:
            self._update()
        except HostError as error:
            self.on_fault(error)

    def _update(self) -> None:
        """Run what is to run. A queue that is not in use is detached, else the tap steers frames to it;
        but only while its ring does not run: the worker refuses a queue without a tap."""
        for number, pair in enumerate(self._pairs):
            enabled = number < self._enabled
            if enabled:
                pair.port.attach(True)
                pair.run(self._link and self._memory is not None)
            else:
                pair.run(False)
                pair.port.attach(False)

    def _broken(self, fd: int, index: int) -> None:
        if not forget(fd):
            return  # stopped meanwhile
        kind = "transmit" if index % 2 else "receive"
        self.on_fault(
            QueueError(
                f"the host kernel's vhost gave up {kind} queue {index // 2}: its descriptors break"
                " the rules or lead outside guest memory"
            )
        )

    def statistics(self) -> dict[str, Any]:
        return {"plane": "vhost", "running": sum(pair.running for pair in self._pairs)}
