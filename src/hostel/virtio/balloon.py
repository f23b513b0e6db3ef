"""The memory balloon (virtio 1.2 §5.5): a guest's memory goes back to the host, and can be had again.

::

    set_target ─► num_pages, config change ─► driver
    driver ─ inflateq: page numbers ─► holes in guest memory        ─ actual ─► us
           ─ deflateq: page numbers ─► nothing: the next touch brings a page of zeros
           ─ reportq:  free ranges  ─► holes in guest memory; the driver may use them at any time
           ─ statsq:   one buffer   ─► kept; given back to ask for the next (§5.5.6.3)

Page numbers are the guest's word: one outside its memory stops the device. What is merged, and how much
is done in one turn, is bounded here: no request is worth more than ``MOST`` page numbers.

The host's page may be larger than the balloon's 4 KiB (hugepages): it is given back once the balloon
holds all of it. That is why the driver has to tell us before it uses a page again (MUST_TELL_HOST):
else a page that was just taken out could go with its neighbours.

The reporting queue is number 4, and 3 with drivers that number the queues they have (Linux, before it
was corrected; QEMU does the same): without FREE_PAGE_HINT nothing else has these numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hostel.abi import virtio as abi
from hostel.errors import HostError
from hostel.memory import GuestMemory
from hostel.vmm.loop import EventLoop

from .device import RING_FEATURES, QueueWiring
from .plane import QueueDevice, ServedQueue
from .queue import Chain, take

INFLATE, DEFLATE, STATISTICS = range(3)
PAGE = 1 << abi.BALLOON_PFN_SHIFT
MOST = 4096
"""Page numbers that are heard of one request, and in one turn of the event loop. Linux sends 256. More
are not given back, which costs the host memory and the guest nothing."""
MOST_STATISTICS = 64
STATISTICS_SECONDS = 2.0
"""How long a guest that is busy may take for its statistics."""

NAMES = {
    abi.BALLOON_S_SWAP_IN: "swap_in",
    abi.BALLOON_S_SWAP_OUT: "swap_out",
    abi.BALLOON_S_MAJFLT: "major_faults",
    abi.BALLOON_S_MINFLT: "minor_faults",
    abi.BALLOON_S_MEMFREE: "free_memory",
    abi.BALLOON_S_MEMTOT: "total_memory",
    abi.BALLOON_S_AVAIL: "available_memory",
    abi.BALLOON_S_CACHES: "disk_caches",
    abi.BALLOON_S_HTLB_PGALLOC: "hugetlb_allocations",
    abi.BALLOON_S_HTLB_PGFAIL: "hugetlb_failures",
}
"""Of §5.5.6.4, in this order; memory in bytes."""


class Balloon(QueueDevice):
    """``size``: the guest's memory without it."""

    device_id = abi.ID_BALLOON
    features = (
        1 << abi.F_VERSION_1
        | RING_FEATURES
        | 1 << abi.BALLOON_F_MUST_TELL_HOST
        | 1 << abi.BALLOON_F_STATS_VQ
        | 1 << abi.BALLOON_F_DEFLATE_ON_OOM
        | 1 << abi.BALLOON_F_REPORTING
    )
    queue_sizes = (128, 128, 16, 128, 128)  # Linux wants 32 entries for reporting

    def __init__(self, loop: EventLoop, size: int, *, name: str = "balloon") -> None:
        super().__init__(loop)
        self.name = name
        self.size = size
        self.given_back = 0
        """Bytes, all in all; those that came back and went again count again."""
        self._wanted = 0
        self._actual = 0
        self._fill_config()
        self._held: Chain | None = None
        self._statistics: dict[str, int] = {}
        self._answers = 0
        self._answered = threading.Condition(self.lock)
        self._serve: dict[int, Callable[[ServedQueue, Chain], int]] = {
            INFLATE: self._inflate,
            DEFLATE: self._deflate,
            STATISTICS: self._keep,
        }

    # -- from the host's side, on any thread ----------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes that the guest shall have."""
        return self.size - self._wanted * PAGE

    @property
    def actual(self) -> int:
        """Bytes that the guest says it has."""
        return max(0, self.size - self._actual * PAGE)

    def set_target(self, size: int) -> None:
        """The driver is told; it takes its time."""
        self._wanted = (self.size - size) // PAGE
        self._fill_config()
        self.config_changed()

    def ask_statistics(self, timeout: float = STATISTICS_SECONDS) -> dict[str, int]:
        """The guest's present ones, or the last ones if it does not answer; empty without a driver."""
        with self.lock:
            if (queue := self.queues.get(STATISTICS)) is not None:
                before = self._answers
                self._give_back(queue)
                self._answered.wait_for(
                    lambda: self._answers != before or queue.index not in self.queues, timeout
                )
            return dict(self._statistics)

    # -- config space (§5.5.4) ------------------------------------------------------------------

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == abi.BALLOON_CONFIG.offsets["actual"] and len(data) == 4:
            self._actual = int.from_bytes(data, "little")
            self._fill_config()

    def _fill_config(self) -> None:
        self.config = abi.BALLOON_CONFIG.pack(self._wanted, self._actual, 0, 0)

    # -- queues ---------------------------------------------------------------------------------

    def activate(self, memory: GuestMemory, features: int, queues: Sequence[QueueWiring]) -> None:
        with self.lock:
            self._memory = memory
            self._whole = WholePages(memory.page)
            super().activate(memory, features, queues)

    def stopping(self) -> None:
        self._held = None
        self._actual = 0
        self._fill_config()
        self._statistics = {}
        self._answered.notify_all()

    def serve(self, queue: ServedQueue) -> None:
        work = self._serve.get(queue.index, self._report)
        left = MOST
        try:
            for chain in queue.chains():
                left -= work(queue, chain)
                if left <= 0:
                    queue.kick_self()
                    break
        except HostError as error:
            self.broken(error)
            return
        queue.interrupt()

    def _inflate(self, queue: ServedQueue, chain: Chain) -> int:
        """All is checked before anything is given back."""
        pages = _page_numbers(chain)
        views = [self._view(first, count) for first, count in _ranges(pages)]
        if self._memory.page > PAGE:
            views = [self._view(first, count) for first, count in self._whole.add(pages)]
        self.given_back += self._memory.discard(views)
        queue.push(chain, 0)
        return len(pages)

    def _deflate(self, queue: ServedQueue, chain: Chain) -> int:
        pages = _page_numbers(chain)
        if self._memory.page > PAGE:
            self._whole.remove(pages)
        queue.push(chain, 0)
        return len(pages)

    def _report(self, queue: ServedQueue, chain: Chain) -> int:
        """§5.5.6.7: the buffers are the free memory itself, in pieces of 2 MiB and more."""
        self.given_back += self._memory.discard(chain.writable)
        queue.push(chain, 0)
        return MOST

    def _view(self, first: int, count: int) -> memoryview:
        return self._memory.view(first * PAGE, count * PAGE)

    def _keep(self, queue: ServedQueue, chain: Chain) -> int:
        """A driver has one such buffer; of more, the last counts."""
        self._give_back(queue)
        self._held = chain
        self._statistics = _statistics(chain)
        self._answers += 1
        self._answered.notify_all()
        return MOST_STATISTICS

    def _give_back(self, queue: ServedQueue) -> None:
        if self._held is not None:
            queue.push(self._held, 0)
            self._held = None
            queue.interrupt()

    # -- state ----------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The buffer that is kept counts as not yet taken: it comes again."""
        with self.lock:
            state = super().save()
            for position in state["queues"]:
                if position[0] == STATISTICS and self._held is not None:
                    position[1] = (position[1] - 1) & 0xFFFF
            return {**state, "wanted": self._wanted, "actual": self._actual}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._wanted, self._actual = state["wanted"], state["actual"]
        self._fill_config()

    def statistics(self) -> dict[str, Any]:
        return {
            **super().statistics(),
            "target": self.target,
            "actual": self.actual,
            "given_back": self.given_back,
        }


