"""Shadow paging apart from its sources: CR0.WP=0, other modes, large pages, limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.soft.paging.virtualizer import Do, Flush, Registers, Scope
from hostel.soft.paging.walk import NO_EXECUTE, PRESENT, USER, WRITABLE
from hostel.soft.silicon import Access
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LME,
    EFER_NXE,
)
from soft.paging.rig import RAM, Machine
from soft.paging.shadow_rig import (
    LONG,
    ON,
    entry,
    leaf,
    shadow_of,
    shadowed,
    statistics,
)

READ, WRITE, FETCH = Access.READ, Access.WRITE, Access.FETCH


@pytest.fixture
def machine() -> Iterator[Machine]:
    with shadowed() as machine:
        yield machine


# --- CR0.WP = 0 ---


def without_wp(cr4: int = 0) -> Registers:
    return Registers(CR0_PE | CR0_PG, 0x1000, CR4_PAE | cr4, EFER_LME | EFER_NXE)


def test_a_supervisor_borrows_a_users_page(machine: Machine) -> None:
    machine.memory.write_u64(entry(8), 0x8005)
    cpu = machine.cpu
    cpu.load(without_wp(CR4_SMEP))
    assert cpu.access(0x8000, READ, user=True).is_memory
    assert leaf(machine, 0x8000) & (WRITABLE | USER) == USER
    assert cpu.access(0x8000, WRITE).is_memory
    assert leaf(machine, 0x8000) & (WRITABLE | USER | NO_EXECUTE) == WRITABLE | NO_EXECUTE
    assert cpu.access(0x8000, FETCH).fault == 0x11, "SMEP: it only looks like a supervisor's"
    assert cpu.access(0x8000, WRITE, user=True).fault == 7
    assert cpu.access(0x8000, FETCH, user=True).is_memory
    assert leaf(machine, 0x8000) & (WRITABLE | USER | NO_EXECUTE) == USER


def test_under_smap_the_write_is_emulated_instead(machine: Machine) -> None:
    machine.memory.write_u64(entry(8), 0x8005)
    cpu = machine.cpu
    cpu.load(without_wp(CR4_SMAP))
    assert cpu.access(0x8000, WRITE).fault == 3
    cpu.state.rflags |= 1 << 18
    assert cpu.access(0x8000, WRITE).is_memory
    assert cpu.emulated
    cpu.state.rflags &= ~(1 << 18)
    assert cpu.access(0x8000).fault == 1
    cpu.load(Registers(ON, 0x1000, CR4_PAE | CR4_SMAP, EFER_LME | EFER_NXE))
    assert cpu.access(0x8000, user=True).is_memory


# --- Other modes, large pages, limits ---


def test_paging_off_is_a_map_of_large_pages() -> None:
    with Machine("shadow") as machine:
        assert machine.cpu.access(0x1234, WRITE).gpa == 0x1234
        assert machine.cpu.access(0x5678, FETCH).gpa == 0x5678
        assert statistics(machine).fills == 1
        assert machine.cpu.access(RAM, WRITE) == (RAM, False, None)


def test_large_pages_stay_large_where_no_table_lies_in_them(machine: Machine) -> None:
    machine.memory.write_u64(0x3008, 0x20_0087 | 0x60)
    machine.memory.write_u64(0x3010, 0x0000_0087 | 0x60)
    cpu = machine.cpu
    cpu.access(0x20_1000, WRITE)
    cpu.access(0x3F_F000, WRITE)
    assert statistics(machine).fills == 1
    cpu.access(0x40_8000, WRITE)
    cpu.access(0x40_9000, WRITE)
    assert statistics(machine).fills == 3, "the tables are in there: pieces of 4 KiB"
    machine.memory.write_u64(0x3018, 0x30_0007)  # and now one in the first
    machine.memory.write_u64(0x30_0000, 0x8067)
    cpu.access(0x60_0000)
    before = statistics(machine).table_writes
    assert cpu.access(0x30_0000, WRITE).gpa == 0x30_0000
    assert statistics(machine).table_writes == before + 1


def test_a_large_page_that_covers_its_own_tables(machine: Machine) -> None:
    """Also where nobody knew of them before this very walk."""
    machine.memory.write_u64(0xD000, 0xE007)
    machine.memory.write_u64(0xE000, 0xF007)
    machine.memory.write_u64(0xF000, 0x0087)
    cpu = machine.cpu
    cpu.load(Registers(ON, 0xD000, CR4_PAE, EFER_LME))
    assert cpu.access(0x1_2000, WRITE).is_memory
    before = statistics(machine).table_writes
    assert cpu.access(0xF000, WRITE).is_memory
    assert statistics(machine).table_writes == before + 1
    machine.memory.write_u64(0xF000, 0x20_0087)
    cpu.load(Registers(ON, 0xD000, CR4_PAE, EFER_LME))
    assert cpu.access(0x1_2000).gpa == 0x21_2000


def test_pages_are_large_again_once_the_tables_are_gone() -> None:
    with Machine("shadow") as machine:
        for at, content in (
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x20_00E7),
            (0x3008, 0x20_4007),
        ):
            machine.memory.write_u64(at, content)
        machine.memory.write_u64(0x20_4000, 0x8067)
        cpu = machine.cpu
        cpu.load(LONG)
        cpu.access(0x20_0000)
        cpu.access(0x1000, WRITE)
        assert len(shadow_of(machine).tables.tables) == 4
        before = statistics(machine).fills
        cpu.access(0x5000, WRITE)
        assert statistics(machine).fills == before + 1, "in pieces: the other table lies there"
        machine.memory.write_u64(0x3008, 0)
        assert cpu.paging is not None
        cpu.paging.wrote(0x3008, 8)
        cpu.invlpg(0x5000)
        machine.memory.write_u64(0x3000, 0x20_00E7 | 1 << 9)
        cpu.paging.wrote(0x3000, 8)
        before = statistics(machine).fills
        for page in (5, 6, 7):
            cpu.access(page << 12, WRITE)
        assert statistics(machine).fills == before + 1


def test_a_32_bit_guest_runs_on_pae_tables() -> None:
    with Machine("shadow") as machine:
        machine.memory.write_u32(0x1000, 0x2007)
        machine.memory.write_u32(0x2000 + 4 * 8, 0x9007)
        machine.memory.write_u32(0x2000 + 4 * 600, 0xA007)
        cpu = machine.cpu
        cpu.load(Registers(ON, 0x1000, 0, 0))
        assert cpu.state.cr4 & CR4_PAE
        assert cpu.access(0x8004, WRITE).gpa == 0x9004
        assert cpu.access(600 << 12).gpa == 0xA000, "the second half of a 4 MiB table"
        top = machine.physical.read_u64(cpu.state.cr3)
        assert top & 0xFFF == PRESENT, "PDPTEs have no rights"
        assert machine.memory.read_u32(0x2000 + 4 * 8) == 0x9067
        assert statistics(machine).frames == 1 + 4, "and the root of the time before paging"


def test_what_a_32_bit_guest_left_alone_stays() -> None:
    """Neighbours of an entry that changed: two of its entries are as long as one of the shadow's."""
    with Machine("shadow") as machine:
        machine.memory.write_u32(0x1000, 0x2067)
        for page in range(16):
            machine.memory.write_u32(0x2000 + 4 * page, page << 12 | 0x67)
        cpu = machine.cpu
        cpu.load(Registers(ON, 0x1000, 0, 0))
        for page in range(16):
            cpu.access(page << 12)
        cpu.access(0x2000, WRITE)
        machine.memory.write_u32(0x2000 + 4 * 9, 0xA067)
        cpu.load(Registers(ON, 0x1000, 0, 0))
        before = statistics(machine).page_faults
        assert [cpu.access(page << 12).gpa >> 12 for page in (8, 9, 10)] == [8, 10, 10]
        assert statistics(machine).page_faults == before + 1
        cpu.access(0x2000, WRITE)
        cpu.invlpg(0x8000)
        before = statistics(machine).page_faults
        cpu.access(0x8000)
        assert statistics(machine).page_faults == before


