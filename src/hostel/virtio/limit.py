"""Rates with bursts: a token bucket, and a pair of them for the bytes and operations of one device.

::

    take(n) ──► tokens −= n ──► 0.0: go on          tokens come back at ``per_second``, up to ``burst``
                           └──► seconds to wait before anything more is done

A bucket may go into debt: what is taken is taken whole, however large, and who took it waits until the
debt is paid. So a request larger than the burst is slow and not impossible, and a device that knows a
frame's size only after it has read it can pay afterwards.

Pure: it neither sleeps nor looks at a clock but the one that it is given. Any thread may take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hostel.spec import Limits, Rate

Clock = Callable[[], float]
_NOTHING = 1e-6
"""Seconds: less is no debt but rounding, and shorter than any timer."""


class TokenBucket:
    """Full at first: ``burst`` may come at once (0: what one second brings)."""

    def __init__(self, rate: Rate, clock: Clock = time.monotonic) -> None:
        self.per_second = rate.per_second
        self.burst = rate.burst or rate.per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = float(self.burst)
        self._then = clock()

    def take(self, count: int) -> float:
        """Seconds until the debt is paid, 0.0 where there is none. ``take(0)`` only asks."""
        with self._lock:
            now = self._clock()
            earned = (now - self._then) * self.per_second
            self._tokens = min(self._tokens + earned, self.burst) - count
            self._then = now
            wait = -self._tokens / self.per_second
            return wait if wait > _NOTHING else 0.0


class Limiter:
    """Both limits of a disk or a NIC."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self._bytes = TokenBucket(limits.bytes, clock) if limits.bytes else None
        self._operations = TokenBucket(limits.operations, clock) if limits.operations else None

    @property
    def active(self) -> bool:
        """Whether there is any limit at all."""
        return self._bytes is not None or self._operations is not None

    def take(self, size: int, operations: int = 1) -> float:
        """Seconds to wait before the next request, after one (or ``operations``) of ``size`` bytes."""
        wait = self._bytes.take(size) if self._bytes else 0.0
        return max(wait, self._operations.take(operations)) if self._operations else wait
