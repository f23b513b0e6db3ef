"""Shadow, EPT and the plain walker agree: on where an access goes, on faults and their error codes, and on
accessed and dirty bits — on tables that nobody in his senses would build.

A story is made from one number. Its tables are made of few pages, so that they loop, map themselves, are
shared between levels and processes, and lie in the way of the data. The guest changes them through those
same mappings, reads and writes, loads other tables, other modes, other protections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostel.soft.paging.virtualizer import Registers
from hostel.soft.paging.walk import NO_EXECUTE
from hostel.soft.silicon import Access
from hostel.soft.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    RFLAGS_AC,
    RFLAGS_ONE,
)
from soft.paging.rig import RAM, ROM, Cpu, Machine, Outcome

TABLES = range(1, 7)
"""These pages of guest memory are full of table entries; any other may be data."""
ROOTS = (1, 6)
LAYOUTS: dict[str, dict[int, tuple[int, ...]]] = {
    "4-level": {1: (2,), 6: (2,), 2: (3,), 3: (4, 5)},
    "PAE": {1: (3,), 6: (3,), 3: (4, 5)},
    "32-bit": {1: (4, 5), 6: (4, 5)},
    "32-bit, PSE": {1: (4, 5), 6: (4, 5)},
}
"""Of a sane story: which pages the entries of a page lead to. The others hold PTEs."""
LAST_BUT_ONE = {"4-level": 3, "PAE": 3, "32-bit, PSE": 1}
FLIPS = (1, 2, 4, 0x20, 0x40, 0x60, 0x100, NO_EXECUTE)
OTHERS = (0, 7, 8, 9, 511, 512, 513, RAM // 4096 - 1, RAM // 4096, ROM >> 12, 0x9999)
INDICES = (0, 1, 2, 511)
STRANGE = (1 << 63, 1 << 63, 1 << 63, 1 << 40, 1 << 51, 0x2000, 1 << 62, 1 << 21)
"""Bits above and within an address: NX, reserved, ignored."""
STEPS = 50
MODES = {
    "off": (0, 0, 0),
    "32-bit": (CR0_PG, 0, 0),
    "32-bit, PSE": (CR0_PG, CR4_PSE, 0),
    "PAE": (CR0_PG, CR4_PAE, 0),
    "4-level": (CR0_PG, CR4_PAE, EFER_LME),
}


class Author:
    """Makes up tables and what the guest does, for one paging mode or for a guest that changes it."""

    def __init__(self, seed: int, modes: tuple[str, ...]) -> None:
        self.random = Random(seed)
        self.modes = modes
        self.sane = self.chance(0.8)
        self.known = [0]
        """Addresses that led somewhere: worth another visit."""

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def entry(self) -> int:
        page = self.random.choice(TABLES if self.chance(0.7) else OTHERS)
        value = page << 12 | self.chance(0.97)
        for bit, probability in (
            (2, 0.8),
            (4, 0.8),
            (0x20, 0.5),
            (0x40, 0.4),
            (0x80, 0.15),
            (0x100, 0.3),
        ):
            value |= bit * self.chance(probability)
        if value & 0x80 and self.chance(0.8):
            value &= ~0x1FF000  # a large page that is well-formed
        return value | (self.random.choice(STRANGE) if self.chance(0.04) else 0)

    def content(self, page: int) -> int:
        """8 bytes of a table: one entry, or two of 32 bits."""
        if self.modes[0].startswith("32") or (len(self.modes) > 1 and self.chance(0.3)):
            return self.likely(page) & 0xFFFF_FFFF | (self.likely(page) & 0xFFFF_FFFF) << 32
        return self.likely(page)

    def likely(self, page: int) -> int:
        """In a sane story, mostly what belongs into this page, so that walks come to an end."""
        below = LAYOUTS.get(self.modes[0], {}).get(page)
        if below is None or not self.sane or self.chance(0.05):
            return self.entry()
        if page == LAST_BUT_ONE.get(self.modes[0]) and self.chance(0.15):
            return self.random.choice((0xE7, 0x87, 0x1E7))  # large, and it covers the tables
        value = self.random.choice(below) << 12
        if self.modes[0] == "PAE" and page in ROOTS:
            return value | 1
        return value | self.random.choice((0x27, 0x67, 7, 7, 7, 7, 7, 3, 5))

    def registers(self) -> Registers:
        paging, cr4, efer = MODES[self.random.choice(self.modes)]
        for bit, probability in ((CR4_SMEP, 0.3), (CR4_SMAP, 0.3), (CR4_PGE, 0.5)):
            cr4 |= bit * self.chance(probability)
        efer |= EFER_NXE * self.chance(0.7)
        return Registers(CR0_PE | paging | CR0_WP * self.chance(0.5), self.root(), cr4, efer)

    def root(self) -> int:
        choices = ROOTS if self.sane else TABLES
        return self.random.choice(choices if self.chance(0.97) else OTHERS) << 12

    def address(self, now: Registers) -> int:
        if self.chance(0.4):
            return canonical(self.random.choice(self.known), now)
        address = self.random.choice((0, 8, 0xFF8))
        for shift in (12, 21, 30, 39):
            address |= self.random.choice(INDICES) << shift
        return canonical(address, now)


def canonical(address: int, now: Registers) -> int:
    if not now.efer & EFER_LMA:
        return address & 0xFFFF_FFFF
    return address | 0xFFFF << 48 if address >> 47 & 1 else address


EVERYWHERE = [a << 39 | b << 30 | c << 21 | d << 12 for a, b, c, d in product(INDICES, repeat=4)]
"""All pages that ``Author.address`` can come up with."""


def set_ring(machine: Machine, user: bool, override: bool) -> None:
    machine.cpu.state.ss.rights = 0x93 | 3 << 5 if user else 0x93
    machine.cpu.state.rflags = RFLAGS_ONE | (RFLAGS_AC if override else 0)


def same(ways: list[Machine], act: Callable[[Machine], Outcome], what: str) -> Outcome:
    """Every way does it; they agree, and on all of memory that holds tables afterwards."""
    outcomes = [act(machine) for machine in ways]
    memories = [machine.memory.read(0, (TABLES[-1] + 1) << 12) for machine in ways]
    for machine, outcome, memory in zip(ways[1:], outcomes[1:], memories[1:], strict=True):
        assert outcome == outcomes[0], f"{machine.way}: {what}"
        assert memory == memories[0], f"{machine.way}: accessed and dirty bits: {what}"
    return outcomes[0]


def flush_marked(ways: list[Machine]) -> None:
    """Where an entry is a PAE guest's PDPTE as well, an accessed bit makes it malformed: no TLB sees that."""
    guest = ways[0].cpu.guest
    if guest.cr4 & CR4_PAE and not guest.efer & EFER_LMA:
        for cpu in (cpu for machine in ways for cpu in machine.cpus):
            cpu.load_and_flush(cpu.guest)


