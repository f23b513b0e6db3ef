"""The walker, case by case from the manual (SDM vol. 3A ch. 4)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostel.soft.paging.virtualizer import Registers
from hostel.soft.paging.walk import Asked, Walk, asked, look_up, mark, walk
from hostel.soft.silicon import Access, PageFault
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    RFLAGS_AC,
    CpuState,
)
from soft.paging.rig import Machine

READ, WRITE, FETCH = Access.READ, Access.WRITE, Access.FETCH
ON = CR0_PE | CR0_PG | CR0_WP
LONG = Registers(ON, 0x1000, CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE)
PAE = Registers(ON, 0x1000, CR4_PAE, EFER_NXE)
PSE = Registers(ON, 0x1000, CR4_PSE, 0)
OLD = Registers(ON, 0x1000, 0, 0)
NX = 1 << 63
ADDRESS = 0x0000_0080_4060_5678
"""Index 1 at level 4 and 3, 3 at level 2, 5 at level 1."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine("reference") as machine:
        yield machine


def put_long(machine: Machine, l4: int, l3: int = 0, l2: int = 0, l1: int = 0) -> None:
    """Entries for ADDRESS in pages 1 to 4."""
    for at, entry in ((0x1008, l4), (0x2008, l3), (0x3018, l2), (0x4028, l1)):
        machine.memory.write_u64(at, entry)


def found(machine: Machine, registers: Registers, address: int = ADDRESS) -> Walk:
    page = look_up(machine.map, registers, address)
    assert isinstance(page, Walk), page
    return page


def fault(machine: Machine, registers: Registers, asked: Asked, address: int = ADDRESS) -> int:
    with pytest.raises(PageFault) as caught:
        walk(machine.map, registers, address, asked)
    assert caught.value.address == address
    return caught.value.code


def test_four_levels_step_by_step(machine: Machine) -> None:
    put_long(machine, 0x2007, 0x3007, 0x4007, 0x9007)
    page = found(machine, LONG)
    assert (page.address, page.size) == (0x9678, 4096)
    assert [tuple(step) for step in page.steps] == [
        (4, 0x1008, 0x2007),
        (3, 0x2008, 0x3007),
        (2, 0x3018, 0x4007),
        (1, 0x4028, 0x9007),
    ]


@pytest.mark.parametrize(
    ("entries", "size", "address"),
    [
        ((0x2007, 0x8000_0087), 1 << 30, 0x8060_5678),
        ((0x2007, 0x3007, 0x0040_0087), 1 << 21, 0x0040_5678),
        ((0x2007, 0x3007, 0x0040_1087), 1 << 21, 0x0040_5678),  # bit 12 is PAT, not address
    ],
)
def test_large_pages(machine: Machine, entries: tuple[int, ...], size: int, address: int) -> None:
    put_long(machine, *entries)
    page = found(machine, LONG)
    assert (page.size, page.address, len(page.steps)) == (size, address, len(entries))


def test_pae_has_plain_pointers_at_the_top(machine: Machine) -> None:
    machine.memory.write_u64(0x1008, 0x2001)  # no rights here, and bits 1, 2 are reserved
    machine.memory.write_u64(0x2018, 0x4007)
    machine.memory.write_u64(0x4028, 0x9007)
    page = found(machine, PAE, ADDRESS & 0xFFFF_FFFF)
    assert (page.address, page.writable, page.user) == (0x9678, True, True)
    machine.memory.write_u64(0x1008, 0x2003)
    assert fault(machine, PAE, Asked(READ, False), ADDRESS & 0xFFFF_FFFF) == 9


def test_32_bit_and_what_pse_changes(machine: Machine) -> None:
    linear = 0x0040_5678
    machine.memory.write_u32(0x1004, 0x0080_2087)
    assert found(machine, PSE, linear).address == 0x01_0080_5678  # PSE-36: bit 13 is bit 32
    assert found(machine, PSE, linear).size == 1 << 22
    machine.memory.write_u32(0x1004, 0x2087)
    machine.memory.write_u32(0x2014, 0x9007)
    assert found(machine, OLD, linear).address == 0x9678  # bit 7 means nothing


