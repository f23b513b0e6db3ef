"""The Python plane of a NIC: a thread for each pair of queues, between the rings and a port.

::

    PythonPlane ─┬─ Pair 0: event loop ── kick of rx0 ─► Receiver ◄── port readable
                 │                     └─ kick of tx0 ─► Transmitter ─► port writable again
                 └─ Pair 1: …

    a turn    send ─► show what went ─► receive what was answered, interrupt ─► more to send? again
                                                                            └─► interrupt for what went

The last interrupt is held back when the driver has just been given frames: Linux's then looks at both of its
queues, and moves ``used_event`` on. It goes before the next turn, ``HOLD`` later at most, if then wanted.

Why a thread with an event loop for a pair: it is in the kernel most of its time, copying frames without the
interpreter's lock, and other devices need not wait for it; see docs/net-plane.md for what else was tried.
A pair's rings are touched by its thread alone, which has ended when ``stop`` returns.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hostel.abi import virtio_net as abi
from hostel.errors import HelperError, HostelError
from hostel.memory import GuestMemory
from hostel.spec import Limits

from .device import QueueWiring
from .limit import Limiter
from .net_frames import Gate, Receiver, Transmitter
from .net_plane import Filter, NetPlane, unheard
from .net_port import NetPort
from .plane import BATCH, ServedQueue

UNLIMITED = Limits()
HOLD = 0.001
"""Seconds that an interrupt is held back at most: as short as epoll can wait."""
COST = "the guest is cut off from this network"


class Pair:
    """One port and, while it is started, the two queues that it serves on a thread of its own.

    The thread's loop is not the machine's: it is the path of every frame. Kicks are watched by their edges,
    which spares reading the eventfd; a kick that comes while its direction waits for something else is
    forgotten, as what it waits for runs it anyway.
    """

    def __init__(self, port: NetPort, gate: Gate, name: str) -> None:
        self.port = port
        self.name = name
        self.attached = True
        self.on_fault: Callable[[HostelError], None] = unheard
        self.receiver: Receiver | None = None
        self.transmitter: Transmitter | None = None
        self._gate = gate
        self._thread: threading.Thread | None = None
        self._settled = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # -- from other threads -----------------------------------------------------------------------

    def start(
        self, receive: ServedQueue | None, transmit: ServedQueue | None, size: int, *, merged: bool
    ) -> None:
        self._stopping = False
        self._paused: dict[str, float] = {}
        self._watched = (False, False)
        self._answered = True
        """What was sent last was answered before we had turned to the port."""
        self._held = False
        """An interrupt for what was sent is due, if the driver still wants one."""
        self._epoll = select.epoll()
        self._handlers = {self._wake: self._woken, self.port.fd: self._ready}
        self._epoll.register(self._wake, select.EPOLLIN)
        if receive is not None:
            self.receiver = Receiver(self.port, receive, self._gate, size, merged=merged)
            self._watch_kick(receive, self._receive_kicked)
        if transmit is not None:
            self.transmitter = Transmitter(self.port, transmit, self._gate)
            self._watch_kick(transmit, self._transmit_kicked)
        self._thread = threading.Thread(target=self._run, name=f"hostel-{self.name}", daemon=True)
        self._thread.start()

    def _watch_kick(self, queue: ServedQueue, handler: Callable[[], None]) -> None:
        self._handlers[queue.kick] = handler
        self._epoll.register(queue.kick, select.EPOLLIN | select.EPOLLET)
        queue.kick_self()  # what was offered before we listened

    def stop(self) -> None:
        """The thread has ended when this returns."""
        if self._thread is None:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._thread = None
        self._epoll.close()
        self._release()
        if self.receiver is not None:
            self.receiver.stop()
        self.receiver = self.transmitter = None

    def attach(self, attached: bool) -> None:
        """Whether frames come through this pair, from now on. A port that is detached reads as failed: so the
        thread that watches it does it."""
        if attached == self.attached:
            return
        self.attached = attached
        if self._thread is None:
            self.port.attach(attached)
            return
        self._settled.clear()
        os.eventfd_write(self._wake, 1)
        while not self._settled.wait(0.1) and self._thread.is_alive():
            pass

    def close(self) -> None:
        self.stop()
        os.close(self._wake)
        self.port.close()

    # -- on the pair's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        """The guest's fault, or a port that failed for good, ends this thread and stops this NIC alone."""
        poll, handlers = self._epoll.poll, self._handlers
        try:
            while not self._stopping:
                ready = poll(self._patience() if self._paused or self._held else None)
                if self._held:
                    self._release()
                for fd, _ in ready:
                    handlers[fd]()
                if self._paused:
                    self._resume()
        except HostelError as error:
            self.on_fault(error)
        except OSError as error:
            self.on_fault(HelperError(f"{self.name}: {error.strerror}", cost=COST))
        except Exception as error:  # ours; the machine goes on without this NIC
            self.on_fault(HelperError(f"{self.name}: {error!r}", cost=COST))

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        if self.attached:
            self.port.attach(True)
        self._watch()
        if not self.attached:
            self.port.attach(False)
        self._settled.set()

    def _receive_kicked(self) -> None:
        """There is room again, or is it the first time?"""
        assert self.receiver is not None
        self.receiver.queue.kicks += 1
        self._receive()
        self._watch()

    def _receive(self, expected: int = 1) -> bool:
        """Whether there was anything."""
        receiver = self.receiver
        if receiver is None or not self.attached or "receive" in self._paused:
            return False
        pause = receiver.run(expected)
        if pause:
            self._paused["receive"] = time.monotonic() + pause
        if pause or receiver.starved:
            self._watch()
        return receiver.found

    def _transmit_kicked(self) -> None:
        assert self.transmitter is not None
        self.transmitter.queue.kicks += 1
        if not self.transmitter.blocked:
            self._transmit()

    def _transmit(self) -> None:
        """Send till the driver offers no more, and take in what is answered meanwhile: where our own host is
        the other end, an acknowledgement is there when ``writev`` returns."""
        transmitter, left = self.transmitter, BATCH
        if transmitter is None or "transmit" in self._paused:
            return
        queue = transmitter.queue
        queue.disable_notifications()
        while left > 0:
            sent = transmitter.run(left)
            left -= sent or 1  # or a driver that moves its index to and fro would keep us here
            if sent and self._answered and self._watched[0]:
                self._answered = self._receive(sent)
                self._held = self._held or self._answered
            if transmitter.pause or transmitter.blocked or not queue.enable_notifications():
                break
        else:
            queue.kick_self()
        if not self._held:
            queue.interrupt()
        if transmitter.pause:
            self._paused["transmit"] = time.monotonic() + transmitter.pause
        if transmitter.blocked:
            self._watch()

    def _release(self) -> None:
        """The driver has had its time: has it seen that its frames went?"""
        if self._held and self.transmitter is not None:
            self._held = False
            self.transmitter.queue.interrupt()

    def _ready(self) -> None:
        """The port can be read or written, or has failed, which reading tells."""
        read, write = self._watched
        if write and self.port.flush():
            self._unblock()
        if read:
            self._answered = True
            self._receive()

    def _unblock(self) -> None:
        """The port has room. Whether there is something to send, and the rate allows it, is seen now."""
        assert self.transmitter is not None
        self.transmitter.blocked = False
        self._transmit()
        self._watch()

    # -- waiting ----------------------------------------------------------------------------------

    def _patience(self) -> float:
        wait = HOLD if self._held else math.inf
        if self._paused:
            wait = min(wait, max(min(self._paused.values()) - time.monotonic(), 0))
        return wait

    def _resume(self) -> None:
        """The NIC's rate allows more."""
        now = time.monotonic()
        due = [what for what, when in self._paused.items() if when <= now]
        for what in due:
            del self._paused[what]
            (self._receive if what == "receive" else self._transmit)()
        if due:
            self._watch()

    def _watch(self) -> None:
        """Wait for what is of use now. With neither, the port leaves the epoll set: one that has failed
        would be reported again and again."""
        receiver, transmitter = self.receiver, self.transmitter
        read = receiver is not None and not receiver.starved and "receive" not in self._paused
        wanted = (read and self.attached, transmitter is not None and transmitter.blocked)
        if wanted == self._watched:
            return
        events = (select.EPOLLIN if wanted[0] else 0) | (select.EPOLLOUT if wanted[1] else 0)
        if not events:
            self._epoll.unregister(self.port.fd)
        elif self._watched == (False, False):
            self._epoll.register(self.port.fd, events)
        else:
            self._epoll.modify(self.port.fd, events)
        self._watched = wanted

    def statistics(self) -> dict[str, Any]:
        receiver, transmitter = self.receiver, self.transmitter
        return {
            "receive": receiver.statistics() if receiver else {},
            "transmit": transmitter.statistics() if transmitter else {},
        }


class PythonPlane(NetPlane):
    """Owns its ports: one for each pair of queues."""

    def __init__(
        self, ports: Sequence[NetPort], limits: Limits = UNLIMITED, *, name: str = "net"
    ) -> None:
        self.features = ports[0].features | 1 << abi.F_MRG_RXBUF
        self.without = 0
        self.max_pairs = len(ports)
        self.on_fault = unheard
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
        served = {
            wiring.index: ServedQueue(memory, wiring, features, position)
            for wiring, position in zip(wirings, positions, strict=True)
        }
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
            pair.close()
        self._pairs = []

    def statistics(self) -> dict[str, Any]:
        pairs = {str(number): pair.statistics() for number, pair in enumerate(self._pairs)}
        return {"plane": "python", "pairs_served": pairs}
