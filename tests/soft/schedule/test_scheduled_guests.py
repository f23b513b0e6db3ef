"""Machines with real code under the scheduler: they share pCPUs, move, wake one another, unaware of it."""

from __future__ import annotations

import pytest

from hostel.soft import mini
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.schedule.runnable import Slice
from hostel.spec import Paging, Trap
from soft.schedule.guests import Guests, guests

LONG = 200_000_000
"""Virtual time that no test comes near."""


def said_as_expected(played: Guests) -> list[tuple[str, str, bool]]:
    return [(guest.name, guest.ends, guest.said == guest.expected) for guest in played.guests]


def play(played: Guests, *names: str) -> list[Slice]:
    timeline: list[Slice] = []
    played.scheduler.on_slice = timeline.append
    for name in names:
        played.start(name)
    played.run(LONG)
    assert said_as_expected(played) == [(guest.name, "exit", True) for guest in played.guests]
    return timeline


@pytest.mark.parametrize("trap", ["translate", "intercept"])
@pytest.mark.parametrize("paging", ["ept", "shadow"])
@pytest.mark.parametrize(
    "names", [("rings", "switch", "fpu"), ("ipi", "migrate", "timer")], ids=" ".join
)
def test_machines_share_two_pcpus(paging: Paging, trap: Trap, names: tuple[str, ...]) -> None:
    with guests(2, paging=paging, trap=trap) as played:
        timeline = play(played, *names)
        for pcpu in (0, 1):
            machines = {slice.vcpu.split("/")[0] for slice in timeline if slice.pcpu == pcpu}
            assert len(machines) > 1
        assert any(slice.came_from is not None for slice in timeline)


def test_together_they_leave_in_memory_what_they_leave_alone() -> None:
    names = ("memory", "fork", "fpu")
    alone = []
    for name in names:
        with guests(1) as played:
            play(played, name)
            alone.append(mini.results(played.guests[0].memory))
    with guests(2, slice=3_000) as played:
        play(played, *names)
        assert [mini.results(guest.memory) for guest in played.guests] == alone


def test_all_on_one_pcpu() -> None:
    with guests(1) as played:
        timeline = play(played, "syscall", "fork", "ipi")
        assert {slice.pcpu for slice in timeline} == {0}


@pytest.mark.parametrize("trap", ["translate", "intercept"])
@pytest.mark.parametrize("paging", ["ept", "shadow"])
@pytest.mark.parametrize("name", ["invlpg", "churn", "switch", "fork"])
def test_a_guest_that_is_moved_after_each_slice_notices_nothing(
    name: str, paging: Paging, trap: Trap
) -> None:
    """They change their page tables: what one pCPU was told to forget, the other still remembers."""
    with guests(2, paging=paging, trap=trap, slice=1_000) as played:
        played.scheduler.on_slice = move = Mover(played)
        play_quietly(played, name)
        assert move.moves > 50


class Mover:
    def __init__(self, played: Guests) -> None:
        self.played = played
        self.moves = 0

    def __call__(self, done: Slice) -> None:
        if done.vcpu in self.played.scheduler.entries:
            self.moves += 1
            self.played.scheduler.place(done.vcpu, [1 - done.pcpu])


def play_quietly(played: Guests, name: str) -> None:
    played.start(name)
    played.run(LONG)
    assert said_as_expected(played) == [(f"{name}0", "exit", True)]


def test_without_invvpid_one_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moves without the step that makes them safe: the guest reads what it has long unmapped."""
    real = PhysicalCpu.invvpid

    def forget(cpu: PhysicalCpu, kind: int, vpid: int = 0, address: int = 0) -> None:
        if kind != 1:
            real(cpu, kind, vpid, address)

    monkeypatch.setattr(PhysicalCpu, "invvpid", forget)
    with guests(2, slice=1_000) as played:
        played.scheduler.on_slice = Mover(played)
        played.start("fork")
        played.run(LONG)
        assert said_as_expected(played) != [("fork0", "exit", True)]


def test_weights_of_machines() -> None:
    with guests(1, slice=10_000) as played:
        light, heavy = (played.start("compute", rounds=10_000_000) for _ in range(2))
        played.scheduler.entries[heavy.vcpus[0].name].weight = 3 * 1024
        played.run(8_000_000)
        ran = [
            played.scheduler.entries[guest.vcpus[0].name].statistics.ran for guest in (light, heavy)
        ]
        assert abs(ran[1] / sum(ran) - 0.75) < 0.01


def test_the_same_run_twice() -> None:
    lines = []
    for _ in range(2):
        with guests(2) as played:
            lines.append(play(played, "ipi", "rings"))
    assert lines[0] == lines[1]
