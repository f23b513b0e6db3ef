"""The same guests on the host's KVM and on the software hypervisor: each of its cores, each way of paging.

All that a guest says, leaves in memory and writes to devices must be the same, byte by byte. Where the host's
KVM cannot run a guest, the text of the table stands for it (KVM on another host has been held against that:
``test_mini.py``), and the four ways of ``soft`` are still held against each other.
"""

from __future__ import annotations

import functools
from typing import get_args

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft import mini
from hostel.spec import Paging, Trap
from soft.mini_rig import Outcome, on_kvm, on_soft, play, statistics
from soft.mini_subjects import kvm_lacks

WAYS: list[tuple[Paging, Trap]] = [
    (paging, trap) for paging in get_args(Paging) for trap in get_args(Trap)
]
VARIANTS: list[tuple[str, dict[str, int]]] = [
    ("syscall", {"gate": 1}),
    ("switch", {"kernel_global": 1}),
    ("timer", {"x2apic": 0}),
    ("windows", {"x2apic": 0}),
    ("ipi", {"x2apic": 0, "rounds": 5}),
    ("migrate", {"cpus": 4, "threads": 6, "yields": 5}),
]
SUBJECTS = [(name, dict[str, int]()) for name in mini.names()] + VARIANTS

TASKS = "QEMU's SVM does not intercept task switches: CR3 becomes what the guest's TSS says"
NOT_ON_SOFT = {
    ("tasks", "shadow", "intercept"): TASKS,
}
"""Known, and strict: what begins to work must leave this list."""


def parameter(name: str, parameters: dict[str, int], paging: Paging, trap: Trap) -> object:
    reason = NOT_ON_SOFT.get((name, paging, trap))
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    words = "-".join([name, *(f"{key}{value}" for key, value in parameters.items()), paging, trap])
    return pytest.param(name, parameters, paging, trap, id=words, marks=marks)


@functools.cache
def reference(name: str, parameters: tuple[tuple[str, int], ...]) -> Outcome:
    """What there has to be."""
    if not kvm_lacks(name):
        return play(on_kvm, name, **dict(parameters))
    first = play(on_soft("ept", "translate"), name, **dict(parameters))
    guest = mini.guest(name)
    return Outcome(guest.ends, guest.console, first.results, first.writes)


@pytest.mark.parametrize(
    ("name", "parameters", "paging", "trap"),
    [parameter(*subject, *way) for subject in SUBJECTS for way in WAYS],
)
def test_the_same_on_soft(
    name: str, parameters: dict[str, int], paging: Paging, trap: Trap
) -> None:
    expected = reference(name, tuple(parameters.items()))
    outcome = play(on_soft(paging, trap), name, **parameters)
    assert outcome.console == expected.console
    assert outcome == expected


@pytest.mark.parametrize("name", ["demand", "syscall", "timer"])
@pytest.mark.parametrize(("paging", "trap"), WAYS)
def test_the_same_every_time(name: str, paging: Paging, trap: Trap) -> None:
    """Not only what it says: each kind of exit is counted alike, and every instruction."""
    first = statistics(on_soft(paging, trap), name)
    assert first["instructions"] > 1000
    assert statistics(on_soft(paging, trap), name) == first
