"""Who goes next: strict priority, then fairness by weight; and rather where it was before.

Fairness is by virtual runtime: a vCPU's time on pCPUs divided by its weight. The smallest goes next, so
that all of them grow alike and time is shared as the weights are.

- A weight that is worth more than one pCPU is counted as much as one pCPU is worth: a vCPU cannot be on
  two. Else its virtual runtime would fall behind for ever, and all the others' meaning with it.
- One that slept does not save up: when it wakes, its virtual runtime is at least what the least of those
  that it competes with has come to (``_floor``, one a pCPU and priority).
- A pCPU prefers a vCPU that was there last (its translations may still be in the TLB) to one that is less
  than a slice behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hostel.soft.schedule.runnable import Runnable, VcpuStatistics

WEIGHT = 1024
"""Of a vCPU that says nothing."""


class Entry(msgspec.Struct):
    """A vCPU as the scheduler knows it."""

    runnable: Runnable
    number: int
    """In the order of arrival: what decides between equals."""
    weight: int
    priority: int
    allowed: frozenset[int]
    """pCPUs; one of them: pinned."""
    vruntime: float = 0.0
    last: int | None = None
    """The pCPU it ran on."""
    asleep: bool = False
    available: int = 0
    """From when on it may run: it is on one pCPU at a time, and awake not before it is woken."""
    statistics: VcpuStatistics = msgspec.field(default_factory=VcpuStatistics)


class Queue:
    def __init__(self, slice: int, pcpus: int) -> None:
        self.slice = slice
        self.pcpus = pcpus
        self._floor: dict[tuple[int, int], float] = {}

    def choose(self, pcpu: int, ready: Iterable[Entry]) -> Entry:
        """Of those that may run on this pCPU now: there is one."""
        return min(ready, key=lambda entry: self._order(pcpu, entry))

    def _order(self, pcpu: int, entry: Entry) -> tuple[int, float, int]:
        stranger = entry.last is not None and entry.last != pcpu
        behind = self.slice * WEIGHT / entry.weight if stranger else 0.0
        return (-entry.priority, entry.vruntime + behind, entry.number)

    def charge(self, entry: Entry, time: int, entries: Iterable[Entry]) -> None:
        """``entry`` ran for so long among these."""
        rivals = [each for each in entries if not each.asleep and each.priority == entry.priority]
        weights = {each.number: float(each.weight) for each in rivals}
        _level(weights, sorted(weights, key=lambda number: -weights[number]), self.pcpus)
        entry.vruntime += time * WEIGHT / weights.get(entry.number, entry.weight)
        for pcpu in entry.allowed:
            self._raise_floor(
                pcpu, entry.priority, [e.vruntime for e in rivals if pcpu in e.allowed]
            )

    def _raise_floor(self, pcpu: int, priority: int, vruntimes: list[float]) -> None:
        if vruntimes:
            floor = self._floor.get((pcpu, priority), 0.0)
            self._floor[pcpu, priority] = max(floor, min(vruntimes))

    def woken(self, entry: Entry) -> None:
        floor = min(self._floor.get((pcpu, entry.priority), 0.0) for pcpu in entry.allowed)
        entry.vruntime = max(entry.vruntime, floor)


def _level(weights: dict[int, float], heaviest_first: list[int], pcpus: int) -> None:
    """Lower those that ask for more than a pCPU's share, the heaviest last, to just that."""
    if pcpus < 2 or len(heaviest_first) < 2:
        return
    heaviest, *rest = heaviest_first
    if weights[heaviest] * pcpus > sum(weights[number] for number in heaviest_first):
        _level(weights, rest, pcpus - 1)
        weights[heaviest] = sum(weights[number] for number in rest) / (pcpus - 1)
