"""A lock that is given in the order in which it was asked for: nobody starves beside a vCPU that runs on."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._held = False

    def take(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queue.append(ticket)
        ticket.acquire()

    def give(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().release()  # it is the next one's now
            else:
                self._held = False
