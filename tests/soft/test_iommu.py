"""Root, context and second-level tables; faults and invalidation; and what an evil guest reaches by DMA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostel.memory import GuestMemory
from hostel.soft import dma
from hostel.soft.dma import CopyEngine, DirectPort, Port, TranslatedPort
from hostel.soft.iommu import READ, WRITE, DmaFault, Fault, Iommu, Refusal, Tables
from hostel.soft.physical import PAGE, PhysicalMemory

NIC = 0x0010
"""Bus 0, device 2, function 0."""
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    with PhysicalMemory(frames=256) as made:
        yield made


@pytest.fixture
def iommu(memory: PhysicalMemory) -> Iommu:
    return Iommu(memory)


@pytest.fixture
def tables(memory: PhysicalMemory, iommu: Iommu) -> Tables:
    made = Tables(memory)
    iommu.root_table = made.root
    return made


def refused(iommu: Iommu, address: int, *, is_write: bool = False, source: int = NIC) -> DmaFault:
    with pytest.raises(Refusal) as error:
        iommu.translate(source, address, is_write=is_write)
    return error.value.fault.reason


def test_off_lets_everything_through(iommu: Iommu) -> None:
    assert iommu.translate(NIC, 0x12345, is_write=True) == (0x12345, 0xCBB)


def test_a_page(iommu: Iommu, tables: Tables, memory: PhysicalMemory) -> None:
    table = tables.domain()
    tables.assign(NIC, 7, table)
    tables.map(table, 0x40_0000, 0x9000, PAGE)
    assert iommu.translate(NIC, 0x40_0123, is_write=True) == (0x9123, PAGE - 0x123)
    assert iommu.statistics.references == 2 + 4, "root, context, four levels"
    iommu.translate(NIC, 0x40_0FFF, is_write=False)
    assert iommu.statistics.references == 6
    assert iommu.statistics.iotlb_hits == 1


@pytest.mark.parametrize("level", [1, 2, 3], ids=["4 KiB", "2 MiB", "1 GiB"])
def test_page_sizes(iommu: Iommu, tables: Tables, level: int) -> None:
    size = PAGE << 9 * (level - 1)
    table = tables.domain()
    tables.assign(NIC, 1, table)
    tables.map(table, size, 3 * size, size)
    assert iommu.translate(NIC, size + 5, is_write=False) == (3 * size + 5, size - 5)
    assert iommu.statistics.references == 2 + 5 - level


def test_rights(iommu: Iommu, tables: Tables) -> None:
    table = tables.domain()
    tables.assign(NIC, 1, table)
    tables.map(table, 0x1000, 0x1000, PAGE, READ)
    tables.map(table, 0x2000, 0x2000, PAGE, WRITE)
    iommu.translate(NIC, 0x1000, is_write=False)
    assert refused(iommu, 0x1000, is_write=True) is DmaFault.WRITE_DENIED
    assert refused(iommu, 0x2000) is DmaFault.READ_DENIED
    assert refused(iommu, 0x3000) is DmaFault.READ_DENIED
    assert refused(iommu, 1 << 48) is DmaFault.BEYOND_WIDTH


def test_who_is_unknown(iommu: Iommu, tables: Tables, memory: PhysicalMemory) -> None:
    assert refused(iommu, 0, source=0x0100) is DmaFault.ROOT_NOT_PRESENT
    tables.assign(0x0108, 1, tables.domain())
    assert refused(iommu, 0, source=0x0110) is DmaFault.CONTEXT_NOT_PRESENT
    tables.remove(0x0108)
    assert refused(iommu, 0, source=0x0108) is DmaFault.CONTEXT_NOT_PRESENT


def test_tables_that_are_broken(iommu: Iommu, tables: Tables, memory: PhysicalMemory) -> None:
    root = tables.root
    memory.write_u64(root, (1 << 39) | 1)
    assert refused(iommu, 0) is DmaFault.CONTEXT_ACCESS
    iommu.root_table = 1 << 39
    assert refused(iommu, 0) is DmaFault.ROOT_ACCESS
    iommu.root_table = root
    contexts = memory.allocate()
    memory.write_u64(root, contexts | 1)
    memory.write_u64(contexts + NIC * 16, 1 | 3 << 2)
    memory.write_u64(contexts + NIC * 16 + 8, 2)
    assert refused(iommu, 0) is DmaFault.CONTEXT_INVALID
    memory.write_u64(contexts + NIC * 16, (1 << 39) | 1)
    assert refused(iommu, 0) is DmaFault.TABLE_ACCESS
    iommu.invalidate_contexts()
    table = memory.allocate()
    memory.write_u64(contexts + NIC * 16, table | 1)
    memory.write_u64(table, 1 << 7 | 3)
    assert refused(iommu, 0) is DmaFault.TABLE_RESERVED, "no page of 512 GiB"


ROOT_BITS = [*range(1, 12), *range(40, 128)]
CONTEXT_BITS = [*range(4, 12), *range(40, 64), 64 + 7, *range(64 + 24, 128)]
ENTRY_BITS = [11, *range(40, 52), 62]
LARGE_BITS = [*ENTRY_BITS, *range(12, 21)]


def flip(memory: PhysicalMemory, at: int, bit: int) -> None:
    at += bit // 64 * 8
    memory.write_u64(at, memory.read_u64(at) ^ 1 << bit % 64)


@pytest.fixture
def path(memory: PhysicalMemory, tables: Tables) -> dict[str, int]:
    """Where the entries are that lead to a page of 4 KiB at 0 and to one of 2 MiB at 2 MiB."""
    table = tables.domain()
    tables.assign(NIC, 1, table)
    tables.map(table, 0, 0x9000, PAGE)
    tables.map(table, 2 * MIB, 4 * MIB, 2 * MIB)
    frame = (1 << 40) - PAGE
    found = {"root": tables.root, "level 4": table}
    found["context"] = (memory.read_u64(tables.root) & frame) + NIC * 16
    for level in (3, 2, 1):
        found[f"level {level}"] = memory.read_u64(found[f"level {level + 1}"]) & frame
    found["large"] = found["level 2"] + 8
    return found


class Reserved(NamedTuple):
    entry: str
    bits: list[int]
    reason: DmaFault
    address: int = 0
    """Whose translation meets it."""


RESERVED = [
    Reserved("root", ROOT_BITS, DmaFault.ROOT_RESERVED),
    Reserved("context", CONTEXT_BITS, DmaFault.CONTEXT_RESERVED),
    Reserved("level 4", [7, *ENTRY_BITS], DmaFault.TABLE_RESERVED),
    Reserved("level 3", ENTRY_BITS, DmaFault.TABLE_RESERVED),
    Reserved("level 2", ENTRY_BITS, DmaFault.TABLE_RESERVED),
    Reserved("large", LARGE_BITS, DmaFault.TABLE_RESERVED, 2 * MIB),
    Reserved("level 1", ENTRY_BITS, DmaFault.TABLE_RESERVED),
]


@pytest.mark.parametrize("case", RESERVED, ids=lambda case: case.entry)
def test_every_reserved_bit_is_a_fault_of_its_own_kind(
    iommu: Iommu, memory: PhysicalMemory, path: dict[str, int], case: Reserved
) -> None:
    """VT-d §7.1.3: a reserved field that is set, in an entry that is present."""
    for bit in case.bits:
        flip(memory, path[case.entry], bit)
        assert refused(iommu, case.address) is case.reason, f"bit {bit}"
        flip(memory, path[case.entry], bit)
    assert iommu.translate(NIC, case.address, is_write=True)[0] in (0x9000, 4 * MIB)


def test_bits_that_are_ignored(iommu: Iommu, memory: PhysicalMemory, path: dict[str, int]) -> None:
    """Software's own (§9.3: 70:67; §9.8: 63, 61:52, what is not used of 10:2), and PS at the last level."""
    for entry, ignored in (
        ("context", [*range(67, 71)]),
        ("level 2", [*range(2, 7), 8, 9, 10, *range(52, 62), 63]),
        ("level 1", [*range(2, 11), *range(52, 62), 63]),
    ):
        for bit in ignored:
            flip(memory, path[entry], bit)
    assert iommu.translate(NIC, 5, is_write=True)[0] == 0x9005


