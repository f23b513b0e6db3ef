"""The Python plane of a NIC: a thread for each pair of queues, between the rings and a port.

::

    PythonPlane ─┬─ Pair 0: event loop ── kick of rx0 ─► Receiver ◄── port readable
                 │                     └─ kick of tx0 ─► Transmitter ─► port writable again
                 └─ Pair 1: …

Why a thread with an event loop for a pair: it is in the kernel most of its time, copying frames without the
interpreter's lock, and other devices need not wait for it; see docs/net-plane.md for what else was tried.
A pair's rings are touched by its thread alone, which has ended when ``stop`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hostel.abi import virtio_net as abi
from hostel.errors import HelperError, HostelError
from hostel.memory import GuestMemory
from hostel.spec import Limits
from hostel.vmm.loop import EventLoop

from .device import QueueWiring
from .limit import Limiter
from .net_frames import Gate, Receiver, Transmitter
from .net_plane import Filter, NetPlane
from .net_port import NetPort
from .plane import ServedQueue
from .queue import Queue

UNLIMITED = Limits()


def _unheard(error: HostelError) -> None:
    pass


class Pair:
    """One port and, while it is started, the two queues that it serves."""

    def __init__(self, port: NetPort, gate: Gate, name: str) -> None:
        self.port = port
        self.name = name
        self.attached = True
        self.on_fault: Callable[[HostelError], None] = _unheard
        self.receiver: Receiver | None = None
        self.transmitter: Transmitter | None = None
        self._gate = gate
        self._loop: EventLoop | None = None
        self._watched = (False, False)
        self._paused = {"receive": False, "transmit": False}

    # -- life cycle -------------------------------------------------------------------------------

    def start(
        self, receive: ServedQueue | None, transmit: ServedQueue | None, size: int, *, merged: bool
    ) -> None:
        self._loop = EventLoop(self._crashed, name=f"hostel-{self.name}")
        self._watched = (False, False)
        self._paused = dict.fromkeys(self._paused, False)
        if receive is not None:
            self.receiver = Receiver(self.port, receive, self._gate, size, merged=merged)
            self._loop.add(receive.kick, partial(self._guarded, self._receive_kicked))
            receive.kick_self()  # what was offered before we listened
        if transmit is not None:
            self.transmitter = Transmitter(self.port, transmit, self._gate)
            self._loop.add(transmit.kick, partial(self._guarded, self._transmit_kicked))
            transmit.kick_self()
        self._loop.call_soon(partial(self._guarded, self._watch))
        self._loop.start()

    def stop(self) -> None:
        """The thread has ended when this returns."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None
        if self.receiver is not None:
            self.receiver.stop()
            self.receiver = None
        self.transmitter = None

    def attach(self, attached: bool) -> None:
        """Whether frames come through this pair. A port that is detached reads as failed: the thread that
        watches it does it."""
        if attached == self.attached:
            return
        self.attached = attached
        if self._loop is not None:
            self._loop.call_soon(partial(self._guarded, self._attach))
        else:
            self.port.attach(attached)

    def _attach(self) -> None:
        if self.attached:
            self.port.attach(True)
        self._watch()
        if not self.attached:
            self.port.attach(False)

    # -- on the pair's thread -----------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        """The guest's fault, or a port that failed for good, ends this NIC alone."""
        try:
            work()
        except HostelError as error:
            self._fail(error)
        except OSError as error:
            self._fail(HelperError(f"{self.name}: {error.strerror}", cost="the NIC is cut off"))

    def _fail(self, error: HostelError) -> None:
        if self._loop is not None:
            for queue in self._queues():
                self._loop.remove(queue.kick)
            self._loop.remove(self.port.fd)
        self.on_fault(error)

    def _crashed(self, error: Exception) -> None:
        self._fail(HelperError(f"{self.name}: {error!r}", cost="the NIC is cut off"))

    def _queues(self) -> list[ServedQueue]:
        served = (self.receiver, self.transmitter)
        return [one.queue for one in served if one is not None]

    def _receive_kicked(self) -> None:
        assert self.receiver is not None
        self.receiver.queue.drain()
        self._receive()

    def _receive(self) -> None:
        if self.receiver is not None and self.attached and not self._paused["receive"]:
            self._pause("receive", self.receiver.run(), self._receive)
        self._watch()

    def _transmit_kicked(self) -> None:
        assert self.transmitter is not None
        self.transmitter.queue.drain()
        self._transmit()

    def _transmit(self) -> None:
        if self.transmitter is not None and not self._paused["transmit"]:
            self._pause("transmit", self.transmitter.run(), self._transmit)
        self._watch()

    def _pause(self, what: str, seconds: float, work: Callable[[], None]) -> None:
        """The NIC's rate is used up: go on later."""
        if not seconds or self._loop is None:
            return

        def resume() -> None:
            self._paused[what] = False
            work()

        self._paused[what] = True
        self._loop.call_later(seconds, partial(self._guarded, resume))

    def _ready(self) -> None:
        """The port can be read or written, or has failed, which reading tells."""
        read, write = self._watched
        if write and self.port.flush():
            self._transmit()
        if read:
            self._receive()

    def _watch(self) -> None:
        """Wait for what is of use now. With neither, the port leaves the loop: one that has failed would
        be reported again and again."""
        if self._loop is None:
            return
        receiver, transmitter = self.receiver, self.transmitter
        read = receiver is not None and not receiver.starved and not self._paused["receive"]
        wanted = (read and self.attached, transmitter is not None and transmitter.blocked)
        if wanted == self._watched:
            return
        if self._watched == (False, False):
            callback = partial(self._guarded, self._ready)
            self._loop.add(self.port.fd, callback, read=wanted[0], write=wanted[1])
        elif wanted == (False, False):
            self._loop.remove(self.port.fd)
        else:
            self._loop.modify(self.port.fd, read=wanted[0], write=wanted[1])
        self._watched = wanted

    def statistics(self) -> dict[str, Any]:
        def of(one: Receiver | Transmitter | None) -> dict[str, int]:
            names = ("frames", "bytes", "dropped", "filtered", "copied")
            counts = {name: getattr(one, name) for name in names if hasattr(one, name)}
            return counts if one is None else counts | one.queue.statistics()

        return {"receive": of(self.receiver), "transmit": of(self.transmitter)}


