"""Shadow tables: linear address → HPA, made from a guest's tables and the machine's map; their bookkeeping.

::

    guest table entry (GPA) ──source──→ ShadowEntry ──→ frame of the shadow, or the page itself (HPA)
                 │
              GuestTable: which entries were made from this page of guest memory

- A shadow belongs to one address space of the guest: a CR3 and the control bits that change what the
  tables mean. The frames have the processor's format in long mode (4-level) and PAE's in any other; of
  the guest's tables it is made from only the *values* matter, so all guest formats are one case.
- An entry exists only because the guest's walk succeeded, and remembers the guest entry it was made from.
  All rights are in the leaf; the levels above let all pass.
- A page of guest memory from which entries were made is write-protected in every shadow, unless it is
  *out of sync*: then the guest writes it freely, and it is compared again at the next flush.
- Frames are bounded: the shadow used least recently goes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hostel.errors import HostError
from hostel.soft.physical import PAGE, PhysicalMemory

from .guest_map import GuestMap
from .virtualizer import PagingStatistics
from .walk import DIRTY, LARGE, LONG, PRESENT, USER, WRITABLE, Format

_SHIFT_OF = (0, 12, 21, 30, 39)
_CANONICAL = 0xFFFF << 48
_NOWHERE = memoryview(b"\xff" * PAGE)
_PASS = PRESENT | WRITABLE | USER


class Source(NamedTuple):
    """The guest entry that a shadow's is made from."""

    gpa: int | None
    """None: it is a piece of a large page, or paging is off."""
    value: int


NO_SOURCE = Source(None, 0)


class Leaf(NamedTuple):
    gpa: int
    bits: int
    written: bool
    """It is being written now: if it is a guest table, its protection ends here."""


class ShadowEntry:
    """One present entry of a shadow."""

    __slots__ = ("child", "gpa", "index", "linear", "node", "source", "value", "was")

    def __init__(self, node: Node, index: int) -> None:
        self.node = node
        self.index = index
        linear = node.linear + (index << _SHIFT_OF[node.level])
        self.linear = linear | _CANONICAL if linear >> 47 & 1 else linear
        self.value = 0
        """As it is in the frame."""
        self.source: int | None = None
        """GPA of the guest entry it was made from."""
        self.was = 0
        """That guest entry's value then."""
        self.child: Node | None = None
        self.gpa = 0
        """Of the page, in a leaf."""

    def made_from(self, source: Source) -> bool:
        return self.source == source.gpa and not self.is_stale(source.value)

    @property
    def plain(self) -> bool:
        """A PAE PDPTE: it has no rights, and reserved bits in their place (SDM vol. 3A table 4-8)."""
        return self.node.level == 3 and self.node is self.node.space.root

    def is_stale(self, now: int) -> bool:
        """A dirty bit that was set since is our own doing; one that was cleared must be set again."""
        if self.plain:
            return now != self.was
        return bool((self.was ^ now) & ~DIRTY or self.was & ~now & DIRTY)


class Node:
    """A frame of a shadow."""

    __slots__ = ("entries", "frame", "level", "linear", "space")

    def __init__(self, space: Space, frame: int, level: int, linear: int) -> None:
        self.space = space
        self.frame = frame
        self.level = level
        self.linear = linear
        self.entries: dict[int, ShadowEntry] = {}


class Space:
    """The shadow of one address space."""

    __slots__ = ("key", "narrow", "root", "users")

    def __init__(self, key: tuple[int, ...], format: Format | None) -> None:
        self.key = key
        self.narrow = format is not None and format.entry == 4
        """The guest's entries have 32 bits."""
        self.root: Node
        self.users = 0
        """vCPUs that have its root in CR3."""


class GuestTable:
    """A page of guest memory that is shadowed."""

    __slots__ = ("entries", "page", "pointers", "writes")

    def __init__(self, page: int) -> None:
        self.page = page
        """Its GPA >> 12."""
        self.entries: dict[ShadowEntry, None] = {}
        self.pointers = 0
        """How many of them were made from a PAE PDPTE."""
        self.writes = 0
        """Times its protection was broken since a walk last used it."""