def test_what_is_not_present_has_no_reserved_bits(
    iommu: Iommu, memory: PhysicalMemory, path: dict[str, int]
) -> None:
    for entry, reason in (
        ("level 1", DmaFault.READ_DENIED),
        ("context", DmaFault.CONTEXT_NOT_PRESENT),
        ("root", DmaFault.ROOT_NOT_PRESENT),
    ):
        memory.write_u64(path[entry], bits_without_present(entry))
        iommu.invalidate_contexts()
        assert refused(iommu, 0) is reason


def bits_without_present(entry: str) -> int:
    return 2**64 - 1 - (3 if entry.startswith("level") else 1 | 2)


def test_a_page_is_neither_replaced_nor_split(tables: Tables, memory: PhysicalMemory) -> None:
    """Its own entry would be taken for a table, and what it maps be written to."""
    table = tables.domain()
    tables.map(table, 0, 0, 2 * MIB)
    before = memory.read(0, 64 * PAGE)
    with pytest.raises(ValueError, match="there is a page at 0x1000: unmap it first"):
        tables.map(table, 0x1000, 0x9000, PAGE)
    with pytest.raises(ValueError, match="a page of 0x200000 bytes at 0x0 lies across"):
        tables.unmap(table, 0x1000, PAGE)
    assert memory.read(0, 64 * PAGE) == before


