"""What a malicious driver can do to any virtio device: to its rings (``RINGS``), to its transport's registers
(``REGISTERS``). The table of tests over them is ``test_malice.py``.

A case of ``RINGS`` prepares one queue; the fault is what the queue calls it. A case of ``REGISTERS`` gets a
driver that has not started, plays, and may leave the device in any state.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hostel.abi import virtio as abi
from hostel.virtio.mock import DriverQueue
from hostel.virtio.queue import Fault
from virtio.rig import ALWAYS, RUNNING, Driver, MmioDriver, PciDriver

NEXT, WRITE, INDIRECT = abi.DESC_F_NEXT, abi.DESC_F_WRITE, abi.DESC_F_INDIRECT
OUTSIDE = 1 << 40
HEAP = object()
"""Stands for the address of a buffer that is the driver's own."""
Entry = tuple[object, int, int, int]
"""Address, length, flags, next."""
Play = Callable[[DriverQueue], None]


def _address(driver: DriverQueue, place: object) -> int:
    return place if isinstance(place, int) else driver.heap + 4096


def _chain(*entries: Entry) -> Play:
    def play(driver: DriverQueue) -> None:
        for index, (place, *rest) in enumerate(entries):
            driver.set_descriptor(index, _address(driver, place), *rest)
        driver.offer(0)

    return play


def indirect(*entries: Entry, flags: int = 0) -> Play:
    def play(driver: DriverQueue) -> None:
        table = b"".join(abi.DESC.pack(_address(driver, place), *rest) for place, *rest in entries)
        driver.memory.write(driver.heap + 8192, table)
        driver.set_descriptor(0, driver.heap + 8192, len(table), INDIRECT | flags)
        driver.offer(0)

    return play


def _at_the_end(length: int, flags: int = 0) -> Play:
    """A buffer that begins one byte before the end of the first region: behind it is the hole."""

    def play(driver: DriverQueue) -> None:
        driver.set_descriptor(0, driver.memory.regions[0].size - 1, length, flags)
        driver.offer(0)

    return play


def _index_jump(driver: DriverQueue) -> None:
    driver.set_available_index(driver._next_avail + driver.size + 1)


def _index_back(driver: DriverQueue) -> None:
    driver.set_available_index(driver._next_avail - 1)


RINGS: dict[str, tuple[Fault, Play]] = {
    "head out of range": (Fault.HEAD_OUT_OF_RANGE, lambda driver: driver.offer(driver.size)),
    "head far out of range": (Fault.HEAD_OUT_OF_RANGE, lambda driver: driver.offer(0xFFFF)),
    "index jump": (Fault.INDEX_JUMP, _index_jump),
    "index goes back": (Fault.INDEX_JUMP, _index_back),
    "next out of range": (Fault.NEXT_OUT_OF_RANGE, _chain((HEAP, 1, NEXT, 0xFFFF))),
    "points to itself": (Fault.LOOP, _chain((HEAP, 1, NEXT, 0))),
    "loop of two": (Fault.LOOP, _chain((HEAP, 1, NEXT, 1), (HEAP, 1, NEXT, 0))),
    "loop of writable buffers": (
        Fault.LOOP,
        _chain((HEAP, 1, NEXT | WRITE, 1), (HEAP, 1, NEXT | WRITE, 0)),
    ),
    "zero length": (Fault.ZERO_LENGTH, _chain((HEAP, 0, 0, 0))),
    "zero length, writable": (Fault.ZERO_LENGTH, _chain((HEAP, 0, WRITE, 0))),
    "4 GiB": (Fault.BUFFER_OUTSIDE, _chain((HEAP, 2**32 - 1, 0, 0))),
    "4 GiB, writable": (Fault.BUFFER_OUTSIDE, _chain((HEAP, 2**32 - 1, WRITE, 0))),
    "buffer outside": (Fault.BUFFER_OUTSIDE, _chain((OUTSIDE, 1, 0, 0))),
    "buffer in the hole": (Fault.BUFFER_OUTSIDE, _chain((0xF000_0000, 1, WRITE, 0))),
    "buffer over the end": (Fault.BUFFER_OUTSIDE, _at_the_end(2, WRITE)),
    "buffer across the hole": (Fault.BUFFER_OUTSIDE, _at_the_end(0xFFFF_F000)),
    "address wraps": (Fault.BUFFER_OUTSIDE, _chain((2**64 - 1, 2, 0, 0))),
    "readable after writable": (
        Fault.READABLE_AFTER_WRITABLE,
        _chain((HEAP, 1, WRITE | NEXT, 1), (HEAP, 1, 0, 0)),
    ),
    "indirect with next": (Fault.INDIRECT_WITH_NEXT, indirect((HEAP, 1, 0, 0), flags=NEXT)),
    "indirect in indirect": (Fault.INDIRECT_IN_INDIRECT, indirect((HEAP, 16, INDIRECT, 0))),
    "indirect, odd length": (Fault.INDIRECT_LENGTH, _chain((HEAP, 17, INDIRECT, 0))),
    "indirect, empty": (Fault.INDIRECT_LENGTH, _chain((HEAP, 0, INDIRECT, 0))),
    "indirect, huge": (Fault.INDIRECT_TOO_LONG, _chain((HEAP, 16 * 1025, INDIRECT, 0))),
    "indirect, 4 GiB": (Fault.INDIRECT_TOO_LONG, _chain((HEAP, 2**32 - 16, INDIRECT, 0))),
    "indirect outside": (Fault.INDIRECT_OUTSIDE, _chain((OUTSIDE, 16, INDIRECT, 0))),
    "indirect, next outside its table": (Fault.NEXT_OUT_OF_RANGE, indirect((HEAP, 1, NEXT, 1))),
    "indirect, loop": (Fault.LOOP, indirect((HEAP, 1, NEXT, 1), (HEAP, 1, NEXT, 0))),
    "too many bytes": (
        Fault.TOO_MANY_BYTES,
        indirect(*[(0, 4 << 20, NEXT, at + 1) for at in range(1023)], (0, 4 << 20, 0, 0)),
    ),
}


