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
together, and it is interrupted once. Where there is no room, in the ring or in the port, nothing is taken
from the other side: so its sender waits, or drops.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Sequence

from hostel.errors import QueueError

from .limit import Limiter
from .net_plane import Filter
from .net_port import HEADER, MAX_FRAME, NetPort, scatter
from .plane import BATCH, ServedQueue
from .queue import MAX_BUFFERS, Chain, take, total

PEEK = HEADER + 16
"""Bytes of header and frame that a filter looks at."""
WIDE_FOR = 16
"""Small frames in a row until a large one is no longer expected."""
AHEAD = 32
"""Chains taken from the ring at once."""
COUNT_AT = HEADER - 2
"""``num_buffers`` is the last field of the header."""

SOON = 10e-6
"""Seconds between two runs that belong together."""

Used = tuple[int, int]
"""A chain's head, and how many bytes of it are new."""

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

    def set(self, *, link_up: bool | None = None, filter: Filter | None = None) -> None:
        self.link_up = self.link_up if link_up is None else link_up
        self.filter = filter or self.filter
        self.open = self.link_up and self.filter.promiscuous

    def accepts(self, frame: bytes) -> bool:
        return self.link_up and self.filter.accepts(frame)


class Receiver:
    """From the network to the driver. Runs on its pair's thread alone."""

    def __init__(
        self, port: NetPort, queue: ServedQueue, gate: Gate, size: int, *, merged: bool
    ) -> None:
        self.queue = queue
        self.starved = False
        """The driver offers no room; its next kick does."""
        self.frames = self.bytes = self.dropped = self.filtered = self.copied = 0
        self._port, self._gate = port, gate
        self._size, self._merged = size, merged
        self._ahead: deque[Chain] = deque()
        """Taken from the ring, not used yet."""
        self._wide = 0
        self._offered = 0
        self._overflow = memoryview(bytearray(MAX_FRAME))
        self._held = b""
        """A frame that has been read and for which there was no room."""
        self._turns, self._ended = 1, 0.0

    def run(self) -> float:
        """Receive what there is; the seconds to pause after it.

        The path of every frame: what a small one needs is done here and not in calls.
        """
        gate, ahead, receive = self._gate, self._ahead, self._port.receive
        done: list[Used] = []
        self.starved, pause, turns = False, 0.0, 0
        limit = self._turns_now()
        while turns < limit:
            if self._held and not self._release_held(done):
                break
            if not ahead and not self._pop_ahead():
                break
            first = ahead[0]
            try:
                length = receive(self._wide_buffers() if self._wide else self._buffers(first))
            except BlockingIOError:
                break
            if not gate.open and not self._accepts(first):
                self.filtered += 1
            elif length > first.size:
                if not self._deliver_large(length, done):
                    break
            else:
                put_count(first.writable, 1)
                ahead.popleft()
                done.append((first.head, length))
                self.bytes += length - HEADER
                self.frames += 1
                self._wide -= self._wide > 0
            turns += 1
            if gate.limited and (pause := gate.limiter.take(length - HEADER)):
                break
        self._end(turns, done, full=turns == limit)
        return pause

    def _turns_now(self) -> int:
        """How many frames to ask for. Asking once too often costs as much as a frame: so one frame at
        first, and more while frames come so fast that the last run has hardly ended."""
        soon = time.monotonic() - self._ended < SOON
        return min(2 * self._turns, BATCH) if soon else 1

    def _end(self, turns: int, done: list[Used], *, full: bool) -> None:
        self._turns = turns or 1
        if done:
            self.queue.push_batch(done)
            self.queue.interrupt()
        if full and self._port.buffered:
            self.queue.kick_self()
        self._ended = time.monotonic()

    def stop(self) -> None:
        """What was taken from the ring and not used comes again."""
        self.queue.unpop(len(self._ahead))
        self._ahead.clear()
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

    # -- room -------------------------------------------------------------------------------------

    def _pop_ahead(self) -> bool:
        """Take more chains from the ring. ``False``: there are none, and a kick tells of the next."""
        while not self._top_up():
            if not self.queue.enable_notifications():
                self.starved = True
                return False
        return True

    def _top_up(self) -> bool:
        chains = self.queue.pop_batch(AHEAD)
        for chain in chains:
            if chain.readable or len(chain.writable) != 1:
                _check(chain)
        self._ahead += chains
        return bool(chains)

    def _buffers(self, first: Chain) -> list[memoryview]:
        self._offered = first.size
        return [*first.writable, self._overflow]

    def _wide_buffers(self) -> list[memoryview]:
        if len(self._ahead) < AHEAD:
            self._top_up()
        buffers: list[memoryview] = []
        room = 0
        for chain in self._ahead:
            if room >= MAX_FRAME or len(buffers) + len(chain.writable) >= MAX_BUFFERS:
                break
            buffers += chain.writable
            room += chain.size
        self._offered = room
        buffers.append(self._overflow)
        return buffers

    # -- frames -----------------------------------------------------------------------------------

    def _accepts(self, first: Chain) -> bool:
        start = first.writable[0][:PEEK]
        if len(start) < PEEK:
            pieces, _ = take([*first.writable, self._overflow], PEEK)
            return self._gate.accepts(b"".join(pieces)[HEADER:])
        return self._gate.accepts(bytes(start[HEADER:]))

    def _deliver_large(self, length: int, done: list[Used]) -> bool:
        """§5.1.6.3.2: a frame in several chains, of which the first one tells how many. ``False`` if it
        has to wait for room."""
        if not self._merged:
            self.dropped += 1
            return True
        self._wide = WIDE_FOR
        ahead, left = self._ahead, length
        taken: list[Chain] = []
        while left > 0:
            if not ahead and not self._pop_ahead():
                ahead.extendleft(reversed(taken))
                return not self._hold(length)
            taken.append(chain := ahead.popleft())
            left -= chain.size
        if (over := length - self._offered) > 0:
            views = [view for chain in taken for view in chain.writable]
            scatter(take(views, self._offered)[1], self._overflow[:over])
            self.copied += over
        put_count(taken[0].writable, len(taken))
        done += [(chain.head, chain.size) for chain in taken]
        done[-1] = (chain.head, chain.size + left)
        self.frames += 1
        self.bytes += length - HEADER
        return True

    def _hold(self, length: int) -> bool:
        """Keep the frame until the driver offers more; ``False`` if it is dropped."""
        if len(self._ahead) >= self._size:  # the whole ring is not enough: it never will be
            self.starved = False
            self.dropped += 1
            return False
        views = [view for chain in self._ahead for view in chain.writable]
        pieces, _ = take(views, min(self._offered, length))
        self._held = b"".join([*pieces, self._overflow[: length - total(pieces)]])
        return True

    def _release_held(self, done: list[Used]) -> bool:
        """The same as if it had been read now, into ``overflow`` alone."""
        frame, self._held = self._held, b""
        self._overflow[: len(frame)] = frame
        self._offered = 0
        return self._deliver_large(len(frame), done)