RESERVED = [
    (LONG, 0x2087, 0x3007, 0x4007, 0x9007),  # bit 7 of a PML4E
    (LONG, 0x2007 | 1 << 40, 0x3007, 0x4007, 0x9007),
    (LONG, 0x2007, 0x3007 | 1 << 51, 0x4007, 0x9007),
    (LONG, 0x2007, 0x2087, 0x4007, 0x9007),  # a 1 GiB page at 0x2000
    (LONG, 0x2007, 0x3007, 0x10_0087, 0x9007),  # a 2 MiB page at 1 MiB
    (LONG, 0x2007, 0x3007, 0x4007, 0x9007 | 1 << 45),
    (Registers(ON, 0x1000, CR4_PAE, EFER_LME | EFER_LMA), 0x2007, 0x3007, 0x4007, 0x9007 | NX),
    (Registers(ON, 0x1000, CR4_PAE, EFER_LME | EFER_LMA), 0x2007 | NX, 0x3007, 0x4007, 0x9007),
]


@pytest.mark.parametrize("case", RESERVED)
def test_reserved_bits(machine: Machine, case: tuple[Registers, int, int, int, int]) -> None:
    registers, *entries = case
    put_long(machine, *entries)
    assert fault(machine, registers, Asked(READ, False)) == 0b1001
    assert fault(machine, registers, Asked(WRITE, True)) == 0b1111


def test_reserved_bits_of_pae_and_pse(machine: Machine) -> None:
    machine.memory.write_u32(0x1004, 0x20_0087)  # bit 21 of a 4 MiB page
    assert fault(machine, PSE, Asked(READ, False), 0x40_0000) == 9
    for entry in (0x9007 | 1 << 62, 0x9007 | 1 << 52, 0x9007 | 1 << 40):
        machine.memory.write_u64(0x1000, 0x2001)
        machine.memory.write_u64(0x2000, 0x3007)
        machine.memory.write_u64(0x3000, entry)
        assert fault(machine, PAE, Asked(READ, True), 0) == 13


def changed(registers: Registers, cr0: int = 0, cr4: int = 0) -> Registers:
    """With these bits flipped."""
    return Registers(registers.cr0 ^ cr0, registers.cr3, registers.cr4 ^ cr4, registers.efer)


RO_USER, RW_SUPERVISOR, RO_SUPERVISOR, NX_USER = 0x9005, 0x9003, 0x9001, 0x9007 | NX
RIGHTS = [
    # entry, registers, access, user, override → error code, or None
    (RO_USER, LONG, Asked(READ, True), None),
    (RO_USER, LONG, Asked(WRITE, True), 7),
    (RO_USER, LONG, Asked(WRITE, False), 3),
    (RO_USER, changed(LONG, CR0_WP), Asked(WRITE, False), None),
    (RO_USER, changed(LONG, CR0_WP), Asked(WRITE, True), 7),
    (RO_SUPERVISOR, changed(LONG, CR0_WP), Asked(WRITE, False), None),
    (RW_SUPERVISOR, LONG, Asked(WRITE, False), None),
    (RW_SUPERVISOR, LONG, Asked(READ, True), 5),
    (RW_SUPERVISOR, LONG, Asked(FETCH, True), 0x15),
    (NX_USER, LONG, Asked(FETCH, True), 0x15),
    (NX_USER, LONG, Asked(FETCH, False), 0x11),
    (NX_USER, LONG, Asked(READ, False), None),
    (RO_USER, LONG, Asked(FETCH, False), None),
    (RO_USER, changed(LONG, cr4=CR4_SMEP), Asked(FETCH, False), 0x11),
    (RO_USER, changed(LONG, cr4=CR4_SMEP), Asked(FETCH, True), None),
    (RO_USER, changed(LONG, cr4=CR4_SMEP), Asked(READ, False), None),
    (RO_USER, changed(LONG, cr4=CR4_SMAP), Asked(READ, False), 1),
    (RO_USER, changed(LONG, cr4=CR4_SMAP), Asked(READ, False, True), None),
    (RO_USER, changed(LONG, cr4=CR4_SMAP), Asked(FETCH, False), None),
    (RO_USER, changed(LONG, cr4=CR4_SMAP), Asked(WRITE, False, True), 3),
    (RO_USER, changed(LONG, CR0_WP, CR4_SMAP), Asked(WRITE, False, True), None),
    (RO_USER, changed(LONG, CR0_WP, CR4_SMAP), Asked(WRITE, False), 3),
]