# -- registers ----------------------------------------------------------------------------------


def _set_queue(driver: Driver, index: int, size: int, rings: tuple[int, int, int]) -> None:
    """The registers of one queue, whatever the values."""
    queue = DriverQueue(driver.rig.memory, (1 + 2 * index) << 20, 16)
    queue.size, (queue.desc, queue.avail, queue.used) = size, rings
    driver.set_up(index, queue)


def _rings_at(size: int, *rings: int) -> Callable[[Driver], None]:
    def play(driver: Driver) -> None:
        driver.negotiate()
        for index in range(len(driver.device.queue_sizes)):
            _set_queue(driver, index, size, (rings[0], rings[1], rings[2]))
        driver.set_status(RUNNING)
        kick_all(driver)

    return play


def kick_all(driver: Driver) -> None:
    for index in range(len(driver.device.queue_sizes)):
        driver.kick(index)


def _moved_while_running(driver: Driver) -> None:
    driver.start()
    for index in range(len(driver.device.queue_sizes)):
        _set_queue(driver, index, 8, (OUTSIDE, OUTSIDE, OUTSIDE))
    kick_all(driver)


def _statuses(*values: int) -> Callable[[Driver], None]:
    def play(driver: Driver) -> None:
        driver.set_status(0)
        for value in values:
            driver.set_status(value)
            kick_all(driver)

    return play


def _features(features: int) -> Callable[[Driver], None]:
    def play(driver: Driver) -> None:
        driver.set_status(0)
        driver.set_status(abi.CONFIG_S_ACKNOWLEDGE | abi.CONFIG_S_DRIVER)
        driver.write_features(features)
        driver.set_status(RUNNING & ~abi.CONFIG_S_DRIVER_OK)
        assert not driver.get_status() & abi.CONFIG_S_FEATURES_OK
        driver.set_status(RUNNING)
        assert not driver.get_status() & abi.CONFIG_S_DRIVER_OK
        kick_all(driver)

    return play


def _every_feature(driver: Driver) -> None:
    """All that is offered, without any of the queues."""
    driver.set_status(abi.CONFIG_S_ACKNOWLEDGE | abi.CONFIG_S_DRIVER)
    driver.write_features(driver.read_features())
    driver.set_status(RUNNING & ~abi.CONFIG_S_DRIVER_OK)
    driver.set_status(RUNNING)
    kick_all(driver)


def _queues_that_are_not_there(driver: Driver) -> None:
    driver.start()
    for index in (len(driver.device.queue_sizes), 0x7F, 0xFFFF):
        if isinstance(driver, PciDriver):
            driver.set("queue_select", 2, index)
            driver.rig.write(driver.structures[abi.PCI_CAP_NOTIFY_CFG], 2, index)
        elif isinstance(driver, MmioDriver):
            driver.set(abi.MMIO_QUEUE_SEL, index)
            driver.set(abi.MMIO_QUEUE_NUM, 16)
            driver.set(abi.MMIO_QUEUE_READY, 1)
            driver.set(abi.MMIO_QUEUE_NOTIFY, index)


def _config_space(driver: Driver) -> None:
    driver.start()
    for size in (1, 2, 4, 8):
        for offset in range(0, 64, size):
            driver.rig.write(driver.config_address(offset), size, 2 ** (8 * size) - 1)
            driver.rig.read(driver.config_address(offset), size)


def _resets_while_it_works(driver: Driver) -> None:
    for _ in range(20):
        driver.start()
        for index, queue in driver.queues.items():
            for _ in range(4):
                queue.add([os.urandom(64)], [256])
            driver.kick(index)
        driver.set_status(0)


LAST = 1 << 20
REGISTERS: dict[str, Callable[[Driver], None]] = {
    "queue size 0": _rings_at(0, LAST, LAST + 4096, LAST + 8192),
    "queue size no power of two": _rings_at(3, LAST, LAST + 4096, LAST + 8192),
    "queue size too large": _rings_at(0xFFFF, LAST, LAST + 4096, LAST + 8192),
    "rings misaligned": _rings_at(8, LAST + 1, LAST + 4097, LAST + 8193),
    "rings outside": _rings_at(8, OUTSIDE, OUTSIDE + 4096, OUTSIDE + 8192),
    "rings in the hole": _rings_at(8, 0xF000_0000, 0xF000_1000, 0xF000_2000),
    "rings at the very end": _rings_at(8, 2**64 - 16, 2**64 - 2, 2**64 - 4),
    "all rings in one place": _rings_at(8, LAST, LAST, LAST),
    "rings moved while running": _moved_while_running,
    "DRIVER_OK first": _statuses(abi.CONFIG_S_DRIVER_OK, RUNNING),
    "DRIVER_OK without features": _statuses(1, 3, 3 | abi.CONFIG_S_DRIVER_OK),
    "FEATURES_OK before DRIVER": _statuses(1, 1 | abi.CONFIG_S_FEATURES_OK),
    "every status": _statuses(*range(1, 256)),
    "statuses back and forth": _statuses(*[RUNNING, 1, RUNNING, 3, 0x80, RUNNING] * 3),
    "features not offered": _features(ALWAYS | 1 << 40 | 1 << 63),
    "no VERSION_1": _features(1 << abi.RING_F_INDIRECT_DESC),
    "every feature, no queue": _every_feature,
    "queues that are not there": _queues_that_are_not_there,
    "all of the config space": _config_space,
    "resets while it works": _resets_while_it_works,
}
