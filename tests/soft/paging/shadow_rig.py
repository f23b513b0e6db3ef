"""A guest on shadow paging, with tables that tests know by heart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostel.soft.paging.shadow import ShadowPaging
from hostel.soft.paging.virtualizer import PagingStatistics, Registers
from hostel.soft.state import CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, EFER_LME
from soft.paging.rig import Machine

ON = CR0_PE | CR0_PG | CR0_WP
LONG = Registers(ON, 0x1000, CR4_PAE | CR4_PGE, EFER_LME)
OTHER = Registers(ON, 0x6000, CR4_PAE | CR4_PGE, EFER_LME)
TABLE = 0x4000
"""Maps the first 2 MiB; by itself one to one."""


@contextmanager
def shadowed() -> Iterator[Machine]:
    """A guest whose PML4s at 0x1000 and 0x6000 share all below; the first 32 pages are mapped 1:1."""
    with Machine("shadow", cpus=2) as machine:
        for at, entry in (
            (0x1000, 0x2007),
            (0x6000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, TABLE | 7),
        ):
            machine.memory.write_u64(at, entry)
        for page in range(32):
            machine.memory.write_u64(TABLE + 8 * page, page << 12 | 0x67)
        for cpu in machine.cpus:
            cpu.load(LONG)
        yield machine


def statistics(machine: Machine) -> PagingStatistics:
    assert machine.paging is not None
    return machine.paging.statistics


def shadow_of(machine: Machine) -> ShadowPaging:
    assert isinstance(machine.paging, ShadowPaging)
    return machine.paging


def leaf(machine: Machine, address: int) -> int:
    """The shadow's entry for an address, as the processor finds it."""
    table = machine.cpu.state.cr3
    for shift in (39, 30, 21, 12):
        value = machine.physical.read_u64(table + (address >> shift & 511) * 8)
        table = value & 0xFF_FFFF_F000
    return value


def entry(page: int) -> int:
    return TABLE + 8 * page
