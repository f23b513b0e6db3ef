"""The TLB against a model that forgets nothing by itself: what it answers was put in, and not taken out."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hostel.soft.paging.tlb import Invept, Invvpid, Tlb, TlbEntry
from hostel.soft.paging.walk import LONG, Walk

SIZE = 8
VPIDS = st.integers(0, 2)
ROOTS = st.sampled_from([0, 0x1000, 0x2000])
PAGES = st.sampled_from([0, 1, 2, 511, 512, 513, 1 << 18, (1 << 18) + 1])
Key = tuple[int, int, int]


def entry(hpa: int, size: int = 4096, guest: int = 4096, is_global: bool = False) -> TlbEntry:
    page = Walk(0, guest, True, True, True, is_global, True, LONG, ())
    return TlbEntry(hpa, size, page, True, True)


class TlbModel(RuleBasedStateMachine):
    """Entries of 4 KiB, some of them pieces of a guest's 2 MiB page."""

    def __init__(self) -> None:
        super().__init__()
        self.tlb = Tlb(SIZE)
        self.model: dict[Key, tuple[TlbEntry, bool]] = {}
        self.next = 0

    @rule(vpid=VPIDS, root=ROOTS, page=PAGES, shared=st.booleans(), piece=st.booleans())
    def insert(self, vpid: int, root: int, page: int, shared: bool, piece: bool) -> None:
        self.next += 4096
        new = entry(self.next, guest=1 << 21 if piece else 4096)
        self.tlb.insert(vpid, root, page << 12, new, shared)
        self.model[vpid, root, page] = (new, shared)

    @rule(vpid=VPIDS, page=PAGES)
    def invlpg(self, vpid: int, page: int) -> None:
        self.tlb.invlpg(vpid, page << 12)
        self.forget(lambda key: key[0] == vpid and (key[2] == page or self.is_piece(key, page)))

    def is_piece(self, key: Key, page: int) -> bool:
        """Of the large page that holds this one: it goes with it."""
        return key[2] >> 9 == page >> 9 and self.model[key][0].page.size > 4096

    @rule(type=st.sampled_from(list(Invvpid)), vpid=VPIDS)
    def invvpid(self, type: Invvpid, vpid: int) -> None:
        if type is Invvpid.ADDRESS:
            return
        self.tlb.invvpid(type, vpid)
        if type is Invvpid.ALL:
            self.forget(lambda key: key[0] != 0)
        elif type is Invvpid.SINGLE:
            self.forget(lambda key: key[0] == vpid)
        else:
            self.forget(lambda key: key[0] == vpid and not self.model[key][1])

    @rule(type=st.sampled_from(list(Invept)), root=ROOTS)
    def invept(self, type: Invept, root: int) -> None:
        self.tlb.invept(type, root)
        self.forget(lambda key: key[1] == root if type is Invept.SINGLE else bool(key[1]))

    def forget(self, condition: Callable[[Key], bool]) -> None:
        for key in [key for key in self.model if condition(key)]:
            del self.model[key]

    @invariant()
    def answers_only_what_is_valid(self) -> None:
        held = 0
        for vpid in range(3):
            for root in (0, 0x1000, 0x2000):
                for page in (0, 1, 2, 511, 512, 513, 1 << 18, (1 << 18) + 1):
                    answer = self.tlb.look_up(vpid, root, page << 12)
                    if answer is not None:
                        held += 1
                        assert (vpid, root, page) in self.model
                        assert answer == self.model[vpid, root, page][0]
        assert held == len(self.tlb) <= SIZE


TestTlbModel = TlbModel.TestCase
TestTlbModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_full_one_replaces_its_own_oldest() -> None:
    tlb = Tlb(3)
    tlb.insert(1, 0, 0x1000, entry(0xA000), False)
    tlb.insert(2, 0, 0x1000, entry(0xB000), False)
    tlb.insert(2, 0, 0x2000, entry(0xC000), False)
    tlb.insert(2, 0, 0x3000, entry(0xD000), False)
    assert tlb.look_up(1, 0, 0x1000) is not None
    assert tlb.look_up(2, 0, 0x1000) is None
    assert tlb.look_up(2, 0, 0x3000) is not None
    tlb.insert(3, 0, 0x1000, entry(0xE000), False)  # has none of its own
    assert tlb.look_up(1, 0, 0x1000) is None
    assert tlb.statistics.evictions == 2


def test_a_large_page_is_one_entry_for_all_of_it() -> None:
    tlb = Tlb()
    tlb.insert(1, 0, 0x20_0000, entry(0x4000_0000, 1 << 21, 1 << 21), False)
    found = tlb.look_up(1, 0, 0x3F_FFFF)
    assert found is not None
    assert found.hpa == 0x4000_0000
    assert tlb.look_up(1, 0, 0x40_0000) is None
    tlb.invlpg(1, 0x30_0000)
    assert len(tlb) == 0


def test_invlpg_takes_all_pieces_of_the_guests_large_page() -> None:
    """SDM vol. 3A §4.10.2.3: who maps 2 MiB flushes once, however the processor keeps it."""
    tlb = Tlb()
    for page in (0x20_0000, 0x20_1000, 0x3F_F000):
        tlb.insert(1, 0x1000, page, entry(page, guest=1 << 21), False)
    tlb.insert(1, 0x1000, 0x40_0000, entry(0x40_0000, guest=1 << 21), False)
    tlb.invlpg(1, 0x20_5000)
    assert tlb.look_up(1, 0x1000, 0x3F_F000) is None
    assert tlb.look_up(1, 0x1000, 0x40_0000) is not None
    assert tlb.statistics.flushed == 3
