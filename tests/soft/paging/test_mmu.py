"""One processor's memory unit: references counted, violations qualified, what a core may keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.soft.paging.mmu import WalkTrace
from hostel.soft.paging.nested import FINAL, LINEAR_VALID
from hostel.soft.paging.tlb import Invept, Invvpid
from hostel.soft.paging.tree import SHIFTS
from hostel.soft.paging.virtualizer import Registers
from hostel.soft.silicon import Access, EptFault, PageFault, Reason, Translation
from hostel.soft.state import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_SMAP, EFER_LME
from soft.paging.rig import ROM, Machine

READ, WRITE, FETCH = Access.READ, Access.WRITE, Access.FETCH
LONG = Registers(CR0_PE | CR0_PG | CR0_WP, 0x1000, CR4_PAE | CR4_PGE, EFER_LME)
ADDRESS = 0x5678


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A guest with ADDRESS mapped at GPA 0x9678, writable, and EPT in pages of 4 KiB."""
    with Machine("ept", large_pages=False) as machine:
        for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9007)):
            machine.memory.write_u64(at, entry)
        machine.cpu.load(LONG)
        yield machine


def translate(machine: Machine, access: Access = READ, user: bool = False) -> Translation:
    cpu = machine.cpu
    return machine.mmu.translate(cpu.state, cpu.controls, ADDRESS, access, user)


def violation(machine: Machine, access: Access = READ) -> EptFault:
    with pytest.raises(EptFault) as caught:
        translate(machine, access)
    return caught.value


def ept_entry(machine: Machine, gpa: int) -> int:
    """HPA of the last entry for a GPA."""
    table = machine.cpu.controls.ept_pointer & ~0xFFF
    for shift in SHIFTS[:-1]:
        table = machine.physical.read_u64(table + (gpa >> shift & 511) * 8) & ~0xFFF
    return table + (gpa >> 12 & 511) * 8


def change_ept(machine: Machine, gpa: int, value: int) -> None:
    machine.physical.write_u64(ept_entry(machine, gpa), value)
    machine.mmu.invept(Invept.SINGLE, machine.cpu.controls.ept_pointer)


def test_a_walk_in_two_dimensions_is_24_references(machine: Machine) -> None:
    machine.cpu.access(ADDRESS)
    traces: list[WalkTrace] = []
    machine.mmu.on_walk = traces.append
    machine.mmu.invept(Invept.ALL)
    translate(machine)
    (trace,) = traces
    assert trace.references == machine.mmu.statistics.longest == 24
    assert [step.address for step in trace.page.steps] == [0x1000, 0x2000, 0x3000, 0x4028]
    assert trace.ept is not None
    assert len(trace.ept.steps) == 4
    translate(machine)
    assert len(traces) == 1, "the second is a TLB hit"
    assert machine.mmu.tlb.statistics.hits >= 1


def test_a_walk_in_one_dimension_is_4_references() -> None:
    with Machine("shadow") as machine:
        for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9007)):
            machine.memory.write_u64(at, entry)
        machine.cpu.load(LONG)
        assert machine.cpu.access(ADDRESS).gpa == 0x9678
        assert machine.mmu.statistics.longest == 4
        assert machine.mmu.statistics.walks_2d == 0


def test_large_ept_pages_make_walks_shorter() -> None:
    with Machine("ept") as machine:
        for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9007)):
            machine.memory.write_u64(at, entry)
        machine.cpu.load(LONG)
        machine.cpu.access(ADDRESS)
        assert machine.mmu.statistics.longest == 4 * (3 + 1) + 3
        assert machine.cpu.exits == 1


