"""Guest memory: bounds, regions, names of its bytes, lifetime."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostel.errors import HostError, MachineStopped, MemoryFault, SpecError
from hostel.memory import HUGE_PAGE, PAGE, GuestMemory, map_shared

LOW, HIGH = 4 << 20, 64 << 20  # a small hole instead of the real one
SIZE = 6 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(SIZE, low_end=LOW, high_start=HIGH) as memory:
        yield memory


def test_small_memory_is_one_region() -> None:
    with GuestMemory(2 << 20) as memory:
        (region,) = memory.regions
        assert (region.gpa, region.size, region.offset) == (0, 2 << 20, 0)


def test_memory_goes_on_above_the_hole(memory: GuestMemory) -> None:
    low, high = memory.regions
    assert (low.gpa, low.size, low.offset) == (0, LOW, 0)
    assert (high.gpa, high.size, high.offset) == (HIGH, SIZE - LOW, LOW)
    assert high.hva - low.hva == high.offset


def test_it_is_aligned_for_huge_pages(memory: GuestMemory) -> None:
    assert memory.regions[0].hva % HUGE_PAGE == 0


def test_the_three_names_are_of_the_same_bytes(memory: GuestMemory) -> None:
    for region in memory.regions:
        memory.write(region.gpa + 5, b"same")
        assert ctypes.string_at(region.hva + 5, 4) == b"same"
        assert os.pread(memory.fd, 4, region.offset + 5) == b"same"
        assert memory.hva(region.gpa + 5, 4) == region.hva + 5


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (LOW, 1),
        (LOW - 1, 2),
        (HIGH - 1, 1),
        (HIGH - 1, 2),
        (HIGH + SIZE - LOW, 1),
        (HIGH + SIZE - LOW - 1, 2),
        (-1, 1),
        (-1, 2),
        (0, -1),
        (16, -8),
        (0, SIZE),
        (2**64 - 1, 1),
        (2**64, 8),
        (0, 2**64),
    ],
)
def test_what_is_not_inside_one_region_faults(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(MemoryFault, match="outside guest memory"):
        memory.view(gpa, size)
    with pytest.raises(MemoryFault):
        memory.read(gpa, size)
    with pytest.raises(MemoryFault):
        memory.hva(gpa, size)


def test_a_write_across_the_end_changes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(MemoryFault):
        memory.write(LOW - 2, b"abcd")
    assert memory.read(LOW - 2, 2) == b"\0\0"
    assert memory.read(HIGH, 2) == b"\0\0"


@pytest.mark.parametrize("gpa", [LOW - 1, HIGH + SIZE - LOW - 1, HIGH - 1])
def test_numbers_across_the_end_fault(memory: GuestMemory, gpa: int) -> None:
    for read in (memory.read_u16, memory.read_u32, memory.read_u64):
        with pytest.raises(MemoryFault):
            read(gpa)
    for write in (memory.write_u16, memory.write_u32, memory.write_u64):
        with pytest.raises(MemoryFault):
            write(gpa, 0)


@given(gpa=st.integers(-(2**65), 2**65), size=st.integers(-(2**65), 2**65))
def test_a_view_is_inside_or_a_fault(gpa: int, size: int) -> None:
    with GuestMemory(PAGE) as memory:
        try:
            view = memory.view(gpa, size)
        except MemoryFault:
            assert gpa < 0 or size < 0 or gpa + size > PAGE
        else:
            assert len(view) == size


def test_numbers_are_little_endian(memory: GuestMemory) -> None:
    memory.write_u64(0, 0x1122_3344_5566_7788)
    assert memory.read(0, 8) == bytes.fromhex("8877665544332211")
    assert (memory.read_u16(0), memory.read_u32(4)) == (0x7788, 0x1122_3344)
    memory.write_u16(HIGH, 0xAABB)
    memory.write_u32(HIGH + 2, 0xCCDD_EEFF)
    assert memory.read(HIGH, 6) == bytes.fromhex("bbaaffeeddcc")


def test_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    view = memory.view(100, 4)
    view[:] = b"abcd"
    assert memory.read(100, 4) == b"abcd"
    memory.write(101, memoryview(b"XY"))
    assert bytes(view) == b"aXYd"


def test_a_view_of_nothing_at_the_very_end_is_empty(memory: GuestMemory) -> None:
    assert len(memory.view(LOW, 0)) == 0


def test_close_with_views_about_frees_the_pages_with_the_last_view() -> None:
    memory = GuestMemory(2 << 20)
    hva = memory.regions[0].hva
    view = memory.view(0, 4)
    view[:] = b"kept"
    memory.close()
    memory.close()
    assert bytes(view) == b"kept"
    assert mapped(hva)
    del view
    assert not mapped(hva)


def test_after_close_nothing_is_reached() -> None:
    memory = GuestMemory(2 << 20)
    memory.close()
    for act in (memory.read_u32, memory.hva, lambda gpa: memory.write(gpa, b"x")):
        with pytest.raises(MachineStopped, match="closed"):
            act(0)


def mapped(hva: int) -> bool:
    return any(
        line.startswith(f"{hva:x}-") for line in Path("/proc/self/maps").read_text().splitlines()
    )


def test_it_is_left_out_of_core_dumps() -> None:
    with GuestMemory(2 << 20) as memory:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(
            number
            for number, line in enumerate(lines)
            if line.startswith(f"{memory.regions[0].hva:x}-")
        )
        flags = next(line for line in lines[start:] if line.startswith("VmFlags:"))
        assert " dd" in flags


def test_memory_beyond_the_host_is_only_promised() -> None:
    with GuestMemory(1 << 40) as memory:
        memory.write(1 << 39, b"far")
        assert memory.read(1 << 39, 3) == b"far"


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_an_impossible_size(size: int) -> None:
    with pytest.raises(SpecError, match="memory must be a positive multiple of 4096"):
        GuestMemory(size)


def test_more_than_the_address_space_is_refused() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=r"the host refused .* of guest memory"):
        GuestMemory(1 << 50)
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_free_huge_pages_names_the_cure() -> None:
    free = int(Path("/proc/sys/vm/nr_hugepages").read_text())
    need = free + 64
    with pytest.raises(HostError, match=rf"no {need} free huge pages.*vm.nr_hugepages={need}"):
        GuestMemory(need * HUGE_PAGE, hugepages=True)


def test_huge_pages_where_the_host_has_some() -> None:
    if "HugePages_Free:        0" in Path("/proc/meminfo").read_text():
        pytest.skip("the host has no free huge pages (sysctl vm.nr_hugepages)")
    with GuestMemory(HUGE_PAGE, hugepages=True) as memory:
        memory.write(0, b"huge")
        assert memory.read(0, 4) == b"huge"


def test_a_file_is_received_where_it_belongs(memory: GuestMemory, tmp_path: Path) -> None:
    data = os.urandom(3 * PAGE + 5)
    path = tmp_path / "file"
    path.write_bytes(b"before" + data)
    with path.open("rb") as file:
        for gpa in (PAGE - 7, HIGH + 1):
            memory.receive(gpa, len(data), file.fileno(), 6)
            assert memory.read(gpa, len(data)) == data
        with pytest.raises(EOFError):
            memory.receive(0, len(data) + 1, file.fileno(), 6)
        with pytest.raises(MemoryFault):
            memory.receive(LOW - 1, 2, file.fileno(), 0)


def test_a_file_that_the_kernel_cannot_send_is_read(memory: GuestMemory) -> None:
    with open("/proc/self/auxv", "rb") as file:
        with pytest.raises(OSError, match="Invalid argument"):
            os.sendfile(memory.fd, file.fileno(), 0, 64)
        memory.receive(PAGE, 64, file.fileno(), 0)
        assert memory.read(PAGE, 64) == os.pread(file.fileno(), 64, 0) != bytes(64)


def test_a_file_shared_with_the_kernel_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(b"hello".ljust(mmap.PAGESIZE, b"\0"))
    fd = os.open(path, os.O_RDWR)
    view = map_shared(fd, mmap.PAGESIZE)
    os.close(fd)
    piece = view[:5]
    del view
    assert bytes(piece) == b"hello"
    assert str(path) in Path("/proc/self/maps").read_text()
    del piece
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_populated_pages_are_the_hosts_and_hold_what_they_held() -> None:
    with GuestMemory(16 << 20, low_end=8 << 20) as memory:
        memory.write(4 << 20, b"kept")
        if not memory.populate(4 << 20, PAGE):
            pytest.skip("the host's kernel cannot populate memory (before Linux 5.14)")
        before = memory.allocated
        assert memory.populate((6 << 20) - 1, (2 << 20) + 1)
        assert memory.populate(1 << 32, 8 << 20)
        assert memory.allocated >= before + (10 << 20)
        assert memory.read(4 << 20, 5) == b"kept\0"
        assert memory.populate(PAGE, 0)
        with pytest.raises(MemoryFault):
            memory.populate((8 << 20) - PAGE, 2 * PAGE)
    with pytest.raises(MachineStopped):
        memory.populate(0, PAGE)


def test_discarded_pages_are_zeros_and_no_longer_the_hosts() -> None:
    with GuestMemory(8 << 20, low_end=4 << 20) as memory:
        for page in range(1024):
            memory.write(page * PAGE, b"used")
        before = memory.allocated
        views = [
            memory.view(start, size) for start, size in ((PAGE, PAGE), (3 * PAGE - 1, 2 * PAGE))
        ]
        overlapping = [memory.view(2 << 20, 1 << 20), memory.view((2 << 20) + PAGE, 1 << 20)]
        given = memory.discard([*overlapping, *views, memory.view(0, PAGE - 1)])
        assert given == 2 * PAGE + (1 << 20) + PAGE
        assert [page for page in range(8) if not any(memory.read(page * PAGE, 4))] == [1, 3]
        assert (
            before - memory.allocated >= given - 2 * PAGE
        )  # of a huge page that was split, perhaps
    with pytest.raises(MachineStopped):
        memory.discard([])
