"""Devices under drivers that write anything into their rings: the device may stop, nothing else does."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.virtio.block import Block
from hostel.virtio.console import Console, Port
from hostel.virtio.device import VirtioDevice
from hostel.virtio.rng import Rng
from virtio.rig import EVENT_INDEX, Driver, Rig

ROUNDS = 120
Shapes = tuple[tuple[bool, ...], ...]
"""Which buffers of a chain are writable, by kind of chain."""
REQUESTS: Shapes = ((False, True), (False, False, True), (False, True, True))
STREAMS: Shapes = (*REQUESTS, (True,), (False,), (True, True))
Maker = Callable[[Rig, Path, ExitStack], tuple[VirtioDevice, int]]


def make_console(rig: Rig, directory: Path, stack: ExitStack) -> tuple[VirtioDevice, int]:
    ports = []
    for name in ("hvc0", "agent"):
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        ours.setblocking(False)
        ours.send(os.urandom(20_000))
        ports.append(Port(name, theirs.detach(), console=name == "hvc0"))
    return Console(rig.loop, ports), 1 << abi.CONSOLE_F_MULTIPORT


def make_block(rig: Rig, directory: Path, stack: ExitStack) -> tuple[VirtioDevice, int]:
    image = directory / "disk"
    image.write_bytes(bytes(1 << 20))
    return Block(rig.loop, str(image), name="disk"), 1 << abi.BLK_F_FLUSH


def make_rng(rig: Rig, directory: Path, stack: ExitStack) -> tuple[VirtioDevice, int]:
    return Rng(rig.loop), 0


@contextmanager
def played(dice: random.Random, driver: Driver, features: int) -> Iterator[None]:
    driver.start(features | dice.choice((0, EVENT_INDEX)), size=16, heap=1 << 16)
    yield
    driver.set_status(0)
    driver.rig.loop.run_sync(lambda: None)


def scribble(dice: random.Random, driver: Driver, shapes: Shapes) -> None:
    """Good chains with nonsense in them, and here and there a lie."""
    for index, queue in driver.queues.items():
        heads, at = [], 0
        while at < 13:
            shape = dice.choice(shapes)
            heads.append(at)
            for place, writable in enumerate(shape):
                entry = descriptor(
                    dice, queue.heap, writable, at + place + 1, place + 1 < len(shape)
                )
                queue.memory.write(queue.desc + 16 * (at + place), entry)
            at += len(shape)
        for slot in range(64):
            kind = dice.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, dice.getrandbits(32)))
            header = abi.BLK_OUTHDR.pack(kind, dice.getrandbits(32), dice.choice((0, 3, 2**60)))
            queue.memory.write(queue.heap + 16 * slot, header)
        for head in heads:
            queue.offer(head if dice.random() < 0.99 else dice.getrandbits(16))
        driver.kick(index)


def descriptor(dice: random.Random, heap: int, writable: bool, following: int, more: bool) -> bytes:
    address = heap + 16 * dice.randrange(64)
    length = dice.choice((16, 16, 17, 512, 4096))
    flags = abi.DESC_F_WRITE * writable | abi.DESC_F_NEXT * more
    if dice.random() < 0.01:
        return abi.DESC.pack(dice.getrandbits(64), length, flags, following)
    if dice.random() < 0.01:
        return abi.DESC.pack(address, dice.choice((0, 2**32 - 1)), flags, following)
    if dice.random() < 0.01:
        return abi.DESC.pack(address, length, dice.getrandbits(3), dice.getrandbits(5))
    return abi.DESC.pack(address, length, flags, following)


@pytest.mark.parametrize(
    ("make", "shapes"), [(make_console, STREAMS), (make_block, REQUESTS), (make_rng, STREAMS)]
)
def test_a_device_survives_any_ring(rig: Rig, tmp_path: Path, make: Maker, shapes: Shapes) -> None:
    dice = random.Random(4)
    stopped = 0
    with ExitStack() as stack:
        device, features = make(rig, tmp_path, stack)
        driver = rig.on_pci(device)
        for _ in range(ROUNDS):
            with played(dice, driver, features):
                scribble(dice, driver, shapes)
                rig.loop.run_sync(lambda: None)
                stopped += driver.needs_reset
        assert stopped > 0, "the rings were hostile"
        assert not rig.errors
        driver.start(features)
        assert not driver.needs_reset
        rig.unseat(driver)


def test_chains_of_many_buffers_do_not_end_a_port(rig: Rig) -> None:
    """More buffers in the offered chains than one readv takes."""
    ours, theirs = socket.socketpair()
    driver = rig.on_pci(Console(rig.loop, [Port("hvc0", theirs.detach(), console=True)]))
    driver.start(indexes=(0, 1), size=128, heap=1 << 20)
    for _ in range(20):
        driver.queues[0].add([], [1] * 100, indirect=True)
    driver.kick(0)
    data = os.urandom(2000)
    ours.send(data)
    assert b"".join(done.data for done in driver.wait(0, 20)) == data
    ours.close()
