"""Both transports, driven through the bus: status, features, queues, interrupts, reset, save."""

from __future__ import annotations

import json
import random
import threading

import pytest

from hostel.abi import virtio as abi
from hostel.errors import HostelError, QueueError
from hostel.virtio.device import VirtioDevice
from hostel.virtio.mock import DriverQueue
from hostel.virtio.plane import QueueDevice, ServedQueue
from hostel.virtio.queue import total
from hostel.vmm import layout
from hostel.vmm.loop import EventLoop
from virtio.rig import (
    ALWAYS,
    EVENT_INDEX,
    MEMORY,
    RUNNING,
    Driver,
    MmioDriver,
    PciDriver,
    Rig,
    eventually,
    wait_fd,
)

S = abi
VERSION_1 = 1 << abi.F_VERSION_1


class Echo(QueueDevice):
    """Writes back what it reads, and has one byte of config space that can be written."""

    device_id = 42
    queue_sizes = (64, 64)

    def __init__(self, loop: EventLoop, name: str = "echo") -> None:
        super().__init__(loop)
        self.name = name
        self.config = bytes([7, 1, 2, 3])
        self.threads: set[str] = set()

    def serve(self, queue: ServedQueue) -> None:
        self.threads.add(threading.current_thread().name)
        for chain in queue.chains():
            data = b"".join(chain.readable)[: total(chain.writable)]
            for buffer in chain.writable:
                buffer[: len(data)] = data[: len(buffer)]
                data = data[len(buffer) :]
            queue.push(chain, min(total(chain.readable), total(chain.writable)))
        queue.interrupt()

    def write_config(self, offset: int, data: bytes) -> None:
        self.config = data[:1] + self.config[1:]


@pytest.fixture(params=["pci", "mmio"])
def driver(request: pytest.FixtureRequest, rig: Rig) -> Driver:
    return rig.seat(request.param, Echo(rig.loop))


def test_identity_is_modern(rig: Rig) -> None:
    pci, mmio = rig.on_pci(Echo(rig.loop)), rig.on_mmio(Echo(rig.loop))
    assert rig.read(pci.ecam, 4) == 0x1AF4 | (0x1040 + 42) << 16
    assert rig.read(pci.ecam + 8, 1) == 1
    identity = [mmio.get(n) for n in (abi.MMIO_MAGIC_VALUE, abi.MMIO_VERSION, abi.MMIO_DEVICE_ID)]
    assert identity == [0x74726976, 2, 42]


@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_requests_go_through_both_queues(driver: Driver, features: int) -> None:
    driver.start(features)
    for index in (0, 1):
        for turn in range(40):
            data = bytes([index, turn]) * 50
            assert driver.request(index, [data], [60, 60]).data == data
    assert isinstance(driver.device, Echo)
    assert driver.device.threads == {"hostel-loop"}
    assert driver.device.statistics()["queues"]["1"]["chains"] == 40


def test_more_than_a_batch(driver: Driver) -> None:
    driver.start(EVENT_INDEX, size=64)
    for turn in range(5):
        for _ in range(64):
            driver.queues[0].add([bytes([turn])], [1], indirect=True)
        driver.kick(0)
        assert {done.data for done in driver.wait(0, 64)} == {bytes([turn])}


def test_what_was_offered_before_driver_ok_is_served(driver: Driver) -> None:
    """No kick comes for it: the device has to look."""
    driver.negotiate()
    queue = driver.queues[0] = DriverQueue(driver.rig.memory, 1 << 20)
    queue.add([b"early"], [5])
    driver.set_up(0, queue)
    driver.set_status(RUNNING)
    assert driver.wait(0)[0].data == b"early"


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        ([S.CONFIG_S_DRIVER], 0),
        ([S.CONFIG_S_ACKNOWLEDGE], S.CONFIG_S_ACKNOWLEDGE),
        ([S.CONFIG_S_ACKNOWLEDGE | S.CONFIG_S_DRIVER], 3),
        ([1, S.CONFIG_S_DRIVER_OK | 1], 1),
        ([1, 3, 3 | S.CONFIG_S_DRIVER_OK], 3),
        ([1, 3, 1], 3),
        ([1, 3, 3 | S.CONFIG_S_NEEDS_RESET], 3),
        ([1, 3, 3 | S.CONFIG_S_FAILED], 3 | S.CONFIG_S_FAILED),
        ([1, 3, 0], 0),
    ],
)
def test_status_goes_up_the_ladder_only(driver: Driver, steps: list[int], ends: int) -> None:
    for step in steps:
        driver.set_status(step)
    assert driver.get_status() == ends


