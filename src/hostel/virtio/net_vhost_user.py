"""The vhost-user plane of a NIC: another process moves its frames, a switch or a user-space network stack.

::

    VhostUserPlane ── Frontend ── Unix socket: memory, rings, eventfds ──► OVS, DPDK, VPP, passt …
    driver ══ rings, kick, call ═════════════════════════════════════════► the same

After the set-up this process is not on the path. A queue of the backend is enabled or not: so do
``set_pairs`` and ``set_link`` work. The protocol has no message for filters and offloads while it runs.

A backend that hangs up ends the NIC until its driver starts anew; then we connect anew, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.abi import virtio_net as net
from hostel.errors import HelperError, HostelError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import RING_FEATURES, QueueWiring
from .net_plane import Filter, unheard
from .queue import check_rings
from .vhost_user import Frontend, connect

_OFFLOADS = (
    *(net.F_CSUM, net.F_HOST_TSO4, net.F_HOST_TSO6, net.F_HOST_ECN, net.F_HOST_UFO),
    *(net.F_GUEST_CSUM, net.F_GUEST_TSO4, net.F_GUEST_TSO6, net.F_GUEST_ECN, net.F_GUEST_UFO),
    net.F_MRG_RXBUF,
)
KNOWN = sum(1 << bit for bit in _OFFLOADS)
_PROTOCOL = (
    abi.PROTOCOL_F_MQ,
    abi.PROTOCOL_F_RARP,
    abi.PROTOCOL_F_REPLY_ACK,
    abi.PROTOCOL_F_NET_MTU,
    abi.PROTOCOL_F_STATUS,
)
_STARTED = (
    virtio.CONFIG_S_ACKNOWLEDGE
    | virtio.CONFIG_S_DRIVER
    | virtio.CONFIG_S_FEATURES_OK
    | virtio.CONFIG_S_DRIVER_OK
)


class VhostUserPlane:
    """``path`` is the socket that the backend listens on. ``mtu`` 0: it is not told."""

    def __init__(
        self, loop: EventLoop, path: str | os.PathLike[str], *, name: str, mtu: int = 0
    ) -> None:
        self.on_fault: Callable[[HostelError], None] = unheard
        self.features = self.without = 0
        self.max_pairs = 1
        self._loop = loop
        self._path = path
        self._name = name
        self._mtu = mtu
        self._offered = 0
        self._met = self._lost = False
        self._memory: GuestMemory | None = None
        self._wirings: Sequence[QueueWiring] = ()
        self._enabled: set[int] = set()
        self._pairs = 1
        self._link = True
        self._mac = bytes(6)
        self._frontend: Frontend | None = None
        self._connect()

    def _connect(self) -> Frontend:
        sock = connect(self._path, f"{self._name}: the vhost-user backend")
        self._frontend = Frontend(sock, self._name)
        self._loop.add(self._frontend.fileno(), self._hung_up, read=False)
        self._met = self._lost = False
        return self._frontend

    def _disconnect(self) -> None:
        if self._frontend is not None:
            self._loop.remove(self._frontend.fileno())
            self._frontend.close()
            self._frontend = None

    def _hung_up(self) -> None:
        """On the event loop, while others may use the connection. The device answers with ``stop``."""
        frontend = self._frontend
        if frontend is None:
            return
        self._lost = True
        self._loop.remove(frontend.fileno())
        self.on_fault(HelperError(f"{self._name}: the vhost-user backend hung up"))

    # -- life cycle ---------------------------------------------------------------------------

    def prepare(self) -> None:
        if self._lost:
            self._disconnect()
        if self._frontend is not None and self._met:
            return
        try:
            self._meet(self._frontend or self._connect())
        except HelperError:
            self._disconnect()
            raise

    def _meet(self, frontend: Frontend) -> None:
        self._offered = frontend.shake_hands(*_PROTOCOL)
        # Of a NIC a backend counts pairs, other than of any other device: so does QEMU.
        self.max_pairs = frontend.get_queue_num() if frontend.has(abi.PROTOCOL_F_MQ) else 1
        if self._mtu and frontend.has(abi.PROTOCOL_F_NET_MTU):
            frontend.net_set_mtu(self._mtu)
        self.features = self._offered & KNOWN
        self.without = RING_FEATURES & ~self._offered
        self._met = True

    def start(
        self,
        memory: GuestMemory,
        features: int,
        wirings: Sequence[QueueWiring],
        positions: Sequence[tuple[int, int]],
        pairs: int,
    ) -> None:
        frontend = self._require()
        for wiring in wirings:
            check_rings(memory, wiring.size, wiring.desc, wiring.avail, wiring.used)
        self._memory, self._wirings, self._pairs = memory, wirings, pairs
        try:
            frontend.set_features(features & self._offered | 1 << abi.F_PROTOCOL_FEATURES)
            frontend.set_mem_table(memory)
            for wiring, (base, _) in zip(wirings, positions, strict=True):
                frontend.start_ring(memory, wiring, base)
            self._enable()
            if frontend.has(abi.PROTOCOL_F_STATUS):
                frontend.set_status(_STARTED)
            if any(base for base, _ in positions) and not features >> net.F_GUEST_ANNOUNCE & 1:
                self._announce(frontend)
        except HelperError:
            self.stop()
            raise

    def _announce(self, frontend: Frontend) -> None:
        """It went on from a saved state, perhaps elsewhere, and its driver cannot say so."""
        if frontend.has(abi.PROTOCOL_F_RARP):
            frontend.send_rarp(self._mac)

    def stop(self) -> list[tuple[int, int]]:
        """A backend that is cut off may still finish what it has begun; see ``VhostUserDevice``."""
        if self._memory is None:
            return []
        bases = self._stop_rings()
        used = [self._memory.read_u16(wiring.used + 2) for wiring in self._wirings]
        self._memory, self._wirings = None, ()
        self._enabled.clear()
        return list(zip(bases or used, used, strict=True))

    def _stop_rings(self) -> list[int]:
        """The next available indexes; nothing if the backend is gone."""
        frontend = self._frontend
        if frontend is None:
            return []
        try:
            bases = [frontend.get_vring_base(wiring.index) for wiring in self._wirings]
            if frontend.has(abi.PROTOCOL_F_STATUS):
                frontend.set_status(0)
        except HelperError as error:
            self._disconnect()
            self.on_fault(error)
            return []
        return bases

    def close(self) -> None:
        self.stop()
        self._disconnect()

    # -- what the device wants ----------------------------------------------------------------

    def set_pairs(self, pairs: int) -> None:
        self._pairs = pairs
        self._try_enable()

    def set_link(self, up: bool) -> None:
        self._link = up
        self._try_enable()

    def set_filter(self, filter: Filter) -> None:
        """The backend passes what it likes; of the filter it may be told the address."""
        self._mac = filter.mac

    def set_offloads(self, offloads: int) -> None:
        """CTRL_GUEST_OFFLOADS is not offered: they are what was negotiated."""

    def _try_enable(self) -> None:
        try:
            self._enable()
        except HelperError as error:
            self.on_fault(error)

    def _enable(self) -> None:
        for wiring in self._wirings:
            wanted = self._link and wiring.index < 2 * self._pairs
            if wanted != (wiring.index in self._enabled):
                self._require().set_vring_enable(wiring.index, wanted)
                self._enabled ^= {wiring.index}

    def _require(self) -> Frontend:
        if self._frontend is None or not self._met:
            raise HelperError(f"{self._name}: the vhost-user backend is gone")
        return self._frontend

    def statistics(self) -> dict[str, Any]:
        return {"plane": "vhost-user", "running": len(self._enabled) // 2}
