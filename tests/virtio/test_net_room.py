"""Room to receive into, against the plain way to count it: buffer by buffer."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.mock import Completion, DriverQueue
from hostel.virtio.net_room import Room
from hostel.virtio.plane import ServedQueue

SIZES = (16, 24, 64, 100, 4096)
"""Some fill what the mock driver sets aside for them, so that the next one lies right behind."""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(8 << 20) as memory:
        yield memory


def fill(views: list[memoryview], data: bytes) -> None:
    for view in views:
        part, data = data[: len(view)], data[len(view) :]
        view[: len(part)] = part


def frames_of(done: list[Completion], lengths: list[int]) -> list[bytes]:
    """As a driver puts them together: whole buffers, until the frame ends."""
    frames = []
    for length in lengths:
        data = b""
        while len(data) < length:
            data += done.pop(0).data
        frames.append(data)
    return frames


@pytest.mark.parametrize("seed", range(8))
def test_frames_of_any_size_in_buffers_of_any_size(memory: GuestMemory, seed: int) -> None:
    choose = random.Random(seed)
    driver = DriverQueue(memory, 0x1000, 64, heap=4 << 20)
    wiring = QueueWiring(0, 64, driver.desc, driver.avail, driver.used, 0, 0)
    queue = ServedQueue(memory, wiring, driver.features, (0, 0))
    room = Room(queue)
    for _ in range(40):
        while driver._free:
            driver.add([], [choose.choice(SIZES)])
        room.top_up()
        sent = []
        while choose.random() < 0.8 and room.end > room.begin:
            data = choose.randbytes(choose.randint(1, min(room.end - room.begin, 6000)))
            if len(data) <= room.first <= len(view := room.next_view()):
                fill([view], data)
                room.take_one(len(data))
            else:
                fill(room.views(len(data)), data)
                assert room.take(len(data))
            sent.append(data)
        assert room.take(room.end - room.begin + 1) == 0, "more than there is"
        assert driver.completed() == [], "the driver has not been shown anything"
        room.publish()
        assert frames_of(driver.completed(), [len(data) for data in sent]) == sent
    left = len(room)
    room.give_back()
    assert len(queue.pop_room(64)[0]) == left, "what no frame has taken comes again"