class ShadowTables:
    """All shadows of one machine."""

    def __init__(
        self,
        physical: PhysicalMemory,
        guest_map: GuestMap,
        statistics: PagingStatistics,
        quota: int,
        flush: Callable[[int], None],
    ) -> None:
        self.physical = physical
        self.guest_map = guest_map
        self.statistics = statistics
        self.quota = quota
        self.flush = flush
        """Called with each linear address of which a TLB may hold more than the shadow now says."""
        self.spaces: dict[tuple[int, ...], Space] = {}
        """Least recently used first."""
        self.tables: dict[int, GuestTable] = {}
        self.unsynced: dict[int, GuestTable] = {}
        """Those that the guest may be writing now."""
        self._tables_in: Counter[int] = Counter()
        """How many of them lie in each 2 MiB of guest memory."""
        self._writable: dict[tuple[int, int], dict[ShadowEntry, None]] = {}
        """Leaves that let a page be written, by (GPA >> shift, shift)."""

    # --- Address spaces ---

    def use(self, key: tuple[int, ...], format: Format | None) -> Space:
        """The shadow of this key, as the most recently used."""
        space = self.spaces.pop(key, None)
        if space is None:
            self.make_room(1)
            space = Space(key, format)
            level = 4 if format is LONG else 3
            space.root = Node(space, self._allocate(), level, 0)
            self.statistics.shadows += 1
        self.spaces[key] = space
        return space

    def drop(self, space: Space) -> None:
        self.clear(space)
        del self.spaces[space.key]
        self._release(space.root.frame)
        self.statistics.shadows -= 1

    def clear(self, space: Space) -> None:
        for entry in list(space.root.entries.values()):
            self.zap(entry)

    def make_room(self, frames: int) -> None:
        """So that ``frames`` more can be allocated: by throwing away shadows, at last those in use."""
        if self.statistics.frames + frames <= self.quota:
            return
        for space in [space for space in self.spaces.values() if not space.users]:
            self.drop(space)
            self.statistics.recycled += 1
            if self.statistics.frames + frames <= self.quota:
                return
        for space in self.spaces.values():
            self.clear(space)
            self.statistics.recycled += 1

    def _allocate(self) -> int:
        try:
            frame = self.physical.allocate()
        except HostError:
            unused = [space for space in self.spaces.values() if not space.users]
            if not unused:
                raise
            self.drop(unused[0])
            self.statistics.recycled += 1
            return self._allocate()
        self.statistics.frames += 1
        return frame

    def _release(self, frame: int) -> None:
        self.physical.free(frame)
        self.statistics.frames -= 1

    # --- Entries ---

    def entry_at(self, node: Node, linear: int) -> ShadowEntry | None:
        return node.entries.get(linear >> _SHIFT_OF[node.level] & 511)

    def path(self, space: Space, linear: int) -> list[ShadowEntry]:
        """The entries that translate an address, from the top."""
        found = []
        node: Node | None = space.root
        while node is not None and (entry := self.entry_at(node, linear)) is not None:
            found.append(entry)
            node = entry.child
        return found

    def set_table(self, node: Node, linear: int, source: Source) -> Node:
        """The node below, made if need be. An entry made from anything else goes."""
        entry = self.entry_at(node, linear)
        if entry is not None:
            if entry.child and entry.made_from(source):
                return entry.child
            self.zap(entry)
        entry = self._new_entry(node, linear, source)
        entry.child = Node(node.space, self._allocate(), node.level - 1, entry.linear)
        self._write(entry, entry.child.frame | (PRESENT if entry.plain else _PASS))
        return entry.child

    def set_page(self, node: Node, linear: int, source: Source, leaf: Leaf) -> None:
        """The leaf, with the rights in ``bits``; protection of guest tables is our own business."""
        old = self.entry_at(node, linear)
        if old is not None:
            self.zap(old)
        entry = self._new_entry(node, linear, source)
        shift = _SHIFT_OF[node.level]
        entry.gpa = leaf.gpa & -(1 << shift)
        bits = leaf.bits
        if leaf.written:
            self.unprotect(leaf.gpa >> 12)
        if bits & WRITABLE:
            if self._protected(leaf.gpa >> 12):
                bits &= ~WRITABLE
            else:
                self._writable.setdefault((leaf.gpa >> shift, shift), {})[entry] = None
        hpa = self.guest_map.hpa(entry.gpa)
        assert hpa is not None, "who fills has looked"
        self._write(entry, hpa | bits | PRESENT | (LARGE if node.level > 1 else 0))
        self.statistics.fills += 1

    def _new_entry(self, node: Node, linear: int, source: Source) -> ShadowEntry:
        entry = ShadowEntry(node, linear >> _SHIFT_OF[node.level] & 511)
        node.entries[entry.index] = entry
        entry.source, entry.was = source
        if source.gpa is not None:
            table = self._table(source.gpa >> 12)
            table.entries[entry] = None
            table.pointers += entry.plain
        return entry

    def _write(self, entry: ShadowEntry, value: int) -> None:
        entry.value = value
        self.physical.write_u64(entry.node.frame + entry.index * 8, value)

    def zap(self, entry: ShadowEntry) -> None:
        """Take it away, with all below it."""
        del entry.node.entries[entry.index]
        self._write_zero(entry)
        if entry.source is not None:
            self._leave_table(entry)
        if entry.child is None:
            self._forget_writable(entry)
            self.flush(entry.linear)
            self.statistics.zapped += 1
            return
        for below in list(entry.child.entries.values()):
            self.zap(below)
        self._release(entry.child.frame)

    def _write_zero(self, entry: ShadowEntry) -> None:
        self.physical.write_u64(entry.node.frame + entry.index * 8, 0)

    def _forget_writable(self, entry: ShadowEntry) -> None:
        shift = _SHIFT_OF[entry.node.level]
        key = (entry.gpa >> shift, shift)
        holders = self._writable.get(key)
        if holders is not None:
            holders.pop(entry, None)
            if not holders:
                del self._writable[key]

    # --- Guest tables ---

    def has_tables_in(self, gpa: int) -> bool:
        """In these 2 MiB of guest memory: then no large page may cover them."""
        return self._tables_in[gpa >> 21] > 0

    def _protected(self, page: int) -> bool:
        return page in self.tables and page not in self.unsynced

    def shadow_tables_of(self, sources: Iterable[Source]) -> None:
        """Protect the tables that a walk went through, before anything is made from them."""
        for source in sources:
            if source.gpa is not None:
                self._table(source.gpa >> 12)

    def _table(self, page: int) -> GuestTable:
        table = self.tables.get(page)
        if table is None:
            table = self.tables[page] = GuestTable(page)
            self._tables_in[page >> 9] += 1
            self.protect(table)
        table.writes = 0
        return table

    def _leave_table(self, entry: ShadowEntry) -> None:
        assert entry.source is not None
        page = entry.source >> 12
        table = self.tables[page]
        del table.entries[entry]
        table.pointers -= entry.plain
        if not table.entries:
            del self.tables[page]
            self.unsynced.pop(page, None)
            self._tables_in[page >> 9] -= 1

    def protect(self, table: GuestTable) -> None:
        """From now on a write to it is a page fault."""
        self.unsynced.pop(table.page, None)
        for entry in list(self._writable.pop((table.page, 12), ())):
            self._write(entry, entry.value & ~WRITABLE)
            self.flush(entry.linear)
        for entry in list(self._writable.get((table.page >> 9, 21), ())):
            self.zap(entry)

    def unprotect(self, page: int) -> None:
        """The guest writes it: from now on its shadows, if it has any, may be out of date, as a TLB may."""
        if self._protected(page):
            self.statistics.table_writes += 1
            self.unsynced[page] = self.tables[page]
            self.tables[page].writes += 1

    def suspect(self, page: int) -> None:
        """An accessed or dirty bit was set there: out of sync, if it holds PDPTEs."""
        table = self.tables.get(page)
        if table is not None and table.pointers:
            self.unsynced[page] = table

    def sync(self, table: GuestTable) -> None:
        """Take away what is no longer as the guest's entries say."""
        self.statistics.syncs += 1
        hpa = self.guest_map.hpa(table.page << 12)
        page = _NOWHERE if hpa is None else self.physical.view(hpa, PAGE)
        quads, doubles = page.cast("Q"), page.cast("I")
        for entry in list(table.entries):
            assert entry.source is not None
            at = entry.source & PAGE - 1
            now = doubles[at >> 2] if entry.node.space.narrow else quads[at >> 3]
            if entry.is_stale(now) and entry in table.entries:  # it may go with one above it
                self.zap(entry)

    def sync_entry(self, entry: ShadowEntry) -> bool:
        """Whether it had to go."""
        assert entry.source is not None
        read = self.guest_map.read_u32 if entry.node.space.narrow else self.guest_map.read_u64
        stale = entry.is_stale(read(entry.source))
        if stale:
            self.zap(entry)
        return stale
