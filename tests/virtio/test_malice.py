"""Every device under every malicious case, on both transports: the device may stop, and nothing else may.

After each case: the event loop turns; no other device noticed; guest memory that was not offered and files
that were not given are as they were; and after a reset the device works.

The cases are in ``malice.py`` (rings, registers) and ``subjects.py`` (devices, and the contents of requests).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostel.abi import virtio_net as abi
from hostel.errors import GuestError
from hostel.host.tap import open_tap
from hostel.memory import GuestMemory
from hostel.virtio.net import Net
from hostel.virtio.net_port import TapPort
from hostel.virtio.net_python import PythonPlane
from hostel.virtio.rng import Rng
from virtio.malice import REGISTERS, RINGS, kick_all
from virtio.netns import GUEST_MAC, HOST_MAC, Namespace, frame, make_tap, raw_socket
from virtio.rig import Rig, eventually
from virtio.storms import Storm, sees_no_more
from virtio.subjects import BOUND, HEADERS, SUBJECTS, Subject

SIZE, LOW, HIGH = 32 << 20, 28 << 20, 1 << 32
GUARDS = ((0, 1 << 20), (26 << 20, 2 << 20), (HIGH, SIZE - LOW))
"""Memory that no driver offers to anybody."""
BYSTANDER = 24 << 20
TRANSPORTS = ["pci", "mmio"]


class Table:
    """One subject in a machine with a bystander."""

    def __init__(self, subject: Subject, transport: str, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.rig = Rig(GuestMemory(SIZE, low_end=LOW, high_start=HIGH))
        self.stack = ExitStack()
        inside = folder / "given"
        inside.mkdir()
        (folder / "not given").write_bytes(b"as it was")
        made = subject.make(self.rig, inside, self.stack)
        self.works = made.works
        self.driver = self.rig.seat(transport, made.device)
        self.bystander = self.rig.seat(transport, Rng(self.rig.loop, name="bystander"))
        self.bystander.start(size=16, heap=1 << 16, base=BYSTANDER)
        for start, size in GUARDS:
            self.rig.memory.write(start, b"\xa5" * size)

    def start(self, size: int = 16) -> None:
        self.driver.start(self.subject.features, size=size, heap=1 << 20)

    def another_answers(self) -> float:
        """How long it took."""
        begun = time.monotonic()
        assert self.bystander.request(0, [], [32]).written == 32
        return time.monotonic() - begun

    def check(self) -> None:
        """Nothing happened but to the subject, and it can be had again."""
        self.rig.loop.run_sync(lambda: None)
        assert not self.rig.errors
        assert self.another_answers() < BOUND
        assert isinstance(self.driver.device.fault, GuestError | None), "the guest's own fault"
        self.start()
        assert not self.driver.needs_reset
        self.works(self.driver)
        for start, size in GUARDS:
            assert self.rig.memory.view(start, size) == b"\xa5" * size
        assert sorted(os.listdir(self.folder)) == ["given", "not given"]
        assert (self.folder / "not given").read_bytes() == b"as it was"

    def close(self) -> None:
        self.rig.close()
        self.stack.close()


@pytest.fixture(params=SUBJECTS, ids=lambda subject: str(subject.name))
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.param
    return found


@pytest.fixture(params=TRANSPORTS)
def table(subject: Subject, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Table]:
    table = Table(subject, request.param, tmp_path)
    yield table
    table.close()


@pytest.mark.parametrize("case", RINGS)
def test_rings(table: Table, case: str) -> None:
    fault, play = RINGS[case]
    for index in table.subject.hot:
        table.start()
        play(table.driver.queues[index])
        table.driver.kick(index)
        assert eventually(lambda: table.driver.needs_reset), f"queue {index}"
        assert str(table.driver.device.fault).startswith(fault), f"queue {index}"
    table.check()


def test_rings_of_every_queue(table: Table) -> None:
    """Also of those that wait for the host: the device may stop, or never look."""
    for _, play in RINGS.values():
        table.start()
        for queue in table.driver.queues.values():
            play(queue)
        kick_all(table.driver)
        table.check()


@pytest.mark.parametrize("case", REGISTERS)
def test_registers(table: Table, case: str) -> None:
    REGISTERS[case](table.driver)
    table.check()


def test_lies(table: Table) -> None:
    """Chains as they should be, with contents that are not."""
    for name, (index, readable, writable) in table.subject.lies.items():
        table.start()
        table.driver.queues[index].add(readable, writable)
        table.driver.kick(index)
        try:
            table.check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_buffers_that_are_the_rings(table: Table) -> None:
    """The device is told to write into its own rings, and to read what it writes."""
    for index in table.subject.hot:
        table.start()
        queue = table.driver.queues[index]
        length = queue.heap - queue.desc
        queue.set_descriptor(0, queue.desc, length, 1, 1)
        queue.set_descriptor(1, queue.desc, length, 2)
        for _ in range(queue.size):
            queue.offer(0)
        table.driver.kick(index)
        table.check()


def test_a_storm_starves_nobody(table: Table) -> None:
    table.start(256)
    with Storm(table.driver, table.subject.hot):
        until = time.monotonic() + 0.2
        slowest = 0.0
        while time.monotonic() < until:
            slowest = max(slowest, table.another_answers())
    assert slowest < BOUND
    assert not table.driver.needs_reset, table.driver.device.fault
    table.check()


def test_a_reset_in_a_storm_is_the_end_of_it(table: Table) -> None:
    """When the reset has been read back, nobody touches the guest's memory for this device."""
    for _ in range(2):
        table.start(256)
        with Storm(table.driver, table.subject.hot):
            time.sleep(0.01)
            table.driver.set_status(0)
        assert table.driver.get_status() == 0
        assert sees_no_more(table.driver)
    table.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_headers_that_lie_to_the_host_kernel(transport: str) -> None:
    """Frames for a real tap, whose headers ask for offloads that the frame is not fit for."""
    with Namespace() as net:
        make_tap(net)
        rig = Rig()
        plane = PythonPlane([TapPort(fd) for fd in net.call(open_tap, "tap0")])
        driver = rig.seat(transport, Net(rig.loop, plane, mac=GUEST_MAC))
        driver.start(plane.features & ~(1 << abi.F_CTRL_GUEST_OFFLOADS))
        for data in HEADERS.values():
            driver.queues[1].add([data])
        driver.kick(1)
        driver.wait(1, len(HEADERS))
        with raw_socket(net) as wire:
            driver.queues[1].add([bytes(abi.HDR.size) + frame(b"good", to=HOST_MAC)])
            driver.kick(1)
            assert eventually(lambda: wire.recv(4096)[14:18] == b"good")
        assert not driver.needs_reset
        rig.close()
