"""Several machines' vCPUs on two pCPUs: shares, migration, and a guest that moves its own threads."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hostel.soft import mini
from hostel.soft.schedule.queue import WEIGHT
from hostel.soft.schedule.runnable import Slice
from hostel.soft.schedule.scheduler import Scheduler
from hostel.soft.schedule.vcpu import ScheduledVcpu
from hostel.soft.vmx.events import TraceEvent

from . import Drawing, Report, Step, Table, none_of
from .draw import Span, timeline
from .stage import Stage
from .vmx import tell

QUESTION = (
    "Four machines with five vCPUs on two pCPUs: who runs where, for how long, and what does it take to move "
    "a vCPU? One machine moves threads over its two vCPUs itself, by interrupts that it sends between them: "
    "its scheduler and ours know nothing of each other."
)
PCPUS = 2
SLICE = 20_000


class Part(msgspec.Struct, frozen=True):
    """A machine of the play."""

    mark: str
    guest: str
    what: str
    weight: int = WEIGHT
    pcpus: tuple[int, ...] | None = None
    parameters: dict[str, int] = {}


PARTS = (
    Part("A", "compute", "computes, weight 2", 2 * WEIGHT, parameters={"rounds": 60_000}),
    Part("B", "compute", "computes, weight 1", parameters={"rounds": 60_000}),
    Part("P", "compute", "computes, pinned to pCPU 1", pcpus=(1,), parameters={"rounds": 20_000}),
    Part("T", "migrate", "three threads over two vCPUs", parameters={"yields": 12, "work": 400}),
)


class Play:
    """All of them, run to their ends."""

    def __init__(self, stage: Stage, parts: Sequence[Part]) -> None:
        self.stage = stage
        self.slices: list[Slice] = []
        self.actors = {
            part.mark: stage.actor(part.guest, "ept", **part.parameters) for part in parts
        }
        self.scheduler = Scheduler(stage.host.pcpus, slice=SLICE)
        self.scheduler.on_slice = self.slices.append
        self.entries = {
            vcpu.name: self.scheduler.add(vcpu, weight=part.weight, pcpus=part.pcpus)
            for part in parts
            for vcpu in self._vcpus(part)
        }
        self.scheduler.run()

    def _vcpus(self, part: Part) -> list[ScheduledVcpu]:
        actor = self.actors[part.mark]
        return [
            ScheduledVcpu(f"{part.mark}/{vcpu.id}", vcpu, actor.has_ended_by)
            for vcpu in actor.vcpus
        ]

    def lanes(self) -> dict[str, list[Span]]:
        lanes: dict[str, list[Span]] = {f"pCPU {id}": [] for id in self.scheduler.pcpus}
        for slice in self.slices:
            lanes[f"pCPU {slice.pcpu}"].append(Span(slice.start, slice.end, slice.vcpu[0]))
        return lanes

    def shares(self) -> dict[str, float]:
        """Of the two pCPUs' time, per cent, while all were there."""
        end = min(self._end(mark) for mark in self.actors)
        ran = dict.fromkeys(self.actors, 0)
        for slice in self.slices:
            if slice.end <= end:
                ran[slice.vcpu[0]] += slice.end - slice.start
        return {mark: 100 * time / (PCPUS * end) for mark, time in ran.items()}

    def _end(self, mark: str) -> int:
        return max(slice.end for slice in self.slices if slice.vcpu[0] == mark)

    def move(self) -> tuple[Slice, list[TraceEvent]]:
        """The first migration, and what the pCPUs did for it: up to the entry on the new one."""
        moved = next(slice for slice in self.slices if slice.came_from is not None)
        vmcs = self.actors[moved.vcpu[0]].vcpus[int(moved.vcpu[2:])].vmcs
        trace = self.stage.trace
        at = next(
            n
            for n, event in enumerate(trace)
            if event.pcpu == moved.pcpu and event.what == "VMPTRLD" and event.time >= moved.start
        )
        before = [
            event
            for event in trace[:at]
            if (event.pcpu, event.what, event.operands) == (moved.came_from, "VMCLEAR", (vmcs,))
        ]
        after = [event for event in trace[at:] if event.pcpu == moved.pcpu]
        entry = next(n for n, event in enumerate(after) if event.what in ("VMLAUNCH", "VMRESUME"))
        return moved, [before[-1], *after[: entry + 1]]


def _alone(part: Part) -> mini.Results:
    with Stage() as stage:
        actor = stage.actor(part.guest, "ept", **part.parameters)
        actor.play()
        return mini.results(actor.memory)


def run(arguments: Sequence[str] = ()) -> Report:
    none_of("schedule", arguments)
    with Stage(PCPUS, traced=True) as stage:
        play = Play(stage, PARTS)
        lanes, shares = play.lanes(), play.shares()
        moved, trace = play.move()
        left = {mark: mini.results(actor.memory) for mark, actor in play.actors.items()}
        vpids = {vcpu.vpid for actor in play.actors.values() for vcpu in actor.vcpus}
    same = [part.mark for part in PARTS if _alone(part) == left[part.mark]]
    statistics = {name: entry.statistics for name, entry in play.entries.items()}
    steps = (
        Step(
            "scheduler",
            f"moves {moved.vcpu} from pCPU {moved.came_from} to pCPU {moved.pcpu}; times are by the clock of "
            "the pCPU that acts",
            moved.start,
        ),
        *tell(trace),
        *(Step("guest T", line) for line in play.actors["T"].words.splitlines()),
    )
    migrations = sum(one.migrations for one in statistics.values())
    return Report(
        lab="schedule",
        question=QUESTION,
        steps=steps,
        drawings=(Drawing("Who has each pCPU, in guest instructions", tuple(timeline(lanes))),),
        tables=(
            Table(
                "Machines",
                ("mark", "what", "weight", "share while all run, %"),
                tuple((p.mark, p.what, p.weight // WEIGHT, shares[p.mark]) for p in PARTS),
            ),
            Table(
                "vCPUs",
                ("vCPU", "ran", "waited", "slices", "wakes", "migrations"),
                tuple(
                    (name, one.ran, one.waited, one.slices, one.wakes, one.migrations)
                    for name, one in statistics.items()
                ),
            ),
        ),
        conclusions=(
            f"{migrations} migrations; each is VMCLEAR on the old pCPU, then VMPTRLD and VMLAUNCH on the "
            "new one. The VMCS is in memory in between, and on one pCPU at a time.",
            f"Left the same in memory as when they run alone: {', '.join(same)}, of "
            f"{', '.join(part.mark for part in PARTS)}. {len(statistics)} vCPUs have {len(vpids)} VPIDs: of "
            "two that differ, no translation of one is ever taken for the other's.",
            "T moves a thread from one vCPU to the other by an interrupt that it sends itself. To the "
            "hypervisor both vCPUs are only things to run: any thread of the guest may be on either, on "
            "whichever pCPU.",
        ),
        page="docs/schedule.md",
    )
