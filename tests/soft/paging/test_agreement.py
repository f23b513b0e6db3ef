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
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostel.soft.paging.virtualizer import Registers
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
from soft.paging.rig import RAM, ROM, Machine, Outcome

TABLES = range(1, 7)
"""These pages of guest memory are full of table entries; any other may be data."""
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
            (0x80, 0.1),
            (0x100, 0.3),
        ):
            value |= bit * self.chance(probability)
        if value & 0x80 and self.chance(0.8):
            value &= ~0x1FF000  # a large page that is well-formed
        return value | (self.random.choice(STRANGE) if self.chance(0.04) else 0)

    def content(self) -> int:
        """8 bytes of a table: one entry, or two of 32 bits."""
        if self.modes[0].startswith("32") or (len(self.modes) > 1 and self.chance(0.3)):
            return self.entry() & 0xFFFF_FFFF | (self.entry() & 0xFFFF_FFFF) << 32
        return self.entry()

    def registers(self) -> Registers:
        paging, cr4, efer = MODES[self.random.choice(self.modes)]
        for bit, probability in ((CR4_SMEP, 0.3), (CR4_SMAP, 0.3), (CR4_PGE, 0.5)):
            cr4 |= bit * self.chance(probability)
        efer |= EFER_NXE * self.chance(0.7)
        return Registers(CR0_PE | paging | CR0_WP * self.chance(0.5), self.root(), cr4, efer)

    def root(self) -> int:
        return self.random.choice(TABLES if self.chance(0.97) else OTHERS) << 12

    def address(self, now: Registers) -> int:
        if self.chance(0.4):
            address = self.random.choice(self.known)
            return address if now.efer & EFER_LMA else address & 0xFFFF_FFFF
        address = self.random.choice((0, 8, 0xFF8))
        for shift in (12, 21, 30, 39):
            address |= self.random.choice(INDICES) << shift
        if not now.efer & EFER_LMA:
            return address & 0xFFFF_FFFF
        return address | 0xFFFF << 48 if address >> 47 & 1 else address


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


def access(author: Author, ways: list[Machine]) -> str:
    address = author.address(ways[0].cpu.guest)
    kind, user = Access(author.random.randrange(3)), author.chance(0.5)
    implicit = not user and kind is not Access.FETCH and author.chance(0.2)
    override = author.chance(0.5)
    for machine in ways:
        set_ring(machine, user or implicit, override)
    what = f"{kind.name} {address:#x} user={user} implicit={implicit} AC={override}"
    outcome = same(ways, lambda machine: machine.cpu.access(address, kind, user), what)
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
        return "store elsewhere"
    value = author.content()
    for machine in ways:
        machine.cpu.store(outcome, value)
        machine.cpu.load_and_flush(machine.cpu.guest)
    return "table written"


def load(author: Author, ways: list[Machine]) -> str:
    wanted = author.registers()
    if author.chance(0.7):  # only another CR3: an address space that may have a shadow
        now = ways[0].cpu.guest
        wanted = Registers(now.cr0, author.root(), now.cr4, now.efer)
    for machine in ways:
        machine.cpu.load_and_flush(wanted)
    return "loads"


def tell(author: Author, ways: list[Machine], steps: int) -> Counter[str]:
    for page in TABLES:
        for index in INDICES:
            content = author.content()
            for machine in ways:
                machine.memory.write_u64(page << 12 | index * 8, content)
    start = author.registers()
    for machine in ways:
        machine.cpu.load_and_flush(start)
    told: Counter[str] = Counter()
    for _ in range(steps):
        act = author.random.choices((access, write_table, load), (70, 20, 10))[0]
        told[act(author, ways)] += 1
    return told


def agree(seed: int, modes: tuple[str, ...], **shadow: int) -> Counter[str]:
    with ExitStack() as stack:
        ways = [stack.enter_context(Machine(way)) for way in ("reference", "ept")]
        ways.append(stack.enter_context(Machine("shadow", **shadow)))
        return tell(Author(seed, modes), ways, STEPS)


QUICK = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("mode", MODES)
@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_all_ways_agree(mode: str, seed: int) -> None:
    told = agree(seed, (mode,))
    assert sum(told.values()) == STEPS


@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_all_ways_agree_while_modes_change(seed: int) -> None:
    assert sum(agree(seed, tuple(MODES)).values()) == STEPS


@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_all_ways_agree_when_shadows_are_short_of_frames(seed: int) -> None:
    assert sum(agree(seed, ("4-level", "PAE"), quota=8).values()) == STEPS


def test_stories_are_not_dull() -> None:
    """What the stories above consist of: enough of everything."""
    told = sum((agree(seed, ("4-level",)) for seed in range(20)), Counter[str]())
    assert told["memory"] > 100
    assert told["table written"] > 10
    assert told["no memory"] > 10
    assert {f"fault {code:#x}" for code in (0, 2, 4, 5, 7, 9, 0x10, 0x11, 0x15)} <= set(told)