@pytest.mark.parametrize(
    ("features", "accepted"),
    [(VERSION_1, True), (0, False), (VERSION_1 | 1 << 63, False), (VERSION_1 | 1 << 7, False)],
)
def test_features_ok(driver: Driver, features: int, accepted: bool) -> None:
    driver.set_status(3)
    driver.write_features(features)
    driver.set_status(11)
    assert bool(driver.get_status() & S.CONFIG_S_FEATURES_OK) == accepted


def test_features_freeze(driver: Driver) -> None:
    driver.negotiate()
    driver.write_features(VERSION_1 | EVENT_INDEX)
    assert driver.transport.driver_features == ALWAYS


def test_a_broken_queue_needs_reset_and_recovers(driver: Driver) -> None:
    faults: list[tuple[VirtioDevice, HostelError]] = []
    driver.device.on_fault = lambda device, error: faults.append((device, error))
    driver.start()
    driver.queues[0].offer(15_000)
    driver.kick(0)
    assert wait_fd(driver.config_fd())
    assert driver.needs_reset
    ((device, error),) = faults
    assert device is driver.device
    assert isinstance(error, QueueError)
    assert "head of a chain" in device.statistics()["fault"]
    driver.start()
    assert not driver.needs_reset
    assert driver.request(0, [b"again"], [5]).data == b"again"


@pytest.mark.parametrize("ring", ["desc", "avail", "used"])
def test_rings_outside_memory_need_reset(driver: Driver, ring: str) -> None:
    driver.start()
    queue = driver.queues[0]
    driver.negotiate()
    setattr(queue, ring, 1 << 50)
    driver.set_up(0, queue)
    driver.set_status(RUNNING)
    assert driver.needs_reset


def test_registers_are_frozen_while_it_runs(driver: Driver) -> None:
    driver.start()
    driver.set_up(0, driver.queues[1])
    assert driver.request(0, [b"still"], [5]).data == b"still"


def test_reset_is_synchronous(driver: Driver) -> None:
    """After reset the device writes no more, whatever was offered and kicked before."""
    for _ in range(20):
        driver.start(size=64)
        for _ in range(60):
            driver.queues[0].add([b"x" * 64], [64], indirect=True)
        driver.kick(0)
        driver.set_status(0)
        before = driver.rig.memory.read(0, 6 << 20)
        driver.rig.loop.run_sync(lambda: None)
        assert driver.rig.memory.read(0, 6 << 20) == before
    assert driver.get_status() == 0


def test_config_space_and_its_generation(driver: Driver) -> None:
    assert driver.config(0, 4) == 0x03020107
    assert driver.config(64, 4) == 0
    driver.start()
    before = driver.generation()
    driver.device.config_changed()
    assert wait_fd(driver.config_fd())
    assert driver.generation() != before


def test_a_config_change_before_driver_ok_is_told_after_it(driver: Driver) -> None:
    """The driver may have read the old value, and no interrupt may come before DRIVER_OK (§2.5.1)."""
    driver.negotiate()
    assert driver.config(0, 1) == 7
    driver.write_config(0, 1, 8)
    driver.device.config_changed()
    if isinstance(driver, PciDriver):
        driver.set("msix_config", 2, len(driver.device.queue_sizes))
    assert not wait_fd(driver.config_fd(), 0)
    driver.set_status(RUNNING)
    assert wait_fd(driver.config_fd())
    driver.start()
    assert not wait_fd(driver.config_fd(), 0), "nothing has changed since this driver came"


def test_queues_that_are_not_there(driver: Driver) -> None:
    driver.negotiate()
    if isinstance(driver, PciDriver):
        driver.set("queue_select", 2, 9)
        assert driver.get("queue_size", 2) == 0
        driver.set("queue_enable", 2, 1)
        assert driver.get("queue_enable", 2) == 0
    elif isinstance(driver, MmioDriver):
        driver.set(abi.MMIO_QUEUE_SEL, 9)
        assert driver.get(abi.MMIO_QUEUE_NUM_MAX) == 0
        driver.set(abi.MMIO_QUEUE_NOTIFY, 9)
    assert not driver.needs_reset


