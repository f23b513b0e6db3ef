"""Fairness, priority, affinity, sleep and wake, migration: with vCPUs whose behaviour is written down."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostel.errors import UserError
from hostel.soft.physical import PhysicalMemory
from hostel.soft.schedule.runnable import Slice, Stop
from hostel.soft.schedule.scheduler import LEAST, Scheduler
from hostel.soft.vmx.events import TraceEvent
from hostel.soft.vmx.results import VmxMisuse
from soft.schedule.scripted import BUSY, Entered, Scripted, machine
from soft.vmx.vmx_world import World


def time_of(timeline: list[Slice], start: int = 0) -> Counter[str]:
    time: Counter[str] = Counter()
    for slice in timeline:
        if slice.start >= start:
            time[slice.vcpu] += slice.end - slice.start
    return time


def shares(timeline: list[Slice], start: int = 0) -> dict[str, float]:
    time = time_of(timeline, start)
    return {name: each / time.total() for name, each in time.items()}


# --- Fairness ---


@pytest.mark.parametrize(
    ("pcpus", "weights", "expected"),
    [
        (1, [1, 1], [1 / 2, 1 / 2]),
        (1, [3, 1], [3 / 4, 1 / 4]),
        (1, [512, 1024, 2048], [1 / 7, 2 / 7, 4 / 7]),
        (2, [1, 1, 1], [1 / 3, 1 / 3, 1 / 3]),
        (2, [2, 1, 1], [1 / 2, 1 / 4, 1 / 4]),
        (2, [100, 1, 1], [1 / 2, 1 / 4, 1 / 4]),
        (3, [100, 50, 1, 1], [1 / 3, 1 / 3, 1 / 6, 1 / 6]),
        (4, [7, 1], [1 / 2, 1 / 2]),
        (4, [1] * 7, [1 / 7] * 7),
    ],
    ids=str,
)
def test_time_is_shared_as_the_weights_are(
    pcpus: int, weights: list[int], expected: list[float]
) -> None:
    """Nobody gets more than one pCPU, whatever the weight: the rest is shared among the others."""
    with machine(pcpus) as (scheduler, timeline):
        for number, weight in enumerate(weights):
            scheduler.add(Scripted(f"v{number}"), weight=weight)
        scheduler.run(until=20_000_000)
        found = shares(timeline)
        for number, share in enumerate(expected):
            assert abs(found[f"v{number}"] - share) < 0.01, found


def test_who_sleeps_saves_nothing_up() -> None:
    """After a long sleep it gets its half, not all of what it slept through."""
    with machine(1) as (scheduler, timeline):
        sleeper = Scripted("sleeper", bursts=[1000, BUSY], sleep=10_000_000)
        scheduler.add(sleeper)
        scheduler.add(Scripted("worker"))
        scheduler.run(until=20_000_000)
        woke = next(slice.start for slice in timeline if slice.start > 10_000_000)
        assert abs(shares(timeline, woke)["worker"] - 0.5) < 0.01


def test_nor_does_one_that_slept_alone() -> None:
    with machine(1) as (scheduler, timeline):
        early = Scripted("early", bursts=[1000, BUSY])
        late = Scripted("late", bursts=[5_000_000, BUSY], sleep=1000)
        scheduler.add(early)
        scheduler.add(late)
        scheduler.run(until=4_000_000)
        early.woken = True
        scheduler.run(until=20_000_000)
        assert abs(shares(timeline, 5_100_000)["late"] - 0.5) < 0.01


def test_a_newcomer_does_not_take_all() -> None:
    with machine(1) as (scheduler, timeline):
        scheduler.add(Scripted("old"))
        scheduler.run(until=5_000_000)
        scheduler.add(Scripted("new"))
        scheduler.run(until=15_000_000)
        assert abs(shares(timeline, 5_000_000)["old"] - 0.5) < 0.01


def test_pinned_ones_on_a_crowded_pcpu_do_not_suffer_from_a_free_one() -> None:
    """The one alone on pCPU 1 gets thrice as much; who wakes on pCPU 0 is compared with its own rivals."""
    with machine(2) as (scheduler, timeline):
        scheduler.add(Scripted("alone"), pcpus=[1])
        for name in ("a", "b"):
            scheduler.add(Scripted(name), pcpus=[0])
        napper = Scripted("napper", bursts=[50_000] * 10_000, sleep=1000)
        scheduler.add(napper, pcpus=[0])
        scheduler.run(until=20_000_000)
        time = time_of(timeline)
        assert abs(time["alone"] / 20_000_000 - 1) < 0.01
        assert abs(time["a"] / time["b"] - 1) < 0.01
        assert 0.27 < time["napper"] / 20_000_000 < 0.34  # a nap costs it its turn


# --- Priority ---


def test_a_higher_priority_goes_always_first() -> None:
    with machine(1) as (scheduler, timeline):
        scheduler.add(Scripted("high"), priority=1, weight=1)
        scheduler.add(Scripted("low"), priority=0, weight=1000)
        scheduler.run(until=1_000_000)
        assert set(time_of(timeline)) == {"high"}


def test_a_timer_of_a_higher_priority_cuts_the_slice() -> None:
    with machine(1, slice=100_000) as (scheduler, timeline):
        scheduler.add(Scripted("high", bursts=[1000] * 50, sleep=30_000), priority=1)
        scheduler.add(Scripted("low"))
        scheduler.run(until=1_000_000)
        starts = [slice.start for slice in timeline if slice.vcpu == "high"]
        assert {later - first for first, later in pairwise(starts)} == {31_000}
        assert len(starts) > 30


def test_low_priority_gets_what_is_left() -> None:
    with machine(1) as (scheduler, timeline):
        scheduler.add(Scripted("high", bursts=[30_000] * 1000, sleep=10_000), priority=1)
        scheduler.add(Scripted("low"))
        scheduler.run(until=4_000_000)
        assert abs(shares(timeline)["low"] - 0.25) < 0.02


# --- Affinity and migration ---


def test_pinned_vcpus_stay() -> None:
    with machine(3) as (scheduler, timeline):
        for number in range(6):
            scheduler.add(Scripted(f"v{number}"), pcpus=[number % 3])
        scheduler.run(until=500_000)
        assert {(slice.vcpu, slice.pcpu) for slice in timeline} == {
            (f"v{n}", n % 3) for n in range(6)
        }
        assert all(entry.statistics.migrations == 0 for entry in scheduler.entries.values())


def test_a_mask_is_kept_and_can_be_changed() -> None:
    with machine(4) as (scheduler, timeline):
        for number in range(5):
            scheduler.add(Scripted(f"v{number}"))
        scheduler.place("v0", [1, 2])
        scheduler.run(until=500_000)
        assert {slice.pcpu for slice in timeline if slice.vcpu == "v0"} <= {1, 2}
        timeline.clear()
        scheduler.place("v0", [3])
        scheduler.run(until=1_000_000)
        assert {slice.pcpu for slice in timeline if slice.vcpu == "v0"} == {3}


def test_without_need_nobody_moves() -> None:
    with machine(2) as (scheduler, _):
        for number in range(4):
            scheduler.add(Scripted(f"v{number}"))
        scheduler.run(until=2_000_000)
        moves = sum(entry.statistics.migrations for entry in scheduler.entries.values())
        slices = sum(entry.statistics.slices for entry in scheduler.entries.values())
        assert moves < slices / 20


def test_migration_unloads_on_the_old_and_loads_on_the_new() -> None:
    with machine(2) as (scheduler, timeline):
        wanderer = Scripted("wanderer")
        scheduler.add(wanderer, pcpus=[0])
        scheduler.run(until=50_000)
        scheduler.place("wanderer", [1])
        scheduler.run(until=100_000)
        scheduler.place("wanderer", [0])
        scheduler.run(until=150_000)
        assert wanderer.log == ["load 0", "unload 0", "load 1", "unload 1", "load 0"]
        assert scheduler.entries["wanderer"].statistics.migrations == 2
        assert [slice.came_from for slice in timeline if slice.came_from is not None] == [0, 1]


def test_migration_is_vmclear_vmptrld_vmlaunch() -> None:
    """On real pCPUs; without the VMCLEAR the new one refuses."""
    with PhysicalMemory(frames=64) as memory:
        made = World(memory, 2)
        trace: list[TraceEvent] = []
        for cpu in made.cpus:
            cpu.vmxon(made.region())
            cpu.trace = trace.append
        scheduler = Scheduler(made.cpus)
        vcpu = Entered("m/0", made)
        scheduler.add(vcpu, pcpus=[0])
        scheduler.step()
        trace.clear()
        scheduler.place("m/0", [1])
        scheduler.step()
        scheduler.step()
        assert [(event.pcpu, event.what) for event in trace] == [
            (0, "VMCLEAR"),
            (1, "VMCLEAR"),
            (1, "VMPTRLD"),
            (1, "VMLAUNCH"),
            (1, "VM exit"),
            (1, "VMPTRLD"),
            (1, "VMRESUME"),
            (1, "VM exit"),
        ]
        vcpu.on = None  # forgets to clear it
        scheduler.place("m/0", [0])
        with pytest.raises(VmxMisuse, match="active on pCPU 1"):
            scheduler.step()


# --- Sleep and wake ---


def test_an_idle_pcpus_clock_jumps_to_the_alarm() -> None:
    with machine(1) as (scheduler, timeline):
        scheduler.add(Scripted("timer", bursts=[1000, 1000, 1000], sleep=500_000))
        scheduler.run()
        assert [(slice.start, slice.end, slice.why) for slice in timeline] == [
            (0, 1000, Stop.HALTED),
            (501_000, 502_000, Stop.HALTED),
            (1_002_000, 1_003_000, Stop.ENDED),
        ]
        assert scheduler.statistics[0].idle == 1_000_000
        assert scheduler.statistics[0].busy == 3000
        assert scheduler.entries == {}


@pytest.mark.parametrize("blocks", [False, True])
def test_what_sleeps_runs_only_when_woken(blocks: bool) -> None:
    with machine(1) as (scheduler, timeline):
        vcpu = Scripted("v", bursts=[1000, 1000], blocks=blocks)
        entry = scheduler.add(vcpu)
        scheduler.run()
        assert [slice.why for slice in timeline] == [Stop.BLOCKED if blocks else Stop.HALTED]
        assert scheduler.step() is None
        vcpu.woken = True
        last = scheduler.step()
        assert last is not None
        assert last.why is Stop.ENDED
        assert entry.statistics.wakes == 1


def test_who_is_woken_does_not_run_in_the_past() -> None:
    """pCPU 1 was idle since 0; what pCPU 0 woke at 20000 runs there from 20000 on."""
    with machine(2) as (scheduler, timeline):
        sleeper = Scripted("sleeper", bursts=[1, BUSY])
        scheduler.add(sleeper, pcpus=[1])
        scheduler.add(Scripted("waker"), pcpus=[0])
        while scheduler.pcpus[0].tsc < 20_000:
            scheduler.step()
        sleeper.woken = True
        scheduler.run(until=100_000)
        starts = [slice.start for slice in timeline if slice.vcpu == "sleeper"]
        assert starts[:2] == [0, 20_000]


# --- Always ---

BEHAVIOUR = st.fixed_dictionaries(
    {
        "bursts": st.lists(st.integers(500, 30_000), min_size=1, max_size=8),
        "sleep": st.integers(0, 60_000),
        "blocks": st.booleans(),
    }
)
VCPU = st.tuples(
    BEHAVIOUR, st.integers(1, 4096), st.integers(0, 2), st.sets(st.integers(0, 2), min_size=1)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VCPU, min_size=1, max_size=8))
def test_nothing_overlaps_and_nobody_starves(vcpus: list[Any]) -> None:
    with machine(3) as (scheduler, timeline):
        for number, (behaviour, weight, priority, pcpus) in enumerate(vcpus):
            vcpu = Scripted(f"v{number}", **behaviour)
            scheduler.add(vcpu, weight=weight, priority=priority, pcpus=pcpus)
        scheduler.run()
        assert scheduler.entries == {}  # everyone came to its end
        assert time_of(timeline) == Counter(
            {f"v{number}": sum(each[0]["bursts"]) for number, each in enumerate(vcpus)}
        )
        for key in ("pcpu", "vcpu"):
            for name in {getattr(slice, key) for slice in timeline}:
                line = sorted(
                    (slice.start, slice.end) for slice in timeline if getattr(slice, key) == name
                )
                assert all(first[1] <= later[0] for first, later in pairwise(line))
        for slice in timeline:
            assert slice.pcpu in vcpus[int(slice.vcpu[1:])][3]


def test_the_same_again_is_the_same() -> None:
    lines = []
    for _ in range(2):
        with machine(2) as (scheduler, timeline):
            for number in range(5):
                scheduler.add(Scripted(f"v{number}", bursts=[7000] * 20, sleep=3000 * number))
            scheduler.run()
            lines.append(list(timeline))
    assert lines[0] == lines[1]


def test_time_moves_even_if_a_vcpu_does_nothing() -> None:
    with machine(1) as (scheduler, timeline):
        scheduler.add(Scripted("stuck", bursts=[0, 0, 1]), weight=1)
        scheduler.run(until=100)
        assert all(slice.end > slice.start for slice in timeline)


def test_statistics_add_up() -> None:
    with machine(2) as (scheduler, timeline):
        entries = [scheduler.add(Scripted(f"v{number}")) for number in range(3)]
        scheduler.run(until=1_000_000)
        ran = sum(entry.statistics.ran for entry in entries)
        busy = sum(each.busy for each in scheduler.statistics.values())
        assert ran == busy == time_of(timeline).total()
        assert sum(entry.statistics.slices for entry in entries) == len(timeline)
        assert sum(entry.statistics.waited for entry in entries) > 900_000
        for number, each in scheduler.statistics.items():
            assert each.busy + each.idle == scheduler.pcpus[number].tsc
            assert 0 < each.switches <= each.slices


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"weight": 0}, "weight"),
        ({"pcpus": []}, "no vCPU can run"),
        ({"pcpus": [0, 9]}, r"there are \[0\]"),
    ],
)
def test_impossible_wishes_are_refused(arguments: dict[str, Any], what: str) -> None:
    with machine(1) as (scheduler, _), pytest.raises(UserError, match=what):
        scheduler.add(Scripted("v"), **arguments)


def test_names_are_unique_and_slices_not_too_short() -> None:
    with machine(1) as (scheduler, _):
        scheduler.add(Scripted("v"))
        with pytest.raises(UserError, match="already"):
            scheduler.add(Scripted("v"))
        with pytest.raises(UserError, match="at least"):
            Scheduler(list(scheduler.pcpus.values()), slice=LEAST - 1)
