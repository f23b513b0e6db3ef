"""The translation lookaside buffer: what a processor remembers of walks, with tags (SDM vol. 3C §28.3).

An entry belongs to a *context*: a VPID and an EPT root (0: no EPT). So address spaces of several
machines lie in it side by side, and a VM entry with a VPID need not empty it. PCIDs are not supported:
all is PCID 0.

- It never forgets to forget: what the manual says is invalidated is gone. It may hold less than it could.
- Its size is bounded. A full one replaces the oldest entry of the context that wants another (not a
  global one first); the oldest of the oldest context, where that has none. Nothing is left to chance.
- An entry that does not permit an access is no fault: the tables are walked again (as hardware does in
  fact, and as §4.10.4.3 lets it). A walk that faults removes the entry of its address.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

from .walk import Walk


class TlbEntry(NamedTuple):
    hpa: int
    """Of the page's start."""
    size: int
    """Of the smaller page: the guest's or the EPT's."""
    page: Walk
    """The guest's."""
    writes: bool
    """Dirty bits are set and the EPT lets it be written."""
    executes: bool
    """The EPT lets it be executed."""


class TlbStatistics(msgspec.Struct):
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    flushed: int = 0
    """Entries that an invalidation took away."""
    flushes: int = 0
    """Invalidations."""


class Context(NamedTuple):
    """One tag's entries by (page number, its shift), oldest first."""

    local: dict[tuple[int, int], TlbEntry]
    shared: dict[tuple[int, int], TlbEntry]
    """Global pages."""
    fractured: set[tuple[int, int]]
    """Large pages of the guest that are here in pieces: to forget one is to forget all of them."""

    def pieces(self, number: int, whole: int) -> list[tuple[int, int]]:
        return [
            (page, shift)
            for entries in (self.local, self.shared)
            for page, shift in entries
            if shift <= whole and page >> whole - shift == number
        ]


class Invvpid(IntEnum):
    """Types of INVVPID (SDM vol. 3C §30.3)."""

    ADDRESS = 0
    SINGLE = 1
    ALL = 2
    SINGLE_RETAIN_GLOBALS = 3


class Invept(IntEnum):
    """Types of INVEPT (SDM vol. 3C §30.3)."""

    SINGLE = 1
    ALL = 2


_SHIFTS = (12, 21, 30)
"""A 4 MiB page is kept as halves of 2 MiB."""


class Tlb:
    def __init__(self, size: int = 1536) -> None:
        self.size = size
        self.statistics = TlbStatistics()
        self._contexts: dict[tuple[int, int], Context] = {}
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def look_up(self, vpid: int, root: int, address: int) -> TlbEntry | None:
        """Not counted: whether an entry is a hit depends on the access."""
        context = self._contexts.get((vpid, root))
        if context is None:
            return None
        for shift in _SHIFTS:
            key = (address >> shift, shift)
            entry = context.local.get(key) or context.shared.get(key)
            if entry is not None:
                return entry
        return None

    def insert(self, vpid: int, root: int, address: int, entry: TlbEntry, shared: bool) -> None:
        """In place of what was there for this address: pages never overlap within a context."""
        context = self._contexts.setdefault((vpid, root), Context({}, {}, set()))
        self._remove(context, _keys(address))
        if self._used >= self.size:
            self._evict(context)
        shift = entry.size.bit_length() - 1
        (context.shared if shared else context.local)[address >> shift, shift] = entry
        self._used += 1
        if entry.page.format is not None and entry.page.size > entry.size:
            whole = entry.page.size.bit_length() - 1
            context.fractured.add((address >> whole, whole))

    def _evict(self, wanting: Context) -> None:
        """The room that is made is the wanting context's, if it has any."""
        for context in (wanting, *self._contexts.values()):
            for entries in (context.local, context.shared):
                if entries:
                    del entries[next(iter(entries))]
                    self._used -= 1
                    self.statistics.evictions += 1
                    return

    # --- Invalidation ---

    def _drop(self, vpid: int, root: int, address: int) -> int:
        """All pieces of the guest's page (SDM vol. 3A §4.10.2.3)."""
        context = self._contexts.get((vpid, root))
        if context is None:
            return 0
        keys = _keys(address)
        for whole in (21, 22, 30):
            if (address >> whole, whole) in context.fractured:
                context.fractured.remove((address >> whole, whole))
                keys += context.pieces(address >> whole, whole)
        return self._remove(context, keys)

    def _remove(self, context: Context, keys: list[tuple[int, int]]) -> int:
        found = 0
        for key in keys:
            found += context.local.pop(key, None) is not None
            found += context.shared.pop(key, None) is not None
        self._used -= found
        return found

    def _count(self, flushed: int) -> None:
        self.statistics.flushes += 1
        self.statistics.flushed += flushed

    def _clear(self, entries: dict[tuple[int, int], TlbEntry]) -> int:
        count = len(entries)
        entries.clear()
        self._used -= count
        return count

    def drop(self, vpid: int, root: int, address: int) -> None:
        """A walk of this address faulted (SDM vol. 3A §4.10.4.1, vol. 3C §28.3.3.1)."""
        self._drop(vpid, root, address)

    def invlpg(self, vpid: int, address: int) -> None:
        """INVLPG, and INVVPID of one address: for all EPT roots, global pages too (§28.3.3.1)."""
        self._count(sum(self._drop(vpid, root, address) for root in self._roots(vpid)))

    def flush(self, vpid: int, *, keep_global: bool) -> None:
        """A MOV to CR3, CR0 or CR4 under this VPID; INVVPID of a single context."""
        flushed = 0
        for root in self._roots(vpid):
            context = self._contexts[vpid, root]
            flushed += self._clear(context.local)
            if not keep_global:
                flushed += self._clear(context.shared)
                context.fractured.clear()
        self._count(flushed)

    def _roots(self, vpid: int) -> list[int]:
        return [root for tag, root in self._contexts if tag == vpid]

    def _forget(self, tags: list[tuple[int, int]]) -> None:
        flushed = 0
        for tag in tags:
            context = self._contexts.pop(tag)
            flushed += self._clear(context.local) + self._clear(context.shared)
        self._count(flushed)

    def invvpid(self, type: Invvpid, vpid: int, address: int = 0) -> None:
        if type is Invvpid.ALL:  # all but VPID 0
            self._forget([tag for tag in self._contexts if tag[0]])
        elif type is Invvpid.ADDRESS:
            self.invlpg(vpid, address)
        else:
            self.flush(vpid, keep_global=type is Invvpid.SINGLE_RETAIN_GLOBALS)

    def invept(self, type: Invept, root: int = 0) -> None:
        """Of a single root, or of all; what was made without EPT stays (§28.3.3.1)."""
        single = type is Invept.SINGLE
        self._forget([tag for tag in self._contexts if (tag[1] == root if single else tag[1])])


def _keys(address: int) -> list[tuple[int, int]]:
    return [(address >> shift, shift) for shift in _SHIFTS]