def test_tables_that_are_empty_are_given_back(tables: Tables, memory: PhysicalMemory) -> None:
    table = tables.domain()
    before = memory.frames_used
    tables.map(table, 0x7F_FFFF_F000, 0x9000, 2 * PAGE)
    assert memory.frames_used == before + 6, "two paths, that share the root only"
    tables.unmap(table, 0x7F_FFFF_F000, 2 * PAGE)
    assert memory.frames_used == before


def test_pass_through(iommu: Iommu, tables: Tables, memory: PhysicalMemory) -> None:
    tables.assign(NIC, 1, 0)
    at = memory.read_u64(tables.root) & -PAGE
    memory.write_u64(at + NIC * 16, 1 | 2 << 2)
    assert iommu.translate(NIC, 0x1234, is_write=True)[0] == 0x1234


def test_a_mapping_lives_on_until_it_is_invalidated(iommu: Iommu, tables: Tables) -> None:
    table = tables.domain()
    tables.assign(NIC, 1, table)
    tables.map(table, 0x1000, 0x5000, 2 * PAGE)
    for address in (0x1000, 0x2000):
        iommu.translate(NIC, address, is_write=False)
    tables.unmap(table, 0x1000, 2 * PAGE)
    assert iommu.translate(NIC, 0x1000, is_write=False)[0] == 0x5000, "stale"
    iommu.invalidate_iotlb(domain=2)
    assert iommu.translate(NIC, 0x1000, is_write=False)[0] == 0x5000, "another domain's"
    iommu.invalidate_iotlb(domain=1, address=0x1000)
    assert refused(iommu, 0x1000) is DmaFault.READ_DENIED
    assert iommu.translate(NIC, 0x2000, is_write=False)[0] == 0x6000, "not that page"
    iommu.invalidate_iotlb()
    assert refused(iommu, 0x2000) is DmaFault.READ_DENIED


