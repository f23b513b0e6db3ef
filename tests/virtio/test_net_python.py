"""The Python plane of a NIC on a real tap, from the driver's side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.abi import virtio_net as abi
from hostel.spec import Limits
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, TapPort
from hostel.virtio.net_python import UNLIMITED, PythonPlane
from virtio.netns import GUEST_MAC, HOST_MAC, Namespace, frame, make_tap, plug, raw_socket
from virtio.rig import EVENT_INDEX, Driver, Rig

RX, TX = 0, 1
MERGED = 1 << abi.F_MRG_RXBUF
PLAIN = bytes(HEADER)
COUNT = slice(HEADER - 2, HEADER)


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        make_tap(net)
        yield net


def seat(rig: Rig, net: Namespace, transport: str = "pci", limits: Limits = UNLIMITED) -> Driver:
    plane = PythonPlane([TapPort(fd) for fd in plug(net)], limits)
    return rig.seat(transport, Net(rig.loop, plane, mac=GUEST_MAC))


def offer(driver: Driver, count: int, size: int = 2048) -> None:
    for _ in range(count):
        driver.queues[RX].add([], [size])
    driver.kick(RX)


def send(driver: Driver, *frames: bytes, header: bytes = PLAIN) -> None:
    for one in frames:
        driver.queues[TX].add([header + one])
    driver.kick(TX)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize(
    "features", [0, MERGED, MERGED | EVENT_INDEX], ids=["0", "merged", "event"]
)
def test_frames_both_ways(rig: Rig, net: Namespace, transport: str, features: int) -> None:
    driver = seat(rig, net, transport)
    driver.start(features)
    with raw_socket(net) as wire:
        offer(driver, 8)
        for payload in (b"one", bytes(range(256)) * 5):
            wire.send(frame(payload))
            done = driver.wait(RX)[0]
            assert done.data[HEADER:] == frame(payload)
            assert done.data[COUNT] == b"\1\0", "num_buffers"
            send(driver, frame(payload, to=HOST_MAC, sender=GUEST_MAC))
            assert wire.recv(4096)[14:] == payload
            driver.wait(TX)
    statistics = driver.device.statistics()["pairs_served"]["0"]
    assert (statistics["receive"]["frames"], statistics["transmit"]["frames"]) == (2, 2)