class WholePages:
    """Of each of the host's pages, larger than the balloon's: which parts the balloon holds."""

    def __init__(self, page: int) -> None:
        self._parts = page // PAGE
        self._full = (1 << self._parts) - 1
        self._masks: dict[int, int] = {}

    def add(self, pages: Iterable[int]) -> list[tuple[int, int]]:
        """The runs of pages that can be given back now. ``pages`` are inside guest memory."""
        complete = set()
        for page in pages:
            whole, part = divmod(page, self._parts)
            mask = self._masks[whole] = self._masks.get(whole, 0) | 1 << part
            if mask == self._full:
                complete.add(whole)
        return [(whole * self._parts, self._parts) for whole in complete]

    def remove(self, pages: Iterable[int]) -> None:
        for page in pages:
            whole, part = divmod(page, self._parts)
            if mask := self._masks.get(whole, 0) & ~(1 << part):
                self._masks[whole] = mask
            else:
                self._masks.pop(whole, None)


def _page_numbers(chain: Chain) -> memoryview:
    head, _ = take(chain.readable, MOST * 4)
    data = b"".join(head)
    return memoryview(data[: len(data) & ~3]).cast("I")


def _ranges(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: the first, and how many."""
    first = count = 0
    for page in sorted(set(pages)):
        if count and page == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def _statistics(chain: Chain) -> dict[str, int]:
    """Tags that we do not know are left out, as §5.5.6.3.2 wants it."""
    head, _ = take(chain.readable, MOST_STATISTICS * abi.BALLOON_STAT.size)
    data = b"".join(head)
    found = {}
    for at in range(0, len(data) - abi.BALLOON_STAT.size + 1, abi.BALLOON_STAT.size):
        tag, value = abi.BALLOON_STAT.unpack_from(data, at)
        if tag in NAMES:
            found[NAMES[tag]] = value
    return found
