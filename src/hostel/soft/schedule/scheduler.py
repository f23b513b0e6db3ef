"""vCPUs on pCPUs: each slice is the next that can begin, on whichever pCPU it can begin first.

A pCPU's TSC is its clock. What is idle does not tick: its clock jumps when it has something to run again.
A vCPU is *available* from a moment on: from the end of its last slice, or from when it is woken. So it is
never on two pCPUs at once, though one thread runs them one after another.

Migration, step by step: VMCLEAR on the old pCPU (``unload``); on the new one VMPTRLD, INVVPID of its
VPID, VMLAUNCH (all by ``run``). A VMCS that was not cleared is refused there: ``VmxMisuse``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hostel.errors import UserError
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.schedule.queue import WEIGHT, Entry, Queue
from hostel.soft.schedule.runnable import PcpuStatistics, Runnable, Slice, Stop

SLICE = 50_000
"""Guest instructions: what a vCPU gets at most before others are asked."""
LEAST = 1_000
"""What it gets at least, whoever may be about to wake: an entry and an exit must be worth it."""


class Scheduler:
    """Not thread-safe, as the pCPUs are not."""

    def __init__(self, pcpus: Sequence[PhysicalCpu], *, slice: int = SLICE) -> None:
        if not pcpus or slice < LEAST:
            raise UserError(f"a scheduler needs pCPUs, and slices of at least {LEAST} instructions")
        self.pcpus = {pcpu.id: pcpu for pcpu in pcpus}
        self.slice = slice
        self.queue = Queue(slice, len(pcpus))
        self.entries: dict[str, Entry] = {}
        self.statistics = {pcpu.id: PcpuStatistics() for pcpu in pcpus}
        self.on_slice: Callable[[Slice], None] | None = None
        self._last: dict[int, Entry] = {}
        self._arrivals = 0
        self._moment = 0
        """When the last slice ended: what came for a sleeper came no later."""

    # --- Who takes part ---

    def add(
        self,
        runnable: Runnable,
        *,
        weight: int = WEIGHT,
        priority: int = 0,
        pcpus: Iterable[int] | None = None,
    ) -> Entry:
        """``pcpus``: where it may run; one: pinned. Of two priorities the higher goes always first."""
        if runnable.name in self.entries:
            raise UserError(f"there is a vCPU named {runnable.name} already")
        if weight < 1:
            raise UserError(f"the weight of {runnable.name} is {weight}; at least 1")
        entry = Entry(runnable, self._arrivals, weight, priority, self._allowed(pcpus))
        entry.available = self._moment
        self.queue.woken(entry)
        self._arrivals += 1
        self.entries[runnable.name] = entry
        return entry

    def remove(self, name: str) -> None:
        """It is unloaded, and its VMCS may be freed."""
        entry = self.entries.pop(name)
        entry.runnable.unload()
        self._last = {pcpu: last for pcpu, last in self._last.items() if last is not entry}

    def place(self, name: str, pcpus: Iterable[int] | None) -> None:
        """Where it may run from now on; None: anywhere."""
        self.entries[name].allowed = self._allowed(pcpus)

    def _allowed(self, pcpus: Iterable[int] | None) -> frozenset[int]:
        known = frozenset(self.pcpus)
        allowed = known if pcpus is None else frozenset(pcpus)
        if not allowed or not allowed <= known:
            raise UserError(
                f"no vCPU can run on pCPUs {sorted(allowed)}",
                cure=f"there are {sorted(known)}: name at least one of them",
            )
        return allowed

    # --- Running ---

    def run(self, until: int | None = None) -> None:
        """Until all have ended, or sleep with nothing to wake them; or no slice begins before ``until``."""
        while (next_slice := self._next()) is not None:
            pcpu, start = next_slice
            if until is not None and start >= until:
                return
            self._step(pcpu, start)

    def step(self) -> Slice | None:
        """One slice; None if nothing can run any more unless it is woken from outside."""
        next_slice = self._next()
        return None if next_slice is None else self._step(*next_slice)

    def _next(self) -> tuple[PhysicalCpu, int] | None:
        """The pCPU whose next slice can begin first, and when."""
        self._look_for_woken()
        begins = [
            (max(pcpu.tsc, min(times)), pcpu.id)
            for pcpu in self.pcpus.values()
            if (times := self._times(pcpu.id))
        ]
        if not begins:
            return None
        start, id = min(begins)
        return self.pcpus[id], start

    def _times(self, pcpu: int) -> list[int]:
        """From when on each that may run there is available."""
        times = (self._available(entry) for entry in self.entries.values() if pcpu in entry.allowed)
        return [time for time in times if time is not None]

    def _available(self, entry: Entry) -> int | None:
        if not entry.asleep:
            return entry.available
        alarm = entry.runnable.wakes_at()
        return None if alarm is None else max(alarm, entry.available)

    def _look_for_woken(self) -> None:
        """Something came for them while others ran: an interrupt, an answer."""
        for entry in self.entries.values():
            if entry.asleep and not entry.runnable.idle:
                self._wake(entry, self._moment)

    def _wake(self, entry: Entry, time: int) -> None:
        entry.asleep = False
        entry.available = max(entry.available, time)
        entry.statistics.wakes += 1
        self.queue.woken(entry)

    def _step(self, pcpu: PhysicalCpu, start: int) -> Slice:
        entry = self.queue.choose(pcpu.id, self._ready(pcpu.id, start))
        self.statistics[pcpu.id].idle += start - pcpu.tsc
        pcpu.tsc = start
        if entry.asleep:
            self._wake(entry, start)
        moved = entry.last if entry.last not in (None, pcpu.id) else None
        if moved is not None:
            entry.statistics.migrations += 1
            entry.runnable.unload()
        entry.statistics.waited += start - entry.available
        why = entry.runnable.run(pcpu, self._budget(entry, pcpu.id, start))
        pcpu.tsc = max(pcpu.tsc, start + 1)  # time moves on, whatever a vCPU does
        done = Slice(pcpu.id, start, pcpu.tsc, entry.runnable.name, why, moved)
        self._account(entry, done)
        return done

    def _ready(self, pcpu: int, start: int) -> list[Entry]:
        return [
            entry
            for entry in self.entries.values()
            if pcpu in entry.allowed
            and (time := self._available(entry)) is not None
            and time <= start
        ]

    def _budget(self, entry: Entry, pcpu: int, start: int) -> int:
        """A slice; less if one of higher priority is known to be available before it is over."""
        times = [
            time
            for other in self.entries.values()
            if other.priority > entry.priority
            and pcpu in other.allowed
            and (time := self._available(other)) is not None
        ]
        return max(LEAST, min([self.slice, *(time - start for time in times)]))

    def _account(self, entry: Entry, done: Slice) -> None:
        time = done.end - done.start
        entry.statistics.ran += time
        self.queue.charge(entry, time, self.entries.values())
        self._moment = done.end
        entry.last, entry.available = done.pcpu, done.end
        entry.asleep = done.why in (Stop.HALTED, Stop.BLOCKED)
        entry.statistics.slices += 1
        counted = self.statistics[done.pcpu]
        counted.busy += time
        counted.slices += 1
        counted.switches += self._last.get(done.pcpu) is not entry
        self._last[done.pcpu] = entry
        if done.why is Stop.ENDED:
            self.remove(entry.runnable.name)
        if self.on_slice is not None:
            self.on_slice(done)
