from __future__ import annotations

import pytest

from hostel.virtio.rng import MOST, Rng
from virtio.rig import Rig


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_random_bytes(rig: Rig, transport: str) -> None:
    driver = rig.seat(transport, Rng(rig.loop))
    driver.start()
    first = driver.request(0, [], [64, 64])
    second = driver.request(0, [], [128])
    assert (first.written, second.written) == (128, 128)
    assert len(set(first.data + second.data)) > 50
    assert first.data != second.data


def test_a_request_and_a_kick_are_bounded(rig: Rig) -> None:
    driver = rig.on_pci(Rng(rig.loop))
    driver.start(heap=1 << 20)
    assert driver.request(0, [], [MOST * 3]).written == MOST
    for _ in range(4):
        driver.queues[0].add([], [MOST])
    driver.kick(0)
    assert [done.written for done in driver.wait(0, 4)] == [MOST] * 4, "all, one turn each"


def test_a_chain_without_room(rig: Rig) -> None:
    driver = rig.on_pci(Rng(rig.loop))
    driver.start()
    assert driver.request(0, [b"no room"]).written == 0
    assert not driver.needs_reset
