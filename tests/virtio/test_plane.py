"""A queue as the Python planes serve it: batches, turns, and when the driver is told."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.mock import DriverQueue
from hostel.virtio.plane import BATCH, ServedQueue
from hostel.virtio.queue import Queue


class Side:
    """The driver's queue, the device's, and the two eventfds between them."""

    def __init__(self, memory: GuestMemory) -> None:
        self.driver = DriverQueue(memory, 0x1000, 256)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        rings = (self.driver.desc, self.driver.avail, self.driver.used)
        wiring = QueueWiring(0, 256, *rings, self.kick, self.call)
        self.served = ServedQueue(memory, wiring, self.driver.features, (0, 0))

    def offer(self, count: int) -> None:
        for _ in range(count):
            self.driver.add([b"x"])

    def close(self) -> None:
        self.served.close()
        os.close(self.kick)
        os.close(self.call)


def told(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


@pytest.fixture
def side() -> Iterator[Side]:
    with GuestMemory(4 << 20) as memory:
        side = Side(memory)
        yield side
        side.close()


def test_as_many_at_a_time_as_there_are(side: Side) -> None:
    side.offer(11)
    assert [len(chains) for chains in side.served.batches(8)] == [8, 3]
    side.offer(2)
    assert len(list(side.served.chains())) == 2
    assert not told(side.kick)


def test_a_queue_with_much_to_do_lets_the_others_run(side: Side) -> None:
    side.offer(BATCH + 3)
    assert sum(len(chains) for chains in side.served.batches(5)) == BATCH
    assert told(side.kick), "and comes again"
    assert len(list(side.served.chains())) == 3
    assert not told(side.kick)


def test_the_driver_is_told_before_we_look_once_more(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on while we do; and what it offers meanwhile is seen without a kick."""
    enable, seen = Queue.enable_notifications, []

    def look(queue: Queue) -> bool:
        seen.append(told(side.call))
        if len(seen) == 1:
            side.offer(1)
        return enable(queue)

    monkeypatch.setattr(Queue, "enable_notifications", look)
    side.offer(2)
    for chain in side.served.chains():
        side.served.push(chain, 0)
    assert seen == [True, True], "once for the two, once for what came late"
    assert len(side.driver.completed()) == 3


def test_an_index_that_goes_to_and_fro_keeps_nobody_here(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """§2.7.6: it never goes back; a hostile driver's may, between two of our looks."""
    monkeypatch.setattr(Queue, "enable_notifications", lambda _: True)
    assert not list(side.served.batches(8))
    assert told(side.kick), "it is the others' turn"
