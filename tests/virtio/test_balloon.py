"""The balloon from a driver's side: what it is told is given back, and nothing else."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence

import pytest

from hostel.abi import virtio as abi
from hostel.memory import HUGE_PAGE, GuestMemory
from hostel.virtio import balloon as module
from hostel.virtio.balloon import DEFLATE, INFLATE, MOST, STATISTICS, Balloon, WholePages
from virtio.rig import EVENT_INDEX, Driver, PciDriver, Rig, eventually

SIZE = 64 << 20
LOW = 32 << 20
HIGH = 1 << 32
REPORT_AS_LINUX, REPORT_AS_SPECIFIED = 3, 4
FEATURES = (
    1 << abi.BALLOON_F_MUST_TELL_HOST
    | 1 << abi.BALLOON_F_STATS_VQ
    | 1 << abi.BALLOON_F_DEFLATE_ON_OOM
    | 1 << abi.BALLOON_F_REPORTING
)
FIRST = (20 << 20) >> 12
"""A page that no ring of the driver's is in."""


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(GuestMemory(SIZE, low_end=LOW, high_start=HIGH))
    yield rig
    rig.close()


def start(rig: Rig, transport: str = "pci", features: int = 0, **how: object) -> Driver:
    driver = rig.seat(transport, Balloon(rig.loop, SIZE))
    driver.start(FEATURES | features, **how)  # type: ignore[arg-type]
    return driver


