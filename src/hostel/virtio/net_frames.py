"""Frames between guest memory and a port: one receive queue, one transmit queue (virtio 1.2 §5.1.6).

::

    receive    after a small frame  readv( the next chain, overflow )          it fits: no copy
               after a large one    readv( chains for 64 KiB, overflow )       it fits: no copy
               otherwise            what went over is copied into further chains
    transmit   writev( the driver's buffers )

A frame's size is known only when it has been read, and what does not fit is lost. So a read is always given
room for the largest frame: where the driver's buffers end ``overflow`` begins. To hand 64 KiB of the driver's
buffers to each read would cost more than to receive a small frame; never to do so, a copy of each large one.

Rules: at most ``BATCH`` frames in one go, then others have their turn. Used chains are shown to the driver
together, those of long frames to send at once; it is interrupted once. Where there is no room, in the ring or
in the port, nothing is taken from the other side: so its sender waits, or drops.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Sequence

from .limit import Limiter
from .net_plane import Filter
from .net_port import HEADER, MAX_FRAME, NetPort, scatter
from .net_room import Room
from .plane import BATCH, ServedQueue
from .queue import Chain, take, total

PEEK = HEADER + 16
"""Bytes of header and frame that a filter looks at."""
UNLIKE_ALL = bytes(PEEK)
"""Longer than what it sees of a frame."""
WIDE_FOR = 16
"""Small frames in a row until a large one is no longer expected."""
COUNT_AT = HEADER - 2
"""``num_buffers`` is the last field of the header."""
LONG = 32 << 10
"""A frame that takes longer to copy than it takes to show the driver that it went."""

_NOTHING_WRITTEN = array("I", bytes(4 * BATCH))
_pack_count = struct.Struct("<H").pack_into


class Gate:
    """What holds for all queues of a NIC; its fields are replaced while the queues run."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.limited = limiter.active
        self.link_up = True
        self.filter = Filter(bytes(6))
        self.open = True
        """Every frame passes."""
        self.passed = UNLIKE_ALL
        """A frame that begins so passes, as the last one did."""

    def set(self, *, link_up: bool | None = None, filter: Filter | None = None) -> None:
        self.link_up = self.link_up if link_up is None else link_up
        self.filter = filter or self.filter
        self.open = self.link_up and self.filter.promiscuous
        self.passed = UNLIKE_ALL

    def accepts(self, frame: bytes) -> bool:
        filter = self.filter
        if not self.link_up or not filter.accepts(frame):
            return False
        self.passed = frame
        if filter is not self.filter or not self.link_up:  # ``set`` came between
            self.passed = UNLIKE_ALL
        return True


class Receiver:
    """From the network to the driver. Runs on its pair's thread alone."""

    def __init__(
        self, port: NetPort, queue: ServedQueue, gate: Gate, size: int, *, merged: bool
    ) -> None:
        self.queue = queue
        self.starved = False
        """The driver offers no room; its next kick does."""
        self.found = False
        """Whether the last run read any frame."""
        self.frames = self.bytes = self.dropped = self.filtered = self.copied = 0
        self._port, self._gate = port, gate
        self._size, self._merged = size, merged
        self._room = Room(queue)
        self._wide = 0
        self._overflow = memoryview(bytearray(MAX_FRAME))
        self._held = b""
        """A frame that has been read and for which there was no room."""
        self._turns, self._began, self._ended = 1, 0.0, 0.0

    def run(self, expected: int = 1) -> float:
        """Receive what there is; the seconds to pause after it. ``expected``: frames that are likely there.

        The path of every frame: what most of them need is done here and not in calls.
        """
        gate, room, receive = self._gate, self._room, self._port.receive
        self.starved, pause, turns = False, 0.0, 0
        limit = self._turns_now(expected)
        while turns < limit:
            if self._held and not self._release_held():
                break
            wanted = MAX_FRAME if self._wide else 1
            if room.end - room.begin < wanted and not self._more(room.begin == room.end):
                break
            first, view = room.first, room.next_view()
            if self._wide or len(view) < first:
                views = [*room.views(max(wanted, first)), self._overflow]
            else:
                views = [view, self._overflow]
            try:
                length = receive(views)
            except BlockingIOError:
                break
            turns += 1
            if not gate.open and views[0][HEADER:PEEK] != gate.passed and not self._accepts(views):
                self.filtered += 1
            elif length <= first:
                room.take_one(length)
                if len(view) >= HEADER:
                    _pack_count(view, COUNT_AT, 1)
                else:
                    put_count(views, 1)
                self.bytes += length - HEADER
                self.frames += 1
                self._wide -= self._wide > 0
            elif not self._deliver_large(views, length):
                break
            if gate.limited and (pause := gate.limiter.take(length - HEADER)):
                break
        self._end(turns, full=turns == limit)
        return pause

    def _turns_now(self, expected: int) -> int:
        """How many frames to ask for. Asking once too often costs as much as a frame: so one frame at first,
        and more while they come so fast that waiting for them took less time than the last ones did."""
        now, served = time.monotonic(), self._ended - self._began
        soon = now - self._ended < served
        self._began = now
        return min(max(2 * self._turns, expected), BATCH) if soon else expected

    def _end(self, turns: int, *, full: bool) -> None:
        self._room.publish()
        self.queue.interrupt()
        if full and self._port.buffered:
            self.queue.kick_self()
        self.found, self._turns = turns > 0, turns or 1
        self._ended = time.monotonic()

    def stop(self) -> None:
        """What was taken from the ring and not used comes again."""
        self._room.give_back()
        self.dropped += bool(self._held)
        self._held = b""

    def statistics(self) -> dict[str, int]:
        return {
            "frames": self.frames,
            "bytes": self.bytes,
            "dropped": self.dropped,
            "filtered": self.filtered,
            "copied": self.copied,
            **self.queue.statistics(),
        }

    def _more(self, needed: bool = True) -> bool:
        """Take more chains from the ring. ``False``: they are needed, there are none, and a kick tells of the
        next."""
        while not self._room.top_up() and needed:
            if not self.queue.enable_notifications():
                self.starved = True
                return False
        return True

    def _accepts(self, views: Sequence[memoryview]) -> bool:
        start = b"".join(take(views, PEEK)[0])
        return self._gate.accepts(start[HEADER:])

    def _deliver_large(self, views: list[memoryview], length: int) -> bool:
        """§5.1.6.3.2: a frame in several chains, of which the first one tells how many. ``False`` if it has
        to wait for room."""
        if not self._merged:
            self.dropped += 1
            return True
        self._wide = WIDE_FOR
        room = self._room
        while room.end - room.begin < length:
            if not self._more():
                return not self._hold(views, length)
        offered = total(views) - MAX_FRAME
        if (over := length - offered) > 0:
            views = room.views(length)
            scatter(take(views, offered)[1], self._overflow[:over])
            self.copied += over
        put_count(views, room.take(length))
        self.frames += 1
        self.bytes += length - HEADER
        return True

    def _hold(self, views: list[memoryview], length: int) -> bool:
        """Keep the frame until the driver offers more; ``False`` if it is dropped."""
        if len(self._room) >= self._size:  # the whole ring is not enough: it never will be
            self.starved = False
            self.dropped += 1
            return False
        self._held = b"".join(take(views, length)[0])
        return True

    def _release_held(self) -> bool:
        """The same as if it had been read now, into ``overflow`` alone."""
        frame, self._held = self._held, b""
        self._overflow[: len(frame)] = frame
        return self._deliver_large([self._overflow], len(frame))


