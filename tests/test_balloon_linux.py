"""Linux with a balloon, on both engines: what the guest frees goes back to the host, and comes again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from hostel.errors import UserError
from hostel.machine import Machine
from hostel.spec import EngineName

MIB = 1 << 20
SIZE, SMALL, FILE = 512 * MIB, 448 * MIB, 64 * MIB
PATIENCE = 240.0
WRITE = f"head -c {FILE} /dev/zero > /scratch/file && stat -c %s /scratch/file"
ENGINES = [
    pytest.param("qemu", marks=[pytest.mark.qemu, pytest.mark.slow]),
    pytest.param("kvm", marks=[pytest.mark.linux_kvm, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=ENGINES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    engine: EngineName = request.param
    with Machine(engine=engine, memory=SIZE, balloon=True, tmpfs=("/scratch",)) as machine:
        yield machine


def resident(machine: Machine) -> int:
    """Bytes of the host's memory that the machine holds."""
    counters = machine.statistics()
    return int(counters.get("memory_allocated") or counters["resident_bytes"])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def has(machine: Machine, size: int) -> bool:
    state = machine.balloon()
    return state.actual == state.target == size


def fill(machine: Machine) -> None:
    result = machine.exec(["sh", "-c", WRITE], user="root")
    assert result.stdout == b"%d\n" % FILE, result.stderr


def empty(machine: Machine) -> None:
    machine.exec(["rm", "/scratch/file"], user="root")


def test_freed_memory_comes_back(machine: Machine) -> None:
    """By reports: nobody asks for it."""
    before = resident(machine)
    fill(machine)
    full = resident(machine)
    assert full - before > FILE // 2
    assert eventually(lambda: machine.balloon().statistics["free_memory"] < SIZE - FILE)
    empty(machine)
    assert eventually(lambda: full - resident(machine) > FILE * 3 // 4)
    fill(machine)  # it can be had again
    empty(machine)


def test_a_target(machine: Machine) -> None:
    assert has(machine, SIZE)
    fill(machine)
    full = resident(machine)
    empty(machine)
    assert machine.balloon("448M").target == SMALL
    assert eventually(lambda: has(machine, SMALL))
    assert full - resident(machine) > FILE * 3 // 4
    assert eventually(lambda: machine.balloon().statistics["free_memory"] < SMALL)
    machine.balloon(SIZE)
    assert eventually(lambda: has(machine, SIZE))
    fill(machine)
    assert full - resident(machine) < FILE // 4
    empty(machine)


def test_what_cannot_be_a_target(machine: Machine) -> None:
    with pytest.raises(UserError, match="can be 32M to 512M large, not 1024M"):
        machine.balloon("1G")
    with pytest.raises(UserError, match="not 0M"):
        machine.balloon(0)
    assert has(machine, SIZE)


def test_a_machine_without_one() -> None:
    with pytest.raises(UserError, match="the machine has no balloon; start it with balloon=True"):
        Machine().balloon()