class PythonPlane(NetPlane):
    """Owns its ports: one for each pair of queues."""

    def __init__(
        self, ports: Sequence[NetPort], limits: Limits = UNLIMITED, *, name: str = "net"
    ) -> None:
        self.features = ports[0].features | 1 << abi.F_MRG_RXBUF
        self.without = 0
        self.max_pairs = len(ports)
        self.on_fault = _unheard
        self._gate = Gate(Limiter(limits))
        self._pairs = [Pair(port, self._gate, f"{name}-{at}") for at, port in enumerate(ports)]
        self._queues: list[ServedQueue] = []
        for pair in self._pairs[1:]:
            pair.attach(False)

    def prepare(self) -> None:
        """The ports are open."""

    def start(
        self,
        memory: GuestMemory,
        features: int,
        wirings: Sequence[QueueWiring],
        positions: Sequence[tuple[int, int]],
        pairs: int,
    ) -> None:
        served: dict[int, ServedQueue] = {}
        for wiring, position in zip(wirings, positions, strict=True):
            queue = Queue(
                memory,
                wiring.size,
                desc=wiring.desc,
                avail=wiring.avail,
                used=wiring.used,
                features=features,
                position=position,
            )
            served[wiring.index] = ServedQueue(queue, wiring)
        self._queues = list(served.values())
        self.set_pairs(pairs)
        merged = bool(features >> abi.F_MRG_RXBUF & 1)
        sizes = {wiring.index: wiring.size for wiring in wirings}
        for number, pair in enumerate(self._pairs):
            pair.on_fault = self._failed
            receive, transmit = served.get(2 * number), served.get(2 * number + 1)
            if receive is not None or transmit is not None:
                pair.start(receive, transmit, sizes.get(2 * number, 0), merged=merged)

    def _failed(self, error: HostelError) -> None:
        self.on_fault(error)

    def set_pairs(self, pairs: int) -> None:
        for number, pair in enumerate(self._pairs):
            pair.attach(number < pairs)

    def set_filter(self, filter: Filter) -> None:
        self._gate.set(filter=filter)

    def set_offloads(self, offloads: int) -> None:
        """For all queues of a tap at once."""
        self._pairs[0].port.set_offloads(offloads)

    def set_link(self, up: bool) -> None:
        self._gate.set(link_up=up)

    def stop(self) -> list[tuple[int, int]]:
        for pair in self._pairs:
            pair.stop()
        positions = [queue.position for queue in self._queues]
        for queue in self._queues:
            queue.close()
        self._queues = []
        return positions

    def close(self) -> None:
        self.stop()
        for pair in self._pairs:
            pair.port.close()
        self._pairs = []

    def statistics(self) -> dict[str, Any]:
        pairs = {str(number): pair.statistics() for number, pair in enumerate(self._pairs)}
        return {"plane": "python", "pairs_served": pairs}