def numbers(pages: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def fill(rig: Rig, gpa: int, pages: int) -> None:
    for page in range(pages):
        rig.memory.write(gpa + 4096 * page, b"used")


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_inflated_pages_leave_the_host(rig: Rig, transport: str, features: int) -> None:
    driver = start(rig, transport, features)
    fill(rig, FIRST << 12, 512)
    before = rig.memory.allocated
    pages = [*range(FIRST + 300, FIRST + 512), *range(FIRST, FIRST + 300)]
    assert driver.request(INFLATE, [numbers(pages)]).written == 0
    assert before - rig.memory.allocated >= 2 << 20
    assert rig.memory.read(FIRST << 12, 4) == bytes(4)
    driver.request(DEFLATE, [numbers(pages)])
    fill(rig, FIRST << 12, 512)
    assert rig.memory.allocated >= before


def test_single_pages_and_a_request_in_pieces(rig: Rig) -> None:
    driver = start(rig)
    fill(rig, FIRST << 12, 8)
    data = numbers([FIRST + 1, FIRST + 5])
    driver.request(INFLATE, [data[:3], data[3:]])
    gone = [not any(rig.memory.read((FIRST + page) << 12, 4)) for page in range(8)]
    assert gone == [False, True, False, False, False, True, False, False]


def test_the_same_page_often(rig: Rig) -> None:
    driver = start(rig)
    fill(rig, FIRST << 12, 2)
    driver.request(INFLATE, [numbers([FIRST] * 200)])
    assert rig.memory.read(FIRST << 12, 4) == bytes(4)
    assert rig.memory.read(FIRST + 1 << 12, 4) == b"used"


@pytest.mark.parametrize(
    "pages",
    [[0xFFFF_FFFF], [LOW >> 12], [(HIGH + SIZE - LOW) >> 12], [FIRST, LOW >> 12]],
    ids=["the last number", "in the hole", "behind the end", "one of two"],
)
def test_a_page_outside_memory_stops_the_device(rig: Rig, pages: list[int]) -> None:
    driver = start(rig)
    fill(rig, FIRST << 12, 1)
    driver.queues[INFLATE].add([numbers(pages)])
    driver.kick(INFLATE)
    assert eventually(lambda: driver.needs_reset)
    assert "outside guest memory" in str(driver.device.fault)
    assert rig.memory.read(FIRST << 12, 4) == b"used", "all or nothing"


def test_a_range_over_the_edge_of_a_region(rig: Rig) -> None:
    driver = start(rig)
    edge = LOW >> 12
    fill(rig, LOW - 4096, 1)
    driver.queues[INFLATE].add([numbers([edge - 1, edge])])
    driver.kick(INFLATE)
    assert eventually(lambda: driver.needs_reset)
    assert rig.memory.read(LOW - 4096, 4) == b"used"


def test_memory_above_the_hole(rig: Rig) -> None:
    driver = start(rig)
    fill(rig, HIGH, 4)
    before = rig.memory.allocated
    driver.request(INFLATE, [numbers(range(HIGH >> 12, (HIGH >> 12) + 4))])
    assert rig.memory.read(HIGH, 4) == bytes(4)
    assert rig.memory.allocated <= before


def test_more_page_numbers_than_are_heard(rig: Rig) -> None:
    driver = start(rig)
    fill(rig, FIRST << 12, 2)
    pages = [FIRST] * MOST + [FIRST + 1]
    driver.request(INFLATE, [numbers(pages)])
    assert rig.memory.read(FIRST << 12, 4) == bytes(4)
    assert rig.memory.read(FIRST + 1 << 12, 4) == b"used"
    driver.queues[INFLATE].add([], [4096])
    driver.queues[INFLATE].add([b"odd"])
    driver.kick(INFLATE)
    assert len(driver.wait(INFLATE, 2)) == 2
    assert not driver.needs_reset


@pytest.mark.parametrize("number", [REPORT_AS_LINUX, REPORT_AS_SPECIFIED])
def test_reported_memory_leaves_the_host(rig: Rig, number: int) -> None:
    driver = start(rig, indexes=(INFLATE, DEFLATE, STATISTICS, number), size=128)
    fill(rig, 24 << 20, 1024)
    before = rig.memory.allocated
    queue = driver.queues[number]
    queue.set_descriptor(0, 24 << 20, 2 << 20, abi.DESC_F_WRITE | abi.DESC_F_NEXT, 1)
    queue.set_descriptor(1, 26 << 20, 2 << 20, abi.DESC_F_WRITE)
    queue.offer(0)
    driver.kick(number)
    assert eventually(lambda: rig.memory.read_u16(queue.used + 2) == 1)
    assert before - rig.memory.allocated >= 4 << 20
    assert driver.device.statistics()["given_back"] == 4 << 20


def test_a_report_of_parts_of_pages(rig: Rig) -> None:
    driver = start(rig)
    fill(rig, 24 << 20, 3)
    rig.memory.write((24 << 20) + 8192 + 100, b"kept")
    queue = driver.queues[REPORT_AS_LINUX]
    queue.set_descriptor(0, (24 << 20) + 1, 8192 + 50, abi.DESC_F_WRITE)
    queue.offer(0)
    driver.kick(REPORT_AS_LINUX)
    assert eventually(lambda: rig.memory.read_u16(queue.used + 2) == 1)
    assert [rig.memory.read((24 << 20) + at, 4) for at in (0, 4096, 8192, 8292)] == [
        b"used",
        bytes(4),
        b"used",
        b"kept",
    ]


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_target_and_actual(rig: Rig, transport: str) -> None:
    driver = start(rig, transport)
    balloon = driver.device
    assert isinstance(balloon, Balloon)
    assert (balloon.target, balloon.actual) == (SIZE, SIZE)
    generation = driver.generation()
    balloon.set_target(SIZE // 2)
    assert driver.generation() != generation
    assert driver.config(0, 4) == SIZE // 2 >> 12
    address = driver.config_address(4)
    rig.write(address, 4, 1000)
    assert driver.config(4, 4) == 1000
    assert balloon.actual == SIZE - 1000 * 4096
    rig.write(address, 4, 0xFFFF_FFFF)
    assert balloon.actual == 0, "no less than nothing"
    rig.write(address, 1, 7)
    rig.write(driver.config_address(0), 4, 7)
    assert driver.config(0, 4) == SIZE // 2 >> 12, "the target is ours"
    driver.set_status(0)
    assert (balloon.target, balloon.actual) == (SIZE // 2, SIZE)


def test_the_config_space_is_announced(rig: Rig) -> None:
    """Linux checks each access against the capability's length, and stops (BUG) at one behind it."""
    driver = start(rig)
    assert isinstance(driver, PciDriver)
    assert driver.lengths[abi.PCI_CAP_DEVICE_CFG] >= abi.BALLOON_CONFIG.size


def test_statistics_are_asked_for(rig: Rig) -> None:
    driver = start(rig)
    balloon = driver.device
    assert isinstance(balloon, Balloon)
    queue = driver.queues[STATISTICS]

    def tell(free: int) -> None:
        stat = abi.BALLOON_STAT
        unknown, rest = stat.pack(999, 1), b"rest"
        queue.add([stat.pack(abi.BALLOON_S_MEMFREE, free) + unknown + rest])
        driver.kick(STATISTICS)

    tell(1000)
    assert eventually(lambda: balloon.ask_statistics(0) == {"free_memory": 1000})
    driver.wait(STATISTICS)
    answer = threading.Timer(0.05, tell, [2000])
    answer.start()
    assert balloon.ask_statistics(10) == {"free_memory": 2000}
    answer.join()
    assert balloon.ask_statistics(0.01) == {"free_memory": 2000}, "a guest that does not answer"
    driver.wait(STATISTICS)
    driver.set_status(0)
    assert balloon.ask_statistics(10) == {}, "without a driver, at once"


def test_one_statistics_buffer_is_kept(rig: Rig) -> None:
    driver = start(rig)
    for _ in range(5):
        driver.queues[STATISTICS].add([bytes(module.MOST_STATISTICS * 20)])
    driver.kick(STATISTICS)
    assert len(driver.wait(STATISTICS, 4)) == 4
    state = driver.device.save()
    assert state["queues"][STATISTICS] == [STATISTICS, 4, 4], "the fifth comes again"
    assert not driver.needs_reset


def test_it_goes_on_after_a_reset(rig: Rig) -> None:
    driver = start(rig)
    driver.queues[INFLATE].add([numbers([0xFFFF_FFFF])])
    driver.kick(INFLATE)
    assert eventually(lambda: driver.needs_reset)
    driver.start(FEATURES)
    fill(rig, FIRST << 12, 1)
    driver.request(INFLATE, [numbers([FIRST])])
    assert rig.memory.read(FIRST << 12, 4) == bytes(4)


# -- the host's pages are larger -----------------------------------------------------------------


def test_only_whole_pages_of_the_host_go() -> None:
    whole = WholePages(HUGE_PAGE)
    assert whole.add(range(512, 1023)) == []
    assert whole.add([5]) == []
    whole.remove([600])
    assert whole.add([1023]) == []
    assert whole.add([600, 600]) == [(512, 512)]
    whole.remove([*range(512, 1024), 5, 77])
    assert whole.add([512]) == []


def test_hugepages(request: pytest.FixtureRequest) -> None:
    try:
        memory = GuestMemory(SIZE, low_end=LOW, high_start=HIGH, hugepages=True)
    except Exception as error:
        pytest.skip(f"no huge pages: {error}")
    rig = Rig(memory)
    request.addfinalizer(rig.close)
    driver = start(rig)
    fill(rig, FIRST << 12, 512)
    before = rig.memory.allocated
    driver.request(INFLATE, [numbers(range(FIRST, FIRST + 511))])
    assert rig.memory.allocated == before
    assert rig.memory.read(FIRST << 12, 4) == b"used"
    driver.request(INFLATE, [numbers([FIRST + 511])])
    assert rig.memory.allocated == before - HUGE_PAGE