def access(author: Author, ways: list[Machine]) -> str:
    address = author.address(ways[0].cpu.guest)
    kind, user = Access(author.random.randrange(3)), author.chance(0.5)
    implicit = not user and kind is not Access.FETCH and author.chance(0.2)
    override = author.chance(0.5)
    for machine in ways:
        set_ring(machine, user or implicit, override)
    what = f"{kind.name} {address:#x} user={user} implicit={implicit} AC={override}"
    outcome = same(ways, lambda machine: machine.cpu.access(address, kind, user), what)
    flush_marked(ways)
    if outcome.is_memory:
        author.known.append(address)
    if outcome.fault is not None:
        return f"fault {outcome.fault:#x}"
    return "memory" if outcome.is_memory else "no memory"


def write_table(author: Author, ways: list[Machine]) -> str:
    """The guest stores to a table, where an address leads to one; then it flushes."""
    address = author.address(ways[0].cpu.guest) & ~7
    for machine in ways:
        set_ring(machine, False, True)
    outcome = same(
        ways,
        lambda machine: machine.cpu.access(address, Access.WRITE, False),
        f"store {address:#x}",
    )
    if not outcome.is_memory or outcome.gpa >> 12 not in TABLES:
        flush_marked(ways)
        return "store elsewhere"
    value = author.content(outcome.gpa >> 12)
    if author.chance(0.5):  # what kernels do: take a right, or forget that a page was used
        value = ways[0].memory.read_u64(outcome.gpa) ^ author.random.choice(FLIPS)
    by_invlpg = author.chance(0.5)
    for machine in ways:
        machine.cpu.store(outcome, value)
        for cpu in machine.cpus:  # a guest does it by IPIs
            flush(cpu, by_invlpg)
    return "table written"


def flush(cpu: Cpu, by_invlpg: bool) -> None:
    """All that the stories ever touch: at once, or one by one."""
    if by_invlpg:
        for address in EVERYWHERE:
            cpu.invlpg(canonical(address, cpu.guest))
    else:
        cpu.load_and_flush(cpu.guest)


def load(author: Author, ways: list[Machine]) -> str:
    """Another CR3, other protections over the same tables, or all new."""
    now, wanted = ways[0].cpu.guest, author.registers()
    kind = author.random.random()
    if kind < 0.5:
        wanted = Registers(now.cr0, wanted.cr3, now.cr4, now.efer)
    elif kind < 0.9 and now.cr0 & CR0_PG and wanted.cr0 & CR0_PG:
        wanted = Registers(wanted.cr0, now.cr3, wanted.cr4, wanted.efer)
    for machine in ways:
        machine.cpu.load_and_flush(wanted)
    return "loads"