@pytest.mark.parametrize(("entry", "registers", "ask", "code"), RIGHTS)
def test_rights(
    machine: Machine, entry: int, registers: Registers, ask: Asked, code: int | None
) -> None:
    put_long(machine, 0x2007, 0x3007, 0x4007, entry)
    if code is None:
        assert walk(machine.map, registers, ADDRESS, ask).address == 0x9678
    else:
        assert fault(machine, registers, ask) == code


def test_rights_are_those_of_all_levels(machine: Machine) -> None:
    for at in range(4):
        entries = [0x2007, 0x3007, 0x4007, 0x9007]
        entries[at] &= ~2
        put_long(machine, *entries)
        assert not found(machine, LONG).writable
        entries[at] = entries[at] & ~4 | NX
        put_long(machine, *entries)
        assert not found(machine, LONG).user
        assert not found(machine, LONG).executable


def test_a_fetch_shows_in_the_error_code_only_where_it_can_be_forbidden(machine: Machine) -> None:
    plain = Registers(ON, 0x1000, CR4_PAE, EFER_LME | EFER_LMA)
    assert fault(machine, plain, Asked(FETCH, False)) == 0
    assert fault(machine, changed(plain, cr4=CR4_SMEP), Asked(FETCH, False)) == 0x10
    assert fault(machine, LONG, Asked(FETCH, True)) == 0x14
    assert fault(machine, changed(OLD, cr4=CR4_SMEP), Asked(FETCH, True), 0) == 0x14


def test_smap_is_passed_by_ac_unless_the_access_is_implicit() -> None:
    state = CpuState(rflags=RFLAGS_AC, cr0=CR0_PE)
    assert asked(state, READ, False).override
    assert not asked(state, READ, True).override
    state.ss.rights |= 3 << 5
    assert not asked(state, READ, False).override  # CPL 3: the processor's own, to a GDT
    assert not asked(CpuState(cr0=CR0_PE), READ, False).override


def test_accessed_and_dirty(machine: Machine) -> None:
    put_long(machine, 0x2007, 0x3007, 0x4007, 0x9005)
    mark(machine.map, walk(machine.map, LONG, ADDRESS, Asked(READ, False)), READ)
    entries = [machine.memory.read_u64(at) for at in (0x1008, 0x2008, 0x3018, 0x4028)]
    assert entries == [0x2027, 0x3027, 0x4027, 0x9025]
    fault(machine, LONG, Asked(WRITE, False))
    assert machine.memory.read_u64(0x4028) == 0x9025, "a write that faults leaves no dirty bit"
    writable = changed(LONG, CR0_WP)
    mark(machine.map, walk(machine.map, writable, ADDRESS, Asked(WRITE, False)), WRITE)
    assert machine.memory.read_u64(0x4028) == 0x9065
    assert machine.memory.read_u64(0x3018) == 0x4027, "only a page is dirty"


def test_a_walk_that_faults_leaves_no_mark(machine: Machine) -> None:
    put_long(machine, 0x2007, 0x3007, 0x4007, 0)
    before = machine.memory.read(0, 0x5000)
    fault(machine, LONG, Asked(READ, False))
    assert machine.memory.read(0, 0x5000) == before


def test_tables_that_lead_nowhere_or_to_themselves(machine: Machine) -> None:
    put_long(machine, 0x7F_FFFF_F007)
    assert fault(machine, LONG, Asked(READ, False)) == 9, "no memory there: all ones"
    machine.memory.write_u64(0x1FF8, 0x1067)
    page = found(machine, LONG, 0xFFFF_FFFF_FFFF_FFF8)
    assert page.address == 0x1FF8
    assert [step.address for step in page.steps] == [0x1FF8] * 4
    assert (
        fault(machine, Registers(ON, 0xFF_FFFF_F000, CR4_PAE, LONG.efer), Asked(READ, True)) == 13
    )


def test_paging_off_is_the_identity(machine: Machine) -> None:
    page = found(machine, Registers(CR0_PE, 0x1000, 0, 0), 0x1234)
    assert (page.address, page.steps) == (0x1234, ())
