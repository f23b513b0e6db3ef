"""Whose turn it is: the same machine gives the same trace, whatever the host's threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from guests.machine import PATIENCE, SPIN, machine, planned
from hostel.hypervisor import Interrupted
from hostel.monitor import Monitor
from hostel.plan import Ending
from hostel.soft import mini
from hostel.soft.lock import FairLock
from hostel.soft.vm import System
from hostel.spec import Soft

SMP = [
    ("ipi", 4, Soft()),
    ("migrate", 4, Soft()),
    ("migrate", 4, Soft(paging="shadow", trap="intercept")),
    ("timer", 1, Soft()),
]


def trace(name: str, cpus: int, soft: Soft, file: Path) -> str:
    """Of a run under the monitor: each exit, and when."""
    soft = msgspec.structs.replace(soft, trace=str(file))
    parameters = {"cpus": cpus} if cpus > 1 else {}
    with planned("", engine="soft", soft=soft, cpus=cpus) as plan:
        monitor = Monitor(msgspec.structs.replace(plan, kernel=mini.image(name, **parameters)))
        try:
            monitor.start()
            assert monitor.wait(PATIENCE) == Ending("debug-exit", code=1)
        finally:
            monitor.stop()
    return file.read_text()


@contextmanager
def busy_host() -> Iterator[None]:
    """Threads that want the interpreter, and so change who gets it when."""
    over = threading.Event()

    def burn() -> None:
        while not over.is_set():
            sum(range(500))
            time.sleep(0.0001)

    threads = [threading.Thread(target=burn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(("name", "cpus", "soft"), SMP)
def test_the_same_trace_each_time(name: str, cpus: int, soft: Soft, tmp_path: Path) -> None:
    first = trace(name, cpus, soft, tmp_path / "trace")
    assert len(first.splitlines()) > 50
    seen = {line.split()[2] for line in first.splitlines()[1:]}
    assert seen == {str(cpu) for cpu in range(cpus)}
    assert trace(name, cpus, soft, tmp_path / "trace") == first
    with busy_host():
        assert trace(name, cpus, soft, tmp_path / "trace") == first


def test_a_trace_counts_instructions(tmp_path: Path) -> None:
    """An instruction that exits is carried out by the hypervisor, and not counted."""
    file = tmp_path / "trace"
    soft = Soft(trace=str(file))
    source = "mov $3, %eax; 1: dec %eax; jnz 1b; out %al, $0xe9; mov $1, %al; out %al, $0xf4"
    with machine(source + SPIN, engine="soft", soft=soft) as monitor:
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=3)
    lines = [line.split() for line in file.read_text().splitlines()[1:]]
    assert [(line[0], line[3], line[4]) for line in lines if line[3] == "IO"] == [
        ("7", "IO", "0xe90040"),
        ("8", "IO", "0xf40040"),
    ]


# -- nobody waits for ever --------------------------------------------------------------------


SPIN_TOGETHER = "cli" + SPIN


def test_a_machine_whose_vcpus_wait_can_be_stopped() -> None:
    """One spins, three wait for a start-up message that never comes."""
    with machine(SPIN_TOGETHER, engine="soft", cpus=4) as monitor:
        time.sleep(0.05)
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 2
        assert monitor.wait(0) == Ending("stopped")


def test_a_machine_that_sleeps_for_ever_can_be_stopped() -> None:
    with machine("cli; hlt", engine="soft", cpus=2) as monitor:
        time.sleep(0.05)
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 2
        assert monitor.wait(0) == Ending("stopped")


def test_stop_while_it_starts() -> None:
    for _ in range(5):
        with planned(SPIN_TOGETHER, engine="soft", cpus=3) as plan:
            monitor = Monitor(plan)
            starter = threading.Thread(target=monitor.start)
            starter.start()
            monitor.stop()
            starter.join(PATIENCE)
            assert not starter.is_alive()
            assert monitor.wait(0) is not None


def test_a_kick_needs_no_turn() -> None:
    system = System()
    vm = system.create_vm()
    vcpus = [vm.create_vcpu(id) for id in range(2)]
    exits: list[object] = []
    waiting = threading.Thread(target=lambda: exits.append(vcpus[1].run()))
    waiting.start()  # its turn will never come: nobody runs vCPU 0
    vcpus[1].kick()
    waiting.join(PATIENCE)
    assert exits == [Interrupted()]
    vm.close()


def test_who_holds_the_machine_waits_for_no_slice() -> None:
    """Another thread looks at a vCPU while one spins: the spinning one comes out for it."""
    with machine(SPIN_TOGETHER, engine="soft", cpus=2) as monitor:
        assert monitor._board is not None
        other = monitor._board.vcpus[1]
        for _ in range(20):
            assert other.get_regs().rip == 0
        assert monitor.statistics()["soft"]["vcpus"][0]["external_interrupt"] > 0


def test_a_lock_is_given_in_order() -> None:
    lock, order = FairLock(), list[int]()
    lock.take()

    def queue(number: int) -> None:
        lock.take()
        order.append(number)
        lock.give()

    threads = [threading.Thread(target=queue, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(lock._queue) <= number:
            time.sleep(0.001)
    lock.give()
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [0, 1, 2, 3, 4]
