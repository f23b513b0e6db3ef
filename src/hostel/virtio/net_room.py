"""Room to receive into: the buffers that the driver offers, as one row of bytes (virtio 1.2 §5.1.6.3.2).

::

    chains     │ 4096 │ 4096 │ 4096 │ 4096 │ 1536 │ 1536 │ …          as the driver offers them
    views      │ ───── one memoryview ──── │ ───── one ── │ …          each a stretch of guest memory
                     begin ─► next frame ──►│

A driver cuts its buffers out of larger pieces of memory, so most lie behind the one before. Which chains a
frame takes, where the next one begins and what of a view is left is arithmetic on a list of ends, which
``bisect`` does: a frame of 64 KiB in 17 chains costs little more than one in a single chain. Chains are used
in the order in which they came, so what goes into the used ring is two slices, for all frames at once.

Rule: each descriptor is read and checked once, by the queue; the driver has no say in it until it is used.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from itertools import accumulate, islice

from .plane import BATCH, ServedQueue
from .queue import MAX_BUFFERS


class Room:
    """What was taken from one receive queue, and not given back yet."""

    def __init__(self, queue: ServedQueue) -> None:
        self._queue = queue
        self.begin = self.end = 0
        """Where the next frame goes, and where the room ends: bytes since the queue began."""
        self._heads = array("I")
        self._lengths = array("I")
        self._ends: list[int] = []
        self._used = 0
        """How many of these chains have been taken for frames, from the first on."""
        self._shown = 0
        """How many of those the driver has been shown."""
        self._views: list[memoryview] = []
        self._view_ends: list[int] = []

    def __len__(self) -> int:
        """Chains that no frame has taken."""
        return len(self._heads) - self._used

    @property
    def first(self) -> int:
        """The size of the next chain."""
        return self._lengths[self._used]

    def top_up(self) -> bool:
        """Take more from the ring; whether there was any."""
        heads, lengths, views = self._queue.pop_room(BATCH)
        if not heads:
            return False
        self._forget()
        self._heads.extend(heads)
        self._lengths.extend(lengths)
        self._ends += islice(accumulate(lengths, initial=self.end), 1, None)
        self._views += views
        self._view_ends += islice(accumulate(map(len, views), initial=self.end), 1, None)
        self.end = self._ends[-1]
        return True

    def views(self, size: int) -> list[memoryview]:
        """The next ``size`` bytes or more, as far as there are so many. There is at least one chain."""
        ends, begin = self._view_ends, self.begin
        first = bisect_right(ends, begin)
        last = min(bisect_left(ends, begin + size, first), first + MAX_BUFFERS - 2)
        views = self._views[first : last + 1]
        views[0] = views[0][begin - ends[first] :]
        return views

    def next_view(self) -> memoryview:
        """Of the next chain at least. There is one."""
        ends, begin = self._view_ends, self.begin
        first = bisect_right(ends, begin)
        return self._views[first][begin - ends[first] :]

    def take_one(self, length: int) -> None:
        """``take`` of what fits the next chain."""
        used = self._used
        self.begin = self._ends[used]
        self._lengths[used] = length
        self._used = used + 1

    def take(self, length: int) -> int:
        """Take what a frame of this length needs: how many chains; 0 if the room is too small."""
        first, ends = self._used, self._ends
        stop = self.begin + length
        last = bisect_left(ends, stop, first)
        if last == len(ends):
            return 0
        self.begin = ends[last]
        self._lengths[last] -= self.begin - stop
        self._used = last + 1
        return last + 1 - first

    def publish(self) -> None:
        """Show the driver all that was taken."""
        shown, used = self._shown, self._used
        if used > shown:
            self._queue.push_used(self._heads[shown:used], self._lengths[shown:used])
            self._shown = used

    def _forget(self) -> None:
        """Of what the driver has been shown."""
        shown, gone = self._shown, bisect_right(self._view_ends, self.begin)
        del self._heads[:shown], self._lengths[:shown], self._ends[:shown]
        del self._views[:gone], self._view_ends[:gone]
        self._used -= shown
        self._shown = 0

    def give_back(self) -> None:
        """What no frame has taken comes again."""
        self._queue.unpop(len(self))
        del self._heads[self._used :]