def test_a_context_lives_on_until_it_is_invalidated(iommu: Iommu, tables: Tables) -> None:
    ours, theirs = tables.domain(), tables.domain()
    tables.map(ours, 0, 0x5000, PAGE)
    tables.map(theirs, 0, 0x6000, PAGE)
    tables.assign(NIC, 1, ours)
    assert iommu.translate(NIC, 0, is_write=False)[0] == 0x5000
    tables.assign(NIC, 2, theirs)
    assert iommu.translate(NIC, 0, is_write=False)[0] == 0x5000
    iommu.invalidate_contexts(source=NIC)
    assert iommu.translate(NIC, 0, is_write=False)[0] == 0x6000


def test_faults_are_recorded_and_may_overflow(iommu: Iommu, tables: Tables) -> None:
    tables.assign(NIC, 1, tables.domain())
    refused(iommu, 0x1234, is_write=True)
    assert iommu.take_faults() == [Fault(NIC, 0x1000, DmaFault.WRITE_DENIED, True)]
    for _ in range(17):
        refused(iommu, 0)
    assert len(iommu.faults) == 16
    assert iommu.overflow
    iommu.take_faults()
    assert (iommu.faults, iommu.overflow) == ([], False)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 4000), st.tuples(st.integers(0, 4000), st.integers(1, 3))),
    st.lists(st.tuples(st.integers(0, 4100), st.booleans()), max_size=40),
)
def test_it_does_what_a_dictionary_does(
    pages: dict[int, tuple[int, int]], accesses: list[tuple[int, bool]]
) -> None:
    with PhysicalMemory(frames=64) as memory:
        tables, iommu = Tables(memory), Iommu(memory)
        iommu.root_table = tables.root
        table = tables.domain()
        tables.assign(NIC, 3, table)
        for page, (frame, rights) in pages.items():
            tables.map(table, page * PAGE, frame * PAGE, PAGE, rights)
        for page, is_write in accesses:
            frame, rights = pages.get(page, (0, 0))
            if rights & (WRITE if is_write else READ):
                hpa, _ = iommu.translate(NIC, page * PAGE + 9, is_write=is_write)
                assert hpa == frame * PAGE + 9
            else:
                refused(iommu, page * PAGE + 9, is_write=is_write)


# --- What an evil guest reaches ---


class Host:
    """Two machines' memory on one bus; the second has a secret."""

    SECRET = b"the neighbour's secret"

    def __init__(self, memory: PhysicalMemory) -> None:
        self.bus = memory
        self.mine, self.theirs = GuestMemory(2 * MIB), GuestMemory(2 * MIB)
        self.my_base = memory.attach(self.mine)[0].hpa
        self.their_base = memory.attach(self.theirs)[0].hpa
        self.theirs.write(0x3000, self.SECRET)
        self.mine.write(0x1000, b"my own data")

    def copy(self, port: Port, source: int, destination: int, length: int = 32) -> int:
        """Drive the device as a guest does; its status."""
        engine = CopyEngine(port)
        for register, value in (
            (dma.SOURCE, source),
            (dma.DESTINATION, destination),
            (dma.LENGTH, length),
            (dma.COMMAND, dma.COPY),
        ):
            engine.write(register, value.to_bytes(8, "little"))
        return int.from_bytes(engine.read(dma.STATUS, 8), "little")

    def assigned(self) -> tuple[TranslatedPort, Iommu]:
        """The device passed through, behind the host's IOMMU: guest addresses are its addresses."""
        tables, iommu = Tables(self.bus), Iommu(self.bus)
        table = tables.domain()
        tables.assign(NIC, 1, table)
        tables.map(table, 0, self.my_base, self.mine.size)
        iommu.root_table = tables.root
        return TranslatedPort(iommu, self.bus, NIC), iommu


@pytest.fixture
def host(memory: PhysicalMemory) -> Iterator[Host]:
    made = Host(memory)
    yield made
    made.mine.close()
    made.theirs.close()


def test_emulated_reaches_its_own_memory_only(host: Host) -> None:
    port = DirectPort(host.mine)
    assert host.copy(port, 0x1000, 0x2000) == dma.DONE
    assert host.mine.read(0x2000, 11) == b"my own data"
    assert host.copy(port, host.their_base + 0x3000, 0x2000) == dma.ERROR
    assert host.copy(port, 0x1000, host.mine.size - 4) == dma.ERROR
    assert Host.SECRET not in bytes(host.mine.view(0, host.mine.size))