def test_a_queue_may_be_left_out(driver: Driver) -> None:
    driver.start(indexes=(1,))
    assert driver.request(1, [b"one"], [3]).data == b"one"
    driver.kick(0)
    assert not driver.needs_reset


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_state_moves_to_another_machine(rig: Rig, transport: str) -> None:
    old = rig.seat(transport, Echo(rig.loop))
    old.start(EVENT_INDEX)
    assert old.request(0, [b"before"], [6]).data == b"before"
    state = json.loads(json.dumps(old.seat.save()))
    other = Rig()
    try:
        new = other.seat(transport, Echo(other.loop))
        other.memory.write(0, rig.memory.read(0, MEMORY))
        new.seat.load(state)
        new.queues = old.queues
        for queue in new.queues.values():
            queue.memory = other.memory
        assert new.get_status() == RUNNING
        assert new.request(0, [b"after"], [5]).data == b"after"
    finally:
        other.close()


# --- PCI alone ---------------------------------------------------------------------------------


def test_notifications_move_with_the_bar(rig: Rig) -> None:
    driver = rig.on_pci(Echo(rig.loop))
    driver.start()
    addresses = sorted(address for address, _, _ in rig.vm.ioeventfds)
    assert addresses == [driver.bar(0) + 0x3000, driver.bar(0) + 0x3004]
    new = 0xD000_0000
    rig.write(driver.ecam + 0x10, 4, new)
    assert sorted(address for address, _, _ in rig.vm.ioeventfds) == [new + 0x3000, new + 0x3004]
    driver.structures = {kind: new + at % 0x4000 for kind, at in driver.structures.items()}
    assert driver.request(0, [b"moved"], [5]).data == b"moved"
    rig.write(driver.ecam + 4, 2, 0)
    assert not rig.vm.ioeventfds
    assert driver.get("num_queues", 2) == 0xFFFF


def test_without_ioeventfds_a_notification_is_an_exit(rig: Rig) -> None:
    rig.vm.limit = 1
    driver = rig.on_pci(Echo(rig.loop))
    driver.start()
    assert len(rig.vm.ioeventfds) == 1
    assert driver.request(1, [b"slow"], [4]).data == b"slow"


def test_vectors_that_are_not_there(rig: Rig) -> None:
    driver = rig.on_pci(Echo(rig.loop))
    driver.set("msix_config", 2, 3)
    assert driver.get("msix_config", 2) == abi.MSI_NO_VECTOR
    driver.set("msix_config", 2, 2)
    assert driver.get("msix_config", 2) == 2


def test_a_queue_without_a_vector_is_silent(rig: Rig) -> None:
    driver = rig.on_pci(Echo(rig.loop))
    driver.negotiate()
    queue = driver.queues[0] = DriverQueue(rig.memory, 1 << 20)
    driver.set_up(0, queue)
    driver.set("queue_enable", 2, 0)
    driver.set_status(0)
    driver.negotiate()
    for ring in ("desc", "avail", "used"):
        driver.set("queue_select", 2, 0)
        driver.set(f"queue_{ring}_lo", 4, getattr(queue, ring))
    driver.set("queue_size", 2, queue.size)
    driver.set("queue_enable", 2, 1)
    assert driver.get("queue_msix_vector", 2) == abi.MSI_NO_VECTOR
    driver.set_status(RUNNING)
    queue.add([b"quiet"], [5])
    driver.kick(0)
    assert eventually(lambda: bool(queue.completed()))
    assert not any(wait_fd(slot.eventfd, 0) for slot in driver.slots)


def test_the_isr_tells_of_config_changes_once(rig: Rig) -> None:
    driver = rig.on_pci(Echo(rig.loop))
    driver.start()
    driver.device.config_changed()
    isr = driver.structures[abi.PCI_CAP_ISR_CFG]
    assert [rig.read(isr, 1), rig.read(isr, 1)] == [abi.PCI_ISR_CONFIG, 0]


