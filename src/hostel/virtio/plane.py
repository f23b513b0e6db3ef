"""The Python data plane: a device whose queues are served here, on the event loop.

::

    guest's kick ─► eventfd ─► event loop ─► _kicked ─► serve(queue): for chain in queue.chains() …
                                                                      queue.push, queue.interrupt

Kicks are watched by their edges: the eventfd is never read, which spares a system call for each.

Rules:

* ``lock`` is held while a queue is served, and by ``activate`` and ``reset``. A callback that comes
  late finds its queue gone from ``queues`` and does nothing: so when ``reset`` has returned nobody
  touches guest memory. Nothing is called with it held that takes another thread's lock.
* No callback runs long: after ``BATCH`` chains a queue kicks itself and lets the others run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from hostel.errors import HostelError, MemoryFault, QueueError
from hostel.memory import GuestMemory, Memory
from hostel.vmm.loop import EventLoop

from .device import QueueWiring, VirtioDevice
from .queue import Chain, Queue

BATCH = 64


class ServedQueue:
    """A virtqueue with its two eventfds."""

    def __init__(
        self, memory: Memory, wiring: QueueWiring, features: int, position: tuple[int, int]
    ) -> None:
        queue = Queue(
            memory,
            wiring.size,
            desc=wiring.desc,
            avail=wiring.avail,
            used=wiring.used,
            features=features,
            position=position,
        )
        self.index = wiring.index
        self.kick = wiring.kick
        self.kicks = 0
        self.interrupts = 0
        self._queue = queue
        self._call = wiring.call
        self.push, self.push_used = queue.push, queue.push_used
        self.pop, self.pop_batch = queue.pop, queue.pop_batch
        self.pop_room, self.unpop, self.has_more = queue.pop_room, queue.unpop, queue.has_more
        self.enable_notifications = queue.enable_notifications
        self.disable_notifications = queue.disable_notifications

    def chains(self) -> Iterator[Chain]:
        """All that is there, up to ``BATCH``; whoever stops early has to ``kick_self``."""
        for chains in self.batches(1):
            yield chains[0]

    def batches(self, limit: int) -> Iterator[list[Chain]]:
        """The same, as many at a time as there are, up to ``limit``; none is empty.

        Where the ring is empty the driver is told of what was pushed before we look once more: it goes on
        while we do.
        """
        queue, left = self._queue, BATCH
        queue.disable_notifications()
        while left > 0:
            if chains := queue.pop_batch(limit if limit < left else left):
                left -= len(chains)
                yield chains
                continue
            left -= 1  # or a driver that moves its index to and fro would keep us here
            self.interrupt()
            if not queue.enable_notifications():
                return
        self.kick_self()

    def kick_self(self) -> None:
        """Serve this queue again, after the others."""
        os.eventfd_write(self.kick, 1)

    def interrupt(self) -> None:
        """After a batch of ``push``: tell the driver, if it wants to know."""
        if self._queue.needs_interrupt():
            self.interrupts += 1
            os.eventfd_write(self._call, 1)

    @property
    def position(self) -> tuple[int, int]:
        return self._queue.position

    def close(self) -> None:
        self._queue.close()

    def statistics(self) -> dict[str, int]:
        return {
            "kicks": self.kicks,
            "interrupts": self.interrupts,
            "chains": self._queue.next_used,
        }


class QueueDevice(VirtioDevice):
    """Base of the devices with a Python data plane."""

    def __init__(self, loop: EventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.lock = threading.RLock()
        self.driver_features = 0
        self.queues: dict[int, ServedQueue] = {}
        self._positions: dict[int, tuple[int, int]] = {}
        self._started = False
        """Also without any queue: a driver need not enable one."""
        self._stops = 0

    # -- for a device to fill in ----------------------------------------------------------------

    def serve(self, queue: ServedQueue) -> None:
        """The driver kicked ``queue``. On the event loop, with ``lock``; never blocks."""
        raise NotImplementedError

    def started(self) -> None:
        """The queues are there. With ``lock``."""

    def stopping(self) -> None:
        """The queues are about to go: end all that uses them. With ``lock``; may wait without it, and then
        another thread may call it too."""

    # -- life cycle -----------------------------------------------------------------------------

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        self.activate_in(memory, features, queues)

    def activate_in(self, memory: Memory, features: int, queues: Sequence[QueueWiring]) -> None:
        """``activate`` of a device that needs no more of memory than to read and write it: such a one can
        also serve a machine in another process (``vhost_user_backend.py``)."""
        with self.lock:
            self.driver_features = features
            try:
                for wiring in queues:
                    position = self._positions.get(wiring.index, (0, 0))
                    self.queues[wiring.index] = ServedQueue(memory, wiring, features, position)
            except QueueError:
                self._stop()
                raise
            for served in self.queues.values():
                kicked = partial(self._kicked, served, partial(self.serve, served))
                self.loop.add(served.kick, kicked, edge=True)
            self._positions = {}
            self._started = True
            self.started()
            for served in self.queues.values():
                served.kick_self()  # what was offered before we listened

    def reset(self) -> None:
        with self.lock:
            self._stop()
            self._positions = {}
            self.fault = None

    def close(self) -> None:
        self.reset()

    def save(self) -> dict[str, Any]:
        with self.lock:
            positions = [[index, *queue.position] for index, queue in self.queues.items()]
            return {"queues": positions}

    def load(self, state: dict[str, Any]) -> None:
        self._positions = {index: (avail, used) for index, avail, used in state["queues"]}

    def statistics(self) -> dict[str, Any]:
        queues = {str(index): queue.statistics() for index, queue in list(self.queues.items())}
        return {**super().statistics(), "queues": queues}

    def guarded(self, work: Callable[[], None]) -> None:
        """Run what touches the queues, with ``lock``; the guest's fault stops this device alone."""
        try:
            work()
        except (QueueError, MemoryFault) as error:
            self.broken(error)

    def broken(self, error: HostelError) -> None:
        if self._stop():  # else a reset came first: this is no longer the present driver's fault
            self.fail(error)

    def _kicked(self, served: ServedQueue, serve: Callable[[], None]) -> None:
        with self.lock:
            if self.queues.get(served.index) is served:
                served.kicks += 1
                self.guarded(serve)

    def _stop(self) -> bool:
        """False if another thread did it, while ``stopping`` waited and let go of the lock."""
        stops = self._stops
        if self._started:
            self.stopping()
        if stops != self._stops:
            return False
        self._stops += 1
        self._started = False
        for served in self.queues.values():
            self.loop.remove(served.kick)
            served.close()
        self.queues = {}
        return True