def tell(author: Author, ways: list[Machine], steps: int) -> Counter[str]:
    for page in TABLES:
        for index in INDICES:
            content = author.content(page)
            for machine in ways:
                machine.memory.write_u64(page << 12 | index * 8, content)
    start = author.registers()
    for machine in ways:
        for cpu in machine.cpus:
            cpu.load_and_flush(start)
    told: Counter[str] = Counter()
    for _ in range(steps):
        running = author.random.randrange(len(ways[0].cpus))
        for machine in ways:
            machine.running = running
        act = author.random.choices((access, write_table, load), (70, 20, 10))[0]
        told[act(author, ways)] += 1
    return told


def agree(seed: int, modes: tuple[str, ...], cpus: int = 1, **options: int) -> Counter[str]:
    with ExitStack() as stack:
        machines = [Machine(way, cpus=cpus, **options) for way in ("reference", "ept", "shadow")]
        ways = [stack.enter_context(machine) for machine in machines]
        return tell(Author(seed, modes), ways, STEPS)


QUICK = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 1 << 32)


@pytest.mark.parametrize("mode", MODES)
@QUICK
@given(seed=SEEDS)
def test_all_ways_agree(mode: str, seed: int) -> None:
    told = agree(seed, (mode,))
    assert sum(told.values()) == STEPS


@QUICK
@given(seed=SEEDS)
def test_all_ways_agree_while_modes_change(seed: int) -> None:
    assert sum(agree(seed, tuple(MODES)).values()) == STEPS


@QUICK
@given(seed=SEEDS)
def test_all_ways_agree_with_several_vcpus(seed: int) -> None:
    assert sum(agree(seed, ("4-level", "PAE"), cpus=3).values()) == STEPS


@QUICK
@given(seed=SEEDS)
def test_all_ways_agree_when_shadows_are_short_of_frames(seed: int) -> None:
    assert sum(agree(seed, ("4-level", "PAE"), quota=8).values()) == STEPS


@QUICK
@given(seed=SEEDS)
def test_all_ways_agree_with_ept_dirty_bits_and_small_pages(seed: int) -> None:
    told = agree(seed, ("4-level", "32-bit, PSE"), accessed_dirty=1, large_pages=0)
    assert sum(told.values()) == STEPS


def test_stories_are_not_dull() -> None:
    """What the stories above consist of: enough of everything."""
    told = sum((agree(seed, ("4-level",)) for seed in range(20)), Counter[str]())
    assert told["memory"] > 100
    assert told["table written"] > 10
    assert told["no memory"] > 10
    assert {f"fault {code:#x}" for code in (0, 2, 4, 5, 7, 9, 0x10, 0x11, 0x15)} <= set(told)


PROTECTIONS = [
    Registers(CR0_PE | CR0_PG | wp, 0x1000, CR4_PAE | smep | smap, EFER_LME | nxe)
    for wp, smep, smap, nxe in product((0, CR0_WP), (0, CR4_SMEP), (0, CR4_SMAP), (0, EFER_NXE))
]
"""Each of them over the same tables."""
ONE_BY_ONE = [n ^ n >> 1 for n in range(16)]
"""A Gray code: from each to the next one bit changes, and from the last to the first."""


def all_rights(machine: Machine) -> list[Outcome]:
    """Every access to pages of every kind."""
    outcomes = []
    for page, access, user, override in product(range(8), Access, (False, True), (False, True)):
        set_ring(machine, user, override)
        outcomes.append(machine.cpu.access(page << 12, access, user))
    return outcomes


def test_protections_that_change_over_the_same_tables() -> None:
    """A shadow made under one of them must not be taken under another."""
    with ExitStack() as stack:
        ways = [stack.enter_context(Machine(way)) for way in ("reference", "ept", "shadow")]
        for machine in ways:
            for at, content in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
                machine.memory.write_u64(at, content)
            for page, rights in enumerate(product((0, 2), (0, 4), (0, NO_EXECUTE))):
                machine.memory.write_u64(0x4000 + 8 * page, sum(rights) | (page + 16) << 12 | 0x61)
        for at in ONE_BY_ONE * 2:
            for machine in ways:
                machine.cpu.load(PROTECTIONS[at])
            reference, *others = [all_rights(machine) for machine in ways]
            for machine, outcomes in zip(ways[1:], others, strict=True):
                assert outcomes == reference, (machine.way, PROTECTIONS[at])