def test_the_window_in_configuration_space(rig: Rig) -> None:
    """§4.1.4.9: everything can be done without a mapped BAR."""
    driver = rig.on_pci(Echo(rig.loop))
    rig.write(driver.ecam + 4, 2, 0)
    at = driver.ecam + driver.window

    def look(offset: int, length: int) -> int:
        rig.write(at + 4, 1, 0)
        rig.write(at + 8, 4, offset)
        rig.write(at + 12, 4, length)
        return rig.read(at + 16, 4) & (1 << 8 * length) - 1

    assert look(0x2000, 4) == 0x03020107
    look(20, 1)
    rig.write(at + 16, 4, abi.CONFIG_S_ACKNOWLEDGE)
    assert driver.transport.status == abi.CONFIG_S_ACKNOWLEDGE
    for offset, length in ((0x4000, 4), (0x3FFE, 4), (2, 4), (0, 3), (2**32 - 4, 4)):
        look(offset, length)
        rig.write(at + 16, 4, 0xFFFF_FFFF)
    rig.write(at + 4, 1, 5)
    rig.read(at + 16, 4)
    assert driver.transport.status == abi.CONFIG_S_ACKNOWLEDGE


def test_64_bit_fields_whole_or_by_halves(rig: Rig) -> None:
    driver = rig.on_pci(Echo(rig.loop))
    driver.negotiate()
    driver.set("queue_select", 2, 1)
    driver.set("queue_desc_lo", 8, 0x1_2345_6780)
    assert driver.get("queue_desc_lo", 8) == 0x1_2345_6780
    assert driver.get("queue_desc_hi", 4) == 1
    driver.set("queue_desc_lo", 2, 0xFFFF)  # no field has this width
    assert driver.get("queue_desc_lo", 8) == 0x1_2345_6780


# --- MMIO alone --------------------------------------------------------------------------------


def test_mmio_interrupt_status(rig: Rig) -> None:
    driver = rig.on_mmio(Echo(rig.loop))
    assert driver.get(abi.MMIO_INTERRUPT_STATUS) == 0
    driver.start()
    assert driver.get(abi.MMIO_INTERRUPT_STATUS) == abi.MMIO_INT_VRING
    driver.device.config_changed()
    assert driver.get(abi.MMIO_INTERRUPT_STATUS) == abi.MMIO_INT_VRING | abi.MMIO_INT_CONFIG
    driver.set(abi.MMIO_INTERRUPT_ACK, 3)
    assert driver.get(abi.MMIO_INTERRUPT_STATUS) == abi.MMIO_INT_VRING


def test_mmio_takes_32_bit_registers_only(rig: Rig) -> None:
    driver = rig.on_mmio(Echo(rig.loop))
    assert rig.read(driver.address + abi.MMIO_MAGIC_VALUE, 2) == 0
    assert rig.read(driver.address + abi.MMIO_QUEUE_NOTIFY, 4) == 0
    rig.write(driver.address + abi.MMIO_STATUS, 1, 1)
    assert driver.get_status() == 0
    assert rig.read(driver.address + abi.MMIO_CONFIG + 1, 1) == 1


def test_mmio_ready_takes_a_queue_back(rig: Rig) -> None:
    driver = rig.on_mmio(Echo(rig.loop))
    driver.start()
    driver.set(abi.MMIO_QUEUE_READY, 0)
    assert driver.get(abi.MMIO_QUEUE_READY) == 1, "not while the device runs"
    driver.negotiate()
    driver.set_up(0, driver.queues[0])
    driver.set(abi.MMIO_QUEUE_READY, 0)
    assert driver.get(abi.MMIO_QUEUE_READY) == 0


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_random_register_writes_never_escape(rig: Rig, transport: str) -> None:
    """A driver that writes anything anywhere harms its device only."""
    dice = random.Random(20_24)
    driver = rig.seat(transport, Echo(rig.loop))
    base = driver.bar(0) if isinstance(driver, PciDriver) else layout.VIRTIO_MMIO_START
    for _ in range(4000):
        size = dice.choice((1, 2, 4, 8))
        offset = dice.randrange(0, 0x110) & -size
        value = dice.choice((0, 1, 3, 11, 15, 0x1000, 1 << 31, dice.getrandbits(64)))
        rig.write(base + offset, size, value & (1 << 8 * size) - 1)
        rig.read(base + offset, size)
    driver.start()
    assert driver.request(0, [b"alive"], [5]).data == b"alive"