def _check(chain: Chain) -> None:
    """A chain to receive into that is not a single buffer."""
    if not 0 < len(chain.writable) < MAX_BUFFERS:
        raise QueueError(f"a receive buffer of {len(chain.writable)} pieces")
    chain.size = total(chain.writable)


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
        self.frames = self.bytes = self.dropped = 0
        self._port, self._gate = port, gate

    def run(self) -> float:
        """Send what there is; the seconds to pause after it."""
        queue = self.queue
        queue.disable_notifications()
        chains = queue.pop_batch(BATCH)
        done: list[Used] = []
        self.blocked, pause = False, 0.0
        for chain in chains:
            if not self._send(chain):
                break
            done.append((chain.head, 0))
            if self._gate.limited and (pause := self._gate.limiter.take(chain.size - HEADER)):
                break
        queue.unpop(len(chains) - len(done))
        if done:
            queue.push_batch(done)
            queue.interrupt()
        self.blocked = self.blocked or self._port.unsent
        if (
            not self.blocked
            and not pause
            and (len(chains) == BATCH or queue.enable_notifications())
        ):
            queue.kick_self()
        return pause

    def _send(self, chain: Chain) -> bool:
        """``False`` if the port has no room. What the host refuses is dropped, as a wire would."""
        if not HEADER < chain.size <= MAX_FRAME or not self._gate.link_up:
            self.dropped += 1
            return True
        try:
            self._port.send(chain.readable)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError:
            self.dropped += 1
            return True
        self.frames += 1
        self.bytes += chain.size - HEADER
        return True

    def statistics(self) -> dict[str, int]:
        counts = {"frames": self.frames, "bytes": self.bytes, "dropped": self.dropped}
        return {**counts, **self.queue.statistics()}
