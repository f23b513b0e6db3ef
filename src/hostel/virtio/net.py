"""A NIC (virtio 1.2 §5.1): config space, features and the control queue. Frames are a plane's work.

::

    driver ── control queue ─► event loop ─► Control ─► filter, pairs, offloads ─┐
           ◄─ config change ── set_link, announce                                ▼
           ══ receive and transmit queues ════════════════════════════════► NetPlane

Everything that the guest sees of the device is here and the same for each plane (``net_plane.py``); a plane
adds the offloads that it can do. ``lock`` is held around each call into the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from hostel.abi import virtio
from hostel.abi import virtio_net as abi
from hostel.errors import HostelError, HostError, QueueError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import QueueWiring
from .net_control import Control
from .net_plane import Filter, NetPlane
from .plane import QueueDevice, ServedQueue
from .queue import Chain, take

QUEUE_SIZE = 256
CONTROL_QUEUE_SIZE = 64
COMMAND_SIZE = 64 << 10
"""The longest command that is looked at; a table of 1,000 addresses has 6 KiB."""

OWN_FEATURES = (
    *(abi.F_MAC, abi.F_STATUS, abi.F_CTRL_VQ, abi.F_CTRL_RX, abi.F_CTRL_RX_EXTRA),
    *(abi.F_CTRL_VLAN, abi.F_CTRL_MAC_ADDR, abi.F_GUEST_ANNOUNCE),
)


class Net(QueueDevice):
    """Owns its plane. ``mtu`` 0: none is told; ``pairs``: of queues, all of which the plane must have."""

    device_id = virtio.ID_NET

    def __init__(
        self,
        loop: EventLoop,
        plane: NetPlane,
        *,
        mac: bytes,
        name: str = "net0",
        mtu: int = 0,
        pairs: int = 1,
    ) -> None:
        super().__init__(loop)
        self.name = name
        self.plane = plane
        self.queue_sizes = (QUEUE_SIZE,) * (2 * pairs) + (CONTROL_QUEUE_SIZE,)
        self.link_up = True
        self._mac, self._mtu, self._pairs = mac, mtu, pairs
        self._announcing = False
        self._active: tuple[GuestMemory, Sequence[QueueWiring]] | None = None
        self._control = Control(mac, 0, pairs)
        self._epoch = 0
        self._offer()

    def prepare(self) -> None:
        with self.lock:
            self.plane.prepare()
            if self.plane.max_pairs < self._pairs:
                raise HostError(
                    f"{self.name}: its backend has {self.plane.max_pairs} pairs of queues,"
                    f" not {self._pairs}",
                    cost="the NIC does not work",
                    cure="ask for fewer queues",
                )
            self._offer()

    def _offer(self) -> None:
        bits = list(OWN_FEATURES)
        if self._mtu:
            bits.append(abi.F_MTU)
        if self._pairs > 1:
            bits.append(abi.F_MQ)
        own = sum(1 << bit for bit in bits)
        self.features = (QueueDevice.features | own | self.plane.features) & ~self.plane.without
        self._describe()

    def _describe(self) -> None:
        """The config space (§5.1.4); fields of features that we do not offer stay 0."""
        status = self.link_up * abi.S_LINK_UP | self._announcing * abi.S_ANNOUNCE
        mac = self._control.filter.mac
        self.config = abi.CONFIG.pack(mac, status, self._pairs, self._mtu, *(0,) * 5)

    # -- life cycle -----------------------------------------------------------------------------

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        """§5.1.2: the control queue comes after all pairs, or after the first one without MQ."""
        pairs = self._pairs if features >> abi.F_MQ & 1 else 1
        has_control = features >> abi.F_CTRL_VQ & 1
        control = [wiring for wiring in queues if has_control and wiring.index == 2 * pairs]
        data = [wiring for wiring in queues if wiring.index < 2 * pairs]
        with self.lock:
            positions = [self._positions.get(wiring.index, (0, 0)) for wiring in data]
            super().activate(memory, features, control)
            if self._control.features != features:  # else it was loaded, and goes on
                self._control = Control(self._mac, features, self._pairs)
            self._active = (memory, data)
            try:
                self._start_plane(positions)
            except HostelError:
                self._stop()
                raise

    def _start_plane(self, positions: Sequence[tuple[int, int]]) -> None:
        assert self._active is not None
        self._epoch += 1
        self.plane.on_fault = partial(self._plane_failed, self._epoch)
        self.plane.set_link(self.link_up)
        self.plane.set_filter(self._control.filter)
        self.plane.set_offloads(self._control.offloads)
        memory, data = self._active
        self.plane.start(memory, self.driver_features, data, positions, self._control.pairs)

    def _stop(self) -> bool:
        stopped = super()._stop()
        if self._active is not None:
            self._active = None
            self.plane.stop()
        return stopped

    def reset(self) -> None:
        with self.lock:
            super().reset()
            self._control = Control(self._mac, 0, self._pairs)
            self._announcing = False
            self._describe()

    def close(self) -> None:
        super().close()
        self.plane.close()

    def _plane_failed(self, epoch: int, error: HostelError) -> None:
        """From any thread of the plane; ``stop`` may wait for that thread, so another one calls it."""
        self.loop.call_soon(partial(self._give_up, epoch, error))

    def _give_up(self, epoch: int, error: HostelError) -> None:
        with self.lock:
            if epoch == self._epoch and self._active is not None:
                self.broken(error)

    def save(self) -> dict[str, Any]:
        with self.lock:
            state = super().save()
            if self._active is not None:
                positions = self.plane.stop()
                state["queues"] += [
                    [wiring.index, *position]
                    for wiring, position in zip(self._active[1], positions, strict=True)
                ]
                self._start_plane(positions)
            return {
                **state,
                "link_up": self.link_up,
                "announcing": self._announcing,
                "control": self._control.save(),
            }

    def load(self, state: dict[str, Any]) -> None:
        with self.lock:
            super().load(state)
            self.link_up, self._announcing = state["link_up"], state["announcing"]
            self._control = Control.load(state["control"], self._pairs)
            self._describe()

    def statistics(self) -> dict[str, Any]:
        with self.lock:
            own = {"link_up": self.link_up, "pairs": self._control.pairs}
            return {**super().statistics(), **own, **self.plane.statistics()}

    # -- the host's wishes ------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it. The driver is told, and no frame passes without it."""
        with self.lock:
            self.link_up = up
            self.plane.set_link(up)
            self._describe()
        self.config_changed()

    def announce(self) -> None:
        """Have the guest tell the network where it is now (§5.1.6.5.4), if its driver can."""
        with self.lock:
            if not self.driver_features >> abi.F_GUEST_ANNOUNCE & 1:
                return
            self._announcing = True
            self._describe()
        self.config_changed()

    # -- control queue ----------------------------------------------------------------------------

    def serve(self, queue: ServedQueue) -> None:
        for chain in queue.chains():
            self._answer(chain)
            queue.push(chain, 1)
        queue.interrupt()

    def _answer(self, chain: Chain) -> None:
        if not chain.writable:
            raise QueueError("a control command without room for its answer")
        head, rest = take(chain.readable, COMMAND_SIZE)
        done = not rest and self._obey(b"".join(head))
        chain.writable[0][0] = abi.OK if done else abi.ERR

    def _obey(self, command: bytes) -> bool:
        """Nothing changes where the command is wrong or the host cannot follow it."""
        before = self._control
        after = before.obey(command)
        if after is None:
            return False
        try:
            self._change_plane(before, after)
        except HostError:
            return False
        self._control = after
        self._announcing = self._announcing and not after.acknowledged
        self._describe()
        return True

    def _change_plane(self, before: Control, after: Control) -> None:
        if after.filter is not before.filter:
            self.plane.set_filter(after.filter)
        if after.pairs != before.pairs:
            self.plane.set_pairs(after.pairs)
        if after.offloads != before.offloads:
            self.plane.set_offloads(after.offloads)

    @property
    def filter(self) -> Filter:
        """What the driver wants to receive."""
        return self._control.filter