def test_bits_that_a_pae_pdpte_must_not_have() -> None:
    """Where other entries have their dirty bit, which may come without a change, this one is malformed."""
    with Machine("shadow") as machine:
        for at, content in ((0x1000, 0x2001), (0x2000, 0x3007), (0x3000, 0x8067), (0x3008, 0x1067)):
            machine.memory.write_u64(at, content)
        cpu = machine.cpu
        cpu.load(Registers(ON, 0x1000, CR4_PAE, 0))
        assert cpu.access(0).gpa == 0x8000
        cpu.access(0x1000, WRITE)
        machine.memory.write_u64(0x1000, 0x2041)
        cpu.load(Registers(ON, 0x1000, CR4_PAE, 0))
        assert cpu.access(0).fault == 9


def test_an_accessed_bit_that_makes_a_pdpte_malformed() -> None:
    """The PDPT is the page table as well: the processor sets a bit in it that a PDPTE must not have."""
    with Machine("shadow") as machine:
        machine.memory.write_u64(0x1000, 0x2001)
        machine.memory.write_u64(0x2000, 0x1007)
        cpu = machine.cpu
        cpu.load(Registers(ON, 0x1000, CR4_PAE, 0))
        assert cpu.access(0).gpa == 0x2000
        assert machine.memory.read_u64(0x1000) == 0x2021
        cpu.load(Registers(ON, 0x1000, CR4_PAE, 0))
        assert cpu.access(0).fault == 9


