"""Shadow paging: which events exit, what they cost, how it stays in step with the guest's tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.soft.paging.virtualizer import Flush, Registers, Scope
from hostel.soft.paging.walk import GLOBAL, WRITABLE
from hostel.soft.silicon import Access
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)
from soft.paging.rig import Machine
from soft.paging.shadow_rig import (
    LONG,
    ON,
    OTHER,
    TABLE,
    entry,
    leaf,
    shadowed,
    statistics,
)

READ, WRITE, FETCH = Access.READ, Access.WRITE, Access.FETCH


@pytest.fixture
def machine() -> Iterator[Machine]:
    with shadowed() as machine:
        yield machine


def test_the_registers_that_the_processor_gets() -> None:
    with Machine("shadow") as machine:
        cpu = machine.cpu
        assert cpu.state.cr0 == CR0_PE | CR0_PG | CR0_WP, (
            "real or protected mode: on an identity map"
        )
        assert cpu.state.cr4 == CR4_PAE
        assert cpu.state.efer == EFER_NXE
        cpu.load(Registers(ON, 0x1000, CR4_SMEP, EFER_LME))
        assert cpu.state.efer == EFER_NXE | EFER_LME | EFER_LMA
        cpu.load(Registers(CR0_PE, 0x1000, CR4_SMEP | CR4_SMAP, EFER_LME))
        assert (cpu.state.cr4, cpu.state.efer) == (CR4_PAE, EFER_NXE), "the map is all a user's"
        assert cpu.paging is not None
        assert cpu.paging.guest(cpu.state) == Registers(
            CR0_PE, 0x1000, CR4_SMEP | CR4_SMAP, EFER_LME
        )


def test_a_miss_exits_once_and_then_never_again(machine: Machine) -> None:
    assert machine.cpu.access(0x8123).gpa == 0x8123
    assert statistics(machine).page_faults == statistics(machine).fills == 1
    machine.cpu.access(0x8FFF)
    machine.cpu.access(0x8000, FETCH, user=True)
    assert statistics(machine).page_faults == 1
    assert statistics(machine).frames == 1 + 4, "one for each level; and one of before paging"


def test_a_dirty_bit_costs_a_second_exit(machine: Machine) -> None:
    machine.memory.write_u64(entry(8), 0x8007)
    machine.cpu.access(0x8000)
    assert machine.memory.read_u64(entry(8)) == 0x8027
    assert not leaf(machine, 0x8000) & WRITABLE
    machine.cpu.access(0x8000, WRITE)
    assert machine.memory.read_u64(entry(8)) == 0x8067
    assert statistics(machine).page_faults == 2
    machine.cpu.access(0x8000, WRITE)
    assert statistics(machine).page_faults == 2


def test_a_faults_own_code_is_reflected(machine: Machine) -> None:
    machine.memory.write_u64(entry(8), 0x8003)
    assert machine.cpu.access(0x8000, user=True).fault == 5
    assert machine.cpu.access(0x40_0000, WRITE).fault == 2
    assert statistics(machine).reflected == 2
    # The processor has NXE set, the guest has not: its error code has no bit for fetches.
    assert machine.cpu.access(0x40_0000, FETCH).fault == 0


def test_a_guest_table_is_write_protected_until_it_is_written(machine: Machine) -> None:
    cpu = machine.cpu
    cpu.access(TABLE)
    assert not leaf(machine, TABLE) & WRITABLE
    before = statistics(machine).page_faults
    assert cpu.access(TABLE, WRITE).is_memory
    assert statistics(machine).page_faults == before + 1
    assert statistics(machine).table_writes == 1
    assert leaf(machine, TABLE) & WRITABLE, "out of sync: written as often as it likes"
    cpu.access(TABLE + 8, WRITE)
    assert statistics(machine).table_writes == 1
    cpu.load(LONG)
    assert not leaf(machine, TABLE) & WRITABLE, "synced and protected again"


def test_out_of_sync_is_as_stale_as_a_tlb_and_no_longer(machine: Machine) -> None:
    cpu = machine.cpu
    cpu.access(0x8000)
    cpu.access(0x9000)
    for page in (8, 9):
        cpu.access(entry(page), WRITE)
        machine.memory.write_u64(entry(page), 0xA067)
    assert cpu.access(0x8000).gpa == 0x8000
    cpu.invlpg(0x8000)
    assert cpu.access(0x8000).gpa == 0xA000
    assert cpu.access(0x9000).gpa == 0x9000, "INVLPG of one address spares the others"
    cpu.load(LONG)
    assert cpu.access(0x9000).gpa == 0xA000


def test_more_rights_need_no_flush(machine: Machine) -> None:
    """A present entry that was not, or a right that was added, is found by the fault itself."""
    cpu = machine.cpu
    cpu.access(TABLE, WRITE)
    machine.memory.write_u64(entry(8), 0x8065)
    cpu.access(0x8000)
    machine.memory.write_u64(entry(8), 0x8067)
    assert cpu.access(0x8000, WRITE).is_memory
    machine.memory.write_u64(entry(40), 0x9067)
    assert cpu.access(0x2_8000).gpa == 0x9000


def test_invlpg_drops_what_upper_levels_said(machine: Machine) -> None:
    """It flushes all paging-structure caches, whatever its address (SDM vol. 3A §4.10.4.1)."""
    cpu = machine.cpu
    cpu.access(0x8000)
    cpu.access(0x3000, WRITE)
    machine.memory.write_u64(0x5000 + 8 * 8, 0xB067)
    machine.memory.write_u64(0x5000 + 8 * 9, 0xC067)
    machine.memory.write_u64(0x3000, 0x5007)
    assert cpu.access(0x8000).gpa == 0x8000
    cpu.invlpg(0x7000_0000)
    assert cpu.access(0x8000).gpa == 0xB000
    assert cpu.access(0x9000).gpa == 0xC000


def test_a_table_that_is_exchanged_and_put_back(machine: Machine) -> None:
    """What was filled in between came from the other one."""
    cpu = machine.cpu
    machine.memory.write_u64(0x5000 + 8 * 9, 0xC067)
    machine.memory.write_u64(0x5000 + 8 * 3, 0x3067)
    cpu.access(0x8000)
    cpu.access(0x3000, WRITE)
    machine.memory.write_u64(0x3000, 0x5007)
    assert cpu.access(0x9000).gpa == 0xC000
    assert cpu.access(0x3000, WRITE).gpa == 0x3000
    machine.memory.write_u64(0x3000, TABLE | 0x27)
    cpu.load(LONG)
    assert cpu.access(0x9000).gpa == 0x9000


def test_a_table_that_maps_itself_makes_progress(machine: Machine) -> None:
    machine.memory.write_u64(0x1FF8, 0x1007)
    recursive = 0xFFFF_FFFF_FFFF_F000
    for _ in range(8):
        assert machine.cpu.access(recursive, WRITE).gpa == 0x1000
        machine.cpu.load(LONG)
    table = 0xFFFF_FF80_0000_0000
    assert machine.cpu.access(table, WRITE).gpa == TABLE
    machine.memory.write_u64(TABLE, TABLE | 0x67)
    machine.cpu.load(LONG)
    assert machine.cpu.access(0, WRITE).gpa == TABLE, "and one that holds nothing but its own entry"


def test_a_table_written_by_another_vcpu_is_seen(machine: Machine) -> None:
    """The other holds a writable translation of a page that becomes a table: it must lose it."""
    first, second = machine.cpus
    assert second.access(0xD000, WRITE).is_memory
    machine.memory.write_u64(0xD000, 0xA067)
    machine.memory.write_u64(0x3008, 0xD007)
    assert first.access(0x20_0000).gpa == 0xA000
    exits = second.exits
    assert second.access(0xD000, WRITE).is_memory
    assert second.exits == exits + 1, "it is a table now"
    machine.memory.write_u64(0xD000, 0xB067)
    first.invlpg(0x20_0000)
    assert first.access(0x20_0000).gpa == 0xB000


def test_one_shadow_an_address_space(machine: Machine) -> None:
    cpu = machine.cpu
    first = cpu.state.cr3
    cpu.access(0x8000)
    cpu.load(OTHER)
    assert cpu.state.cr3 != first
    cpu.access(0x8000)
    assert statistics(machine).fills == 2, "each has to be filled"
    cpu.load(LONG)
    assert cpu.state.cr3 == first
    before = statistics(machine).page_faults
    cpu.access(0x8000)
    assert statistics(machine).page_faults == before, "and is kept"
    assert statistics(machine).shadows == 3, "the third is of the time before paging"


def test_global_pages_survive_a_cr3_load(machine: Machine) -> None:
    machine.memory.write_u64(entry(8), 0x8167)
    cpu = machine.cpu
    cpu.access(0x8000)
    assert leaf(machine, 0x8000) & GLOBAL
    cpu.load(OTHER)
    before = machine.mmu.statistics.walks, statistics(machine).page_faults
    cpu.access(0x8000)
    assert (machine.mmu.statistics.walks, statistics(machine).page_faults) == before
    cpu.access(entry(8), WRITE)
    machine.memory.write_u64(entry(8), 0)
    cpu.invlpg(0x8000)
    assert cpu.access(0x8000).fault == 0


def test_a_cr3_load_asks_for_the_flush_that_it_means(machine: Machine) -> None:
    paging = machine.cpu.paging
    assert paging is not None
    paging.take_flush()
    paging.load(OTHER)
    assert paging.take_flush() == Flush(Scope.RETAIN_GLOBALS)
    paging.load(Registers(ON, 0x6000, CR4_PAE, EFER_LME))
    assert paging.take_flush() == Flush(Scope.CONTEXT)
    assert paging.take_flush() is None


def test_flushes_name_addresses_as_the_guest_does(machine: Machine) -> None:
    """In the upper half they are canonical."""
    machine.memory.write_u64(0x1800, 0x2007)
    high = 0xFFFF_8000_0000_8000
    paging = machine.cpu.paging
    assert paging is not None
    machine.cpu.access(high)
    machine.memory.write_u64(entry(8), 0)
    paging.wrote(entry(8), 8)
    assert paging.take_flush() == Flush(Scope.ADDRESSES, (high,))


def test_many_addresses_are_flushed_as_one(machine: Machine) -> None:
    paging = machine.cpu.paging
    assert paging is not None
    for page in range(32):
        machine.cpu.access(page << 12)
    machine.memory.write(TABLE, bytes(4096))
    paging.wrote(TABLE, 4096)
    assert paging.take_flush() == Flush(Scope.CONTEXT)