def put_count(buffers: Sequence[memoryview], count: int) -> None:
    """Without MRG_RXBUF too it has to be 1 (§5.1.6.4.1), and a tap does not write it."""
    if len(buffers[0]) >= HEADER:
        _pack_count(buffers[0], COUNT_AT, count)
    else:
        scatter(take(buffers, COUNT_AT)[1], count.to_bytes(2, "little"))


class Transmitter:
    """From the driver to the network. Runs on its pair's thread alone."""

    def __init__(self, port: NetPort, queue: ServedQueue, gate: Gate) -> None:
        self.queue = queue
        self.blocked = False
        """The port has no room, for a frame of the driver's or for what it still holds of the last one."""
        self.pause = 0.0
        """Seconds until the NIC's rate allows more."""
        self.frames = self.bytes = self.dropped = 0
        self._port, self._gate = port, gate

    def run(self, limit: int) -> int:
        """Send what there is, at most ``limit`` frames; how many went. The driver sees it; to interrupt it is
        up to who calls this."""
        queue, sent = self.queue, 0
        self.blocked, self.pause = False, 0.0
        while sent < limit and (chains := queue.pop_batch(limit - sent)):
            went = self._send(chains)
            sent += went
            if went < len(chains) or self.pause:
                queue.unpop(len(chains) - went)
                break
        self.blocked = self.blocked or self._port.unsent
        return sent

    def _send(self, chains: Sequence[Chain]) -> int:
        """How many went, or were dropped: what the host refuses is, as a wire would."""
        gate, send, queue = self._gate, self._port.send, self.queue
        went, short = 0, array("I")
        for chain in chains:
            if HEADER < chain.size <= MAX_FRAME and gate.link_up:
                try:
                    send(chain.readable)
                    self.frames += 1
                    self.bytes += chain.size - HEADER
                except BlockingIOError:
                    self.blocked = True
                    break
                except OSError:
                    self.dropped += 1
            else:
                self.dropped += 1
            went += 1
            if chain.size < LONG:
                short.append(chain.head)
            else:  # the driver goes on while the next one is copied
                short = short and self._show(short)
                queue.push(chain, 0)
            if gate.limited and (pause := gate.limiter.take(chain.size - HEADER)):
                self.pause = pause
                break
        if short:
            self._show(short)
        return went

    def _show(self, heads: array[int]) -> array[int]:
        """To the driver, that these went; none is left."""
        self.queue.push_used(heads, _NOTHING_WRITTEN[: len(heads)])
        return array("I")

    def statistics(self) -> dict[str, int]:
        counts = {"frames": self.frames, "bytes": self.bytes, "dropped": self.dropped}
        return {**counts, **self.queue.statistics()}
