"""Entropy (virtio 1.2 §5.4): the host's random bytes, read straight into the guest's buffers."""

from __future__ import annotations

import os

from hostel.abi import virtio as abi
from hostel.vmm.loop import EventLoop

from .plane import QueueDevice, ServedQueue
from .queue import take

MOST = 64 << 10
"""Bytes in one request, and in one turn of the event loop: the host's generator is not the guest's
to keep busy. A driver asks again for what it did not get (§5.4.6.1)."""


class Rng(QueueDevice):
    device_id = abi.ID_RNG
    queue_sizes = (64,)

    def __init__(self, loop: EventLoop, *, name: str = "rng") -> None:
        super().__init__(loop)
        self.name = name
        self._source = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)

    def serve(self, queue: ServedQueue) -> None:
        left = MOST
        for chain in queue.chains():
            buffers, _ = take(chain.writable, left)
            written = os.readv(self._source, buffers) if buffers else 0
            queue.push(chain, written)
            left -= written
            if left <= 0:
                queue.kick_self()
                break
        queue.interrupt()

    def close(self) -> None:
        super().close()
        if self._source >= 0:
            os.close(self._source)
            self._source = -1