def test_frames_are_bounded_and_old_shadows_go_first() -> None:
    with Machine("shadow", quota=12) as machine:
        for root in range(1, 30):
            machine.memory.write_u64(root << 12, 0x6_4007)
        machine.memory.write_u64(0x6_4000, 0x6_5007)
        machine.memory.write_u64(0x6_5000, 0x6_6007)
        for page in range(512):
            machine.memory.write_u64(0x6_6000 + 8 * page, page << 12 | 0x67)
        for root in range(1, 30):
            machine.cpu.load(Registers(ON, root << 12, CR4_PAE, EFER_LME))
            assert machine.cpu.access(0x8000).gpa == 0x8000
            assert statistics(machine).frames <= 12
        assert statistics(machine).recycled > 20
        before = statistics(machine).page_faults
        machine.cpu.load(Registers(ON, 28 << 12, CR4_PAE, EFER_LME))
        machine.cpu.access(0x8000)
        assert statistics(machine).page_faults == before, "the last but one is still there"


def test_one_address_space_may_fill_the_quota_again_and_again() -> None:
    with Machine("shadow", quota=8) as machine:
        machine.memory.write_u64(0x1000, 0x2007)
        machine.memory.write_u64(0x2000, 0x3007)
        for index in range(64):
            machine.memory.write_u64(0x3000 + 8 * index, 0x4007)
        machine.memory.write_u64(0x4000, 0x9067)
        machine.cpu.load(LONG)
        for index in range(64):
            assert machine.cpu.access(index << 21, WRITE).gpa == 0x9000
            assert statistics(machine).frames <= 8


def test_a_page_that_is_written_and_never_walked_is_no_table_any_more(machine: Machine) -> None:
    cpu = machine.cpu
    machine.memory.write_u64(0x3008, 0xD007)
    machine.memory.write_u64(0xD000, 0x8067)
    cpu.access(0x20_0000)
    faults = []
    for _ in range(6):
        before = statistics(machine).page_faults
        cpu.access(0xD100, WRITE)
        faults.append(statistics(machine).page_faults - before)
        cpu.load(LONG)
    assert faults == [1, 1, 1, 1, 0, 0]
    assert 0xD not in shadow_of(machine).tables.tables


def test_a_table_that_is_written_and_walked_by_turns_stays_one(machine: Machine) -> None:
    cpu = machine.cpu
    machine.memory.write_u64(0x3008, 0xD007)
    for page in range(1, 12):
        machine.memory.write_u64(0xD000 + 8 * page, 0x8067)
    cpu.access(0x20_1000)
    for page in range(2, 12):
        cpu.access(0xD100, WRITE)
        cpu.access(0x20_0000 + (page << 12))
        cpu.load(LONG)
    before = statistics(machine).page_faults
    for page in range(1, 12):
        cpu.access(0x20_0000 + (page << 12))
    assert statistics(machine).page_faults == before, "nothing of it was thrown away"


def test_an_emulated_write_to_a_table_is_synced_at_once(machine: Machine) -> None:
    cpu = machine.cpu
    assert cpu.paging is not None
    cpu.access(0x8000)
    machine.memory.write_u64(entry(8), 0xA067)
    cpu.paging.wrote(entry(8) - 4, 8)
    assert cpu.access(0x8000).gpa == 0xA000


def test_a_slot_that_goes_is_forgotten_by_shadows_too(machine: Machine) -> None:
    cpu = machine.cpu
    assert cpu.paging is not None
    cpu.access(0x8000)
    machine.map.remove(0)
    assert cpu.paging.take_flush() == Flush(Scope.CONTEXT)
    machine.mmu.flush(cpu.controls, keep_global=False)
    verdict = cpu.paging.on_page_fault(cpu.state, 0x8000, 0)
    assert (verdict.do, verdict.code) == (Do.REFLECT, 9), "its tables are gone: all ones"