def test_violations_say_what_and_where(machine: Machine) -> None:
    fault = violation(machine)
    assert (fault.reason, fault.physical, fault.linear) == (Reason.EPT_VIOLATION, 0x1000, ADDRESS)
    assert fault.qualification == 1 | LINEAR_VALID, "a read, of a guest table"
    machine.cpu.access(ADDRESS)
    change_ept(machine, 0x9000, 0)
    for access, bit in ((READ, 1), (WRITE, 2), (FETCH, 4)):
        fault = violation(machine, access)
        assert fault.physical == 0x9678
        assert fault.qualification == bit | LINEAR_VALID | FINAL
    leaf = machine.map.hpa(0x9000) or 0
    change_ept(machine, 0x9000, leaf | 1 | 6 << 3)
    assert translate(machine).readable
    assert violation(machine, WRITE).qualification == 2 | 1 << 3 | LINEAR_VALID | FINAL
    assert violation(machine, FETCH).qualification == 4 | 1 << 3 | LINEAR_VALID | FINAL


def test_accessed_bits_in_a_table_that_the_ept_lets_read_only(machine: Machine) -> None:
    """The walker's own write violates, and nothing else was changed."""
    machine.cpu.access(ADDRESS)
    machine.memory.write_u64(0x4028, 0x9007)
    change_ept(machine, 0x4000, (machine.map.hpa(0x4000) or 0) | 5 | 6 << 3)
    fault = violation(machine)
    assert fault.physical == 0x4028
    assert fault.qualification == 2 | 5 << 3 | LINEAR_VALID


MISCONFIGURED = [
    2,  # W without R
    4,  # X alone: this processor has no execute-only pages
    6,
    7 | 2 << 3,  # memory types that do not exist
    7 | 3 << 3,
    7 | 7 << 3,
    7 | 6 << 3 | 1 << 40,
    7 | 6 << 3 | 1 << 51,
]


@pytest.mark.parametrize("bits", MISCONFIGURED)
def test_misconfiguration(machine: Machine, bits: int) -> None:
    machine.cpu.access(ADDRESS)
    change_ept(machine, 0x9000, 0x1_0000_9000 | bits)
    fault = violation(machine)
    assert (fault.reason, fault.physical) == (Reason.EPT_MISCONFIGURATION, 0x9678)


@pytest.mark.parametrize("level", [4, 3, 2])
@pytest.mark.parametrize("bits", [1 << 3, 1 << 6, 1 << 45, 1 << 7 | 1 << 12])
def test_misconfigured_tables(machine: Machine, level: int, bits: int) -> None:
    machine.cpu.access(ADDRESS)
    table = machine.cpu.controls.ept_pointer & ~0xFFF
    for shift in SHIFTS[: 4 - level]:
        table = machine.physical.read_u64(table + (0x9000 >> shift & 511) * 8) & ~0xFFF
    entry = table + (0x9000 >> SHIFTS[4 - level] & 511) * 8
    value = machine.physical.read_u64(entry)
    machine.physical.write_u64(entry, value | bits)
    machine.mmu.invept(Invept.ALL)
    assert violation(machine).reason == Reason.EPT_MISCONFIGURATION
    machine.physical.write_u64(entry, value)
    assert machine.cpu.access(ADDRESS).is_memory


def test_dirty_bits_of_the_ept() -> None:
    """The guest's own are set already."""
    with Machine("ept", large_pages=False, accessed_dirty=True) as machine:
        for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9067)):
            machine.memory.write_u64(at, entry)
        machine.cpu.load(LONG)
        assert violation(machine).qualification == 3 | LINEAR_VALID, "as a write: SDM §28.2.3.2"
        machine.cpu.access(ADDRESS)
        assert machine.physical.read_u64(ept_entry(machine, 0x9000)) >> 8 & 3 == 1
        assert machine.physical.read_u64(ept_entry(machine, 0x4000)) >> 8 & 3 == 3, "a table"
        assert not translate(machine).writable
        machine.cpu.access(ADDRESS, WRITE)
        assert machine.physical.read_u64(ept_entry(machine, 0x9000)) >> 8 & 3 == 3
        assert translate(machine).writable


