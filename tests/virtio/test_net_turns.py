"""When a driver is told that its frames went: the turns of one pair, taken step by step, without its thread.

The other end is a socket; what it has sent before a step is there when the pair looks for answers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence

import pytest

from hostel.abi import virtio as abi
from hostel.abi import virtio_net as net_abi
from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.limit import Limiter
from hostel.virtio.mock import DriverQueue
from hostel.virtio.net_frames import LONG, Gate
from hostel.virtio.net_plane import Filter
from hostel.virtio.net_port import StreamPort
from hostel.virtio.net_python import HOLD, UNLIMITED, Pair
from hostel.virtio.plane import BATCH, ServedQueue
from virtio.netns import GUEST_MAC, HOST_MAC, frame
from virtio.rig import wait_fd
from virtio.wire import PLAIN, Wire

ANSWER = frame(b"answer")
QUESTION = PLAIN + frame(b"question", to=HOST_MAC, sender=GUEST_MAC)
SIZE = 128


class Watched(StreamPort):
    """Keeps what the driver could see when each frame was sent."""

    driver: DriverQueue
    seen: list[int]

    def send(self, buffers: Sequence[memoryview]) -> int:
        self.seen.append(self.driver.memory.read_u16(self.driver.used + 2))
        return super().send(buffers)


class Steps:
    """A pair whose thread has nothing to do."""

    def __init__(self, memory: GuestMemory) -> None:
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.wire = Wire(theirs)
        self.rx = DriverQueue(memory, 0x1000, SIZE, event_index=True)
        self.tx = DriverQueue(memory, 4 << 20, SIZE, heap=6 << 20, event_index=True)
        port = Watched(ours)
        port.driver, port.seen = self.tx, []
        self.seen = port.seen
        gate = Gate(Limiter(UNLIMITED))
        gate.set(filter=Filter(GUEST_MAC, promiscuous=True))
        self.receive, self.transmit = (
            self._queue(memory, 0, self.rx),
            self._queue(memory, 1, self.tx),
        )
        self.pair = Pair(port, gate, "steps")
        self.pair._run = lambda: None  # type: ignore[method-assign]
        self.pair.start(self.receive, self.transmit, SIZE, merged=True)
        for _ in range(8):
            self.rx.add([], [2048])
        self.pair._receive_kicked()

    def _queue(self, memory: GuestMemory, index: int, driver: DriverQueue) -> ServedQueue:
        self.fds = [*getattr(self, "fds", []), os.eventfd(0), os.eventfd(0)]
        wiring = QueueWiring(
            index, SIZE, driver.desc, driver.avail, driver.used, self.fds[-2], self.fds[-1]
        )
        features = driver.features | 1 << net_abi.F_MRG_RXBUF | 1 << abi.F_VERSION_1
        return ServedQueue(memory, wiring, features, (0, 0))

    def send(self, *frames: bytes) -> None:
        for one in frames:
            self.tx.add([one])
        self.pair._transmit_kicked()

    def close(self) -> None:
        self.pair.close()
        for queue in (self.receive, self.transmit):
            queue.close()
        self.wire.sock.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def steps() -> Iterator[Steps]:
    with GuestMemory(16 << 20) as memory:
        steps = Steps(memory)
        yield steps
        steps.close()


def test_what_nobody_answers_is_told_at_once(steps: Steps) -> None:
    steps.send(QUESTION)
    assert steps.transmit.interrupts == 1
    assert steps.receive.interrupts == 0


def test_an_answer_comes_with_the_turn_that_sent_the_question(steps: Steps) -> None:
    steps.wire.send(ANSWER, ANSWER)
    steps.send(QUESTION, QUESTION)
    assert [one.data[len(PLAIN) :] for one in steps.rx.completed()] == [ANSWER, ANSWER]
    assert (steps.receive.interrupts, steps.transmit.interrupts) == (1, 0)


def test_a_driver_that_has_seen_it_is_not_told(steps: Steps) -> None:
    """Linux's looks at both of its queues when a frame has come."""
    steps.wire.send(ANSWER)
    steps.send(QUESTION)
    assert len(steps.tx.completed()) == 1
    steps.pair._release()
    assert steps.transmit.interrupts == 0


def test_a_driver_that_has_not_is(steps: Steps) -> None:
    steps.wire.send(ANSWER)
    steps.send(QUESTION)
    assert steps.pair._patience() == HOLD
    steps.pair._release()
    assert steps.transmit.interrupts == 1


def test_a_stop_forgets_no_interrupt(steps: Steps) -> None:
    steps.wire.send(ANSWER)
    steps.send(QUESTION)
    steps.pair.stop()
    assert steps.transmit.interrupts == 1


def test_after_silence_nobody_waits_for_an_answer(steps: Steps) -> None:
    """Until the port tells of one by itself."""
    steps.send(QUESTION)
    steps.wire.send(ANSWER)
    steps.send(QUESTION)
    assert steps.receive.interrupts == 0
    steps.pair._ready()
    assert steps.receive.interrupts == 1
    steps.wire.send(ANSWER)
    steps.send(QUESTION)
    assert len(steps.rx.completed()) == 2


def test_a_long_frame_is_seen_to_go_before_the_next_one(steps: Steps) -> None:
    steps.send(*[PLAIN + frame(bytes(LONG))] * 3)
    assert steps.seen == [0, 1, 2]
    assert steps.transmit.interrupts == 1


def test_short_ones_are_seen_together(steps: Steps) -> None:
    steps.send(*[QUESTION] * 3)
    assert steps.seen == [0, 0, 0]


def test_no_turn_is_longer_than_a_batch(steps: Steps) -> None:
    assert wait_fd(steps.transmit.kick, 0), "what was offered before it listened"
    steps.send(*[QUESTION] * (BATCH + 1))
    assert len(steps.seen) == BATCH
    assert wait_fd(steps.transmit.kick, 0), "it goes on after the others"