def test_passed_through_without_an_iommu_reaches_everything(host: Host) -> None:
    port = DirectPort(host.bus)
    assert host.copy(port, host.their_base + 0x3000, host.my_base + 0x2000) == dma.DONE
    assert host.mine.read(0x2000, len(Host.SECRET)) == Host.SECRET
    frame = host.bus.allocate()
    host.copy(port, host.my_base + 0x1000, frame, 11)
    assert host.bus.read(frame, 11) == b"my own data", "a table of the hypervisor's, overwritten"
    assert host.copy(port, 0x1000, 0x2000) == dma.DONE, "a guest's own address is not what it means"
    assert host.mine.read(0x2000, 11) != b"my own data"


def test_passed_through_behind_an_iommu_reaches_its_own_memory_only(host: Host) -> None:
    port, iommu = host.assigned()
    assert host.copy(port, 0x1000, 0x2000) == dma.DONE
    assert host.mine.read(0x2000, 11) == b"my own data"
    for address in (host.their_base + 0x3000, host.my_base, 0, 1 << 39):
        before = bytes(host.theirs.view(0, host.theirs.size))
        status = host.copy(port, 0x1000, address + host.mine.size)
        assert status == dma.ERROR
        assert bytes(host.theirs.view(0, host.theirs.size)) == before
    assert {fault.source for fault in iommu.take_faults()} == {NIC}


def test_a_guest_may_hold_its_own_device_behind_an_iommu(host: Host) -> None:
    """Emulated, with an IOMMU that the guest programs: the tables are its own, checked like all of its
    memory."""
    own = Iommu(host.mine)
    own.root_table = 0x10_0000
    for at, value in (
        (0x10_0000, 0x10_1000 | 1),
        (0x10_1000 + NIC * 16, 0x10_2000 | 1),
        (0x10_1000 + NIC * 16 + 8, 1 << 8 | 1),
        (0x10_2000, 0x10_3000 | 3),
        (0x10_3000, 0x10_4000 | 3),
        (0x10_4000 + 8, 0x1000 | READ),
        (0x10_4000 + 16, 0x2000 | READ | WRITE),
    ):
        host.mine.write_u64(at, value)
    port = TranslatedPort(own, host.mine, NIC)
    assert host.copy(port, 0x1000, 0x2000) == dma.DONE
    assert host.copy(port, 0x2000, 0x1000) == dma.ERROR, "the guest gave that page to read only"
    host.mine.write_u64(0x10_4000 + 24, (host.their_base + 0x3000) | READ)
    assert host.copy(port, 0x3000, 0x2000) == dma.ERROR, (
        "its tables cannot name what is not its own"
    )


def test_a_copy_that_is_too_long_is_refused(host: Host) -> None:
    assert host.copy(DirectPort(host.mine), 0, 0, 1 << 40) == dma.ERROR


def test_registers_in_a_page_of_the_guest(host: Host) -> None:
    """Passed through: no exit, the device looks at the page by itself."""
    page = host.mine.view(0x8000, PAGE)
    engine = CopyEngine(DirectPort(host.mine), page)
    assert host.mine.read(0x8000, 4) == b"HDMA"
    assert not engine.poll()
    for register, value in (
        (dma.SOURCE, 0x1000),
        (dma.DESTINATION, 0x2000),
        (dma.LENGTH, 11),
        (dma.COMMAND, 1),
    ):
        host.mine.write_u64(0x8000 + register, value)
    assert engine.poll()
    assert host.mine.read_u64(0x8000 + dma.STATUS) == dma.DONE
    assert host.mine.read(0x2000, 11) == b"my own data"
    state = engine.save()
    engine.reset()
    engine.load(state)
    assert host.mine.read_u64(0x8000 + dma.STATUS) == dma.DONE