def test_not_writable_until_it_is_dirty(machine: Machine) -> None:
    machine.cpu.access(ADDRESS)
    assert not translate(machine).writable
    assert translate(machine, WRITE).writable
    assert translate(machine).writable
    assert machine.memory.read_u64(0x4028) == 0x9067


def test_a_users_page_under_smap_may_be_fetched_and_not_read(machine: Machine) -> None:
    machine.cpu.load(Registers(LONG.cr0, LONG.cr3, LONG.cr4 | CR4_SMAP, LONG.efer))
    machine.cpu.access(ADDRESS, user=True)
    page = translate(machine, FETCH)
    assert (page.executable, page.readable, page.writable) == (True, False, False)


def test_a_stale_entry_serves_until_it_is_flushed_and_never_refuses(machine: Machine) -> None:
    machine.cpu.access(ADDRESS, WRITE)
    machine.memory.write_u64(0x4028, 0)
    assert translate(machine).frame == machine.map.hpa(0x9000)
    machine.mmu.invalidate(machine.cpu.controls, ADDRESS)
    with pytest.raises(PageFault):
        translate(machine)
    machine.memory.write_u64(0x4028, 0x9065)
    translate(machine)
    machine.memory.write_u64(0x4028, 0x9067)  # more rights need no flush
    assert translate(machine, WRITE).writable


def test_a_walk_that_faults_drops_what_the_tlb_had(machine: Machine) -> None:
    machine.memory.write_u64(0x4028, 0x9005)
    machine.cpu.access(ADDRESS)
    machine.memory.write_u64(0x4028, 0)
    assert translate(machine).readable, "stale, as it may be"
    with pytest.raises(PageFault):
        translate(machine, WRITE)
    with pytest.raises(PageFault):
        translate(machine)


def test_tags_keep_address_spaces_apart(machine: Machine) -> None:
    cpu = machine.cpu
    machine.cpu.access(ADDRESS)
    before = machine.mmu.statistics.walks
    cpu.controls.vpid = 9
    translate(machine)
    assert machine.mmu.statistics.walks == before + 1, "another VPID has entries of its own"
    machine.mmu.invvpid(Invvpid.SINGLE, 9)
    cpu.controls.vpid = 1
    translate(machine)
    assert machine.mmu.statistics.walks == before + 1


def test_global_pages_stay_when_cr3_is_loaded(machine: Machine) -> None:
    machine.memory.write_u64(0x4028, 0x9107)
    machine.cpu.access(ADDRESS)
    before = machine.mmu.statistics.walks
    machine.mmu.flush(machine.cpu.controls, keep_global=True)
    translate(machine)
    assert machine.mmu.statistics.walks == before
    machine.mmu.flush(machine.cpu.controls, keep_global=False)
    translate(machine)
    assert machine.mmu.statistics.walks == before + 1


def test_without_pge_no_page_is_global(machine: Machine) -> None:
    machine.cpu.load(Registers(LONG.cr0, LONG.cr3, CR4_PAE, LONG.efer))
    machine.memory.write_u64(0x4028, 0x9107)
    machine.cpu.access(ADDRESS)
    before = machine.mmu.statistics.walks
    machine.mmu.flush(machine.cpu.controls, keep_global=True)
    translate(machine)
    assert machine.mmu.statistics.walks == before + 1


def test_in_one_dimension_too_a_page_is_not_writable_until_it_is_dirty() -> None:
    with Machine("shadow") as machine:
        for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9067)):
            machine.memory.write_u64(at, entry)
        machine.cpu.load(LONG)
        machine.cpu.access(ADDRESS)
        assert not translate(machine).writable
        assert translate(machine, WRITE).writable
        assert translate(machine).writable


def test_paging_off_under_ept_is_the_identity(machine: Machine) -> None:
    machine.cpu.load(Registers(CR0_PE, 0, 0, 0))
    assert machine.cpu.access(0x9678, WRITE).gpa == 0x9678
    assert machine.cpu.access(ROM + 4).is_memory
    assert not machine.cpu.access(ROM + 4, WRITE).is_memory
