"""The device's side of a split virtqueue (virtio 1.2 §2.7).

::

    driver ── avail ring: heads of descriptor chains ──► pop()  ──► Chain(readable, writable)
    driver ◄─ used ring: head, bytes written ─────────── push()

Rules:

* It knows nothing of notification. ``enable_notifications`` and ``needs_interrupt`` say what to do;
  who holds the eventfds does it.
* Everything in the rings is the guest's word and may change while we look: each descriptor is read
  once, checked, and only the checked copy is used. Whatever is wrong is a ``VirtqueueError`` that
  names its ``Fault``; nothing else is ever raised, and no byte outside guest memory is touched.
* One thread at a time.

Memory order. The host is x86, and loads stay in order with loads, stores with stores (SDM vol. 3A
§9.2.2): ``avail.idx`` is read before the ring entry it covers (§2.7.13.3), a used entry is stored
before ``used.idx``, and CPython performs each as one load or store, in program order. Only a store
followed by a load of another address may swap, and there are exactly two such pairs: *tell the driver
to notify, then look for what it added meanwhile* and *publish used.idx, then look whether the driver
wants an interrupt*. Both take ``_fence``: an uncontended lock is a LOCK-prefixed instruction, which
x86 never reorders anything around.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from enum import StrEnum
from struct import Struct

from hostel.abi import virtio as abi
from hostel.errors import MemoryFault, QueueError
from hostel.memory import GuestMemory, Memory

MAX_BUFFERS = 1024
"""The most buffers of one chain: what one ``preadv`` takes (IOV_MAX)."""
MAX_BYTES = 0xFFFF_FFFF
"""A chain's length fits a used entry; §2.7.5 allows one byte more."""

_CHAINED = abi.DESC_F_NEXT
_WRITE = abi.DESC_F_WRITE
_INDIRECT = abi.DESC_F_INDIRECT
_ALONE = (0, _WRITE)
"""Flags of a descriptor that is a chain by itself."""
_unpack_descriptor, _pack_used = abi.DESC.unpack_from, abi.USED_ELEM.pack_into
_unpack_buffer = Struct("<QIH").unpack_from
"""A descriptor that is a chain by itself has no next one."""

_Words = tuple[int, ...]
_tables: dict[int, tuple[Callable[[memoryview], _Words], _Words, _Words]] = {}


def _table(length: int) -> tuple[Callable[[memoryview], _Words], _Words, _Words] | None:
    """How to take a table of so many bytes apart, what ``next`` is in each entry but the last, and the flags
    of one that is only read, such as a NIC sends. ``None``: no table is so long."""
    entries = length >> 4
    if length & 15 or not 0 < entries <= MAX_BUFFERS:
        return None
    unpack, chained = Struct("<" + "QIHH" * entries).unpack, (_CHAINED,) * (entries - 1)
    _tables[length] = unpack, tuple(range(1, entries)), (*chained, 0)
    return _tables[length]


class Fault(StrEnum):
    """What a driver can get wrong."""

    SIZE_ZERO = "the queue size is 0"
    SIZE_NOT_POWER_OF_TWO = "the queue size is not a power of two"
    SIZE_TOO_LARGE = "the queue size is too large"
    DESC_MISALIGNED = "the descriptor table is not aligned to 16 bytes"
    AVAIL_MISALIGNED = "the available ring is not aligned to 2 bytes"
    USED_MISALIGNED = "the used ring is not aligned to 4 bytes"
    RING_OUTSIDE = "a ring lies outside guest memory"
    INDEX_JUMP = "the available index jumped by more than the queue size"
    HEAD_OUT_OF_RANGE = "the head of a chain is not in the descriptor table"
    NEXT_OUT_OF_RANGE = "the next descriptor is not in the table"
    LOOP = "the chain is a loop"
    TOO_LONG = "the chain has too many buffers"
    TOO_MANY_BYTES = "the chain is longer than 4 GiB"
    ZERO_LENGTH = "a buffer has no bytes"
    BUFFER_OUTSIDE = "a buffer lies outside guest memory"
    READABLE_AFTER_WRITABLE = "a readable buffer follows a writable one"
    INDIRECT_NOT_NEGOTIATED = "an indirect descriptor that was not negotiated"
    INDIRECT_WITH_NEXT = "an indirect descriptor with a next one"
    INDIRECT_IN_INDIRECT = "an indirect descriptor inside an indirect table"
    INDIRECT_LENGTH = "an indirect table whose length is not a multiple of 16, or 0"
    INDIRECT_TOO_LONG = "an indirect table with too many entries"
    INDIRECT_OUTSIDE = "an indirect table lies outside guest memory"


class VirtqueueError(QueueError):
    """The driver broke the queue: the device needs a reset."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault}: {detail}")
        self.fault = fault


class Chain:
    """One request: buffers of the guest, those to read from first."""

    __slots__ = ("head", "readable", "size", "writable")

    def __init__(
        self, head: int, size: int, readable: list[memoryview], writable: list[memoryview]
    ) -> None:
        self.head = head
        self.size = size
        self.readable = readable
        self.writable = writable


def total(buffers: Sequence[memoryview]) -> int:
    return sum(map(len, buffers))


def take(buffers: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split after ``size`` bytes: a driver may cut a request as it likes (§2.7.4)."""
    for at, buffer in enumerate(buffers):
        if size < len(buffer):
            head = [buffer[:size]] if size else []
            return [*buffers[:at], *head], [buffer[size:], *buffers[at + 1 :]]
        size -= len(buffer)
    return list(buffers), []


def fill(buffers: Sequence[memoryview], data: bytes) -> int:
    """Copy as much of ``data`` as there is room for."""
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)
    return done


class Queue:
    """``next_avail`` and ``next_used`` count without wrapping; the rings hold them modulo 65536."""

    def __init__(
        self,
        memory: Memory,
        size: int,
        *,
        desc: int,
        avail: int,
        used: int,
        features: int = 0,
        position: tuple[int, int] = (0, 0),
    ) -> None:
        check_geometry(size, desc, avail, used)
        self.size = size
        self.next_avail, self.next_used = position
        self._memory = memory
        self._view, self._views = memory.view, memory.views
        self._mask = size - 1
        self._indirect = bool(features >> abi.RING_F_INDIRECT_DESC & 1)
        self._event_index = bool(features >> abi.RING_F_EVENT_IDX & 1)
        try:
            self._desc = memory.view(desc, abi.DESC.size * size)
            # The flags, the index, the ring, and used_event behind it.
            self._avail = memory.view(avail, 6 + 2 * size).cast("H")
            # The flags, the index, pairs of id and length, and avail_event behind them.
            self._used = memory.view(used, 6 + 8 * size)
        except MemoryFault as error:
            raise VirtqueueError(Fault.RING_OUTSIDE, error.message) from None
        self._used_words = self._used.cast("H")
        self._used_entries = self._used[abi.RING_HEADER_SIZE : -2].cast("I")
        self._signalled = self.next_used
        self._fence = threading.Lock()

    def close(self) -> None:
        """Let go of guest memory. A closed queue must not be used."""
        for view in (self._used_words, self._used_entries, self._used, self._avail, self._desc):
            view.release()

    # -- chains -------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """The next chain, or ``None`` where the driver offers no more."""
        chains = self.pop_batch(1)
        return chains[0] if chains else None

    def pop_batch(self, limit: int) -> list[Chain]:
        """The next chains, at most ``limit``. The hottest code of all devices: a chain of one buffer, such
        as most of a NIC's, is made without a call that can be spared."""
        avail, desc, mask, first = self._avail, self._desc, self._mask, self.next_avail
        waiting = (avail[1] - first) & 0xFFFF
        chains: list[Chain] = []
        if not waiting:
            return chains
        if waiting > self.size:
            raise VirtqueueError(Fault.INDEX_JUMP, f"by {waiting}, size {self.size}")
        for index in range(first, first + min(waiting, limit)):
            head = avail[2 + (index & mask)]
            if head > mask:
                raise VirtqueueError(Fault.HEAD_OUT_OF_RANGE, f"{head}, size {self.size}")
            address, length, flags, _ = _unpack_descriptor(desc, head << 4)
            if flags == _INDIRECT:
                chains.append(
                    self._table_in_order(head, address, length)
                    or self._walk_indirect(Chain(head, 0, [], []), address, length, flags)
                )
            elif not length or flags not in _ALONE:
                chains.append(
                    self._walk(Chain(head, 0, [], []), desc, self.size, head, direct=True)
                )
            elif flags:
                chains.append(Chain(head, length, [], [self._buffer(address, length)]))
            else:
                chains.append(Chain(head, length, [self._buffer(address, length)], []))
        self.next_avail += len(chains)
        return chains

    def has_more(self) -> bool:
        """Whether the driver has offered more than was popped: a hint, there is no fence."""
        return bool(self._avail[1] != self.next_avail & 0xFFFF)

    def pop_room(self, limit: int) -> tuple[list[int], list[int], list[memoryview]]:
        """The next chains, at most ``limit``, as room to write into: their heads, their lengths, and views of
        all their bytes. Buffers that follow each other in guest memory share a view."""
        desc, heads = self._desc, self._heads(limit)
        lengths: list[int] = []
        views: list[memoryview] = []
        start = end = 0
        for head in heads:
            address, length, flags = _unpack_buffer(desc, head << 4)
            if flags != _WRITE or not length:
                break
            if address != end:
                if lengths:
                    views.append(self._buffer(start, end - start))
                start = address
            end = address + length
            lengths.append(length)
        if not lengths:
            return self._pop_pieces() if heads else ([], [], [])
        views.append(self._buffer(start, end - start))
        self.next_avail += len(lengths)
        return heads[: len(lengths)], lengths, views

    def _pop_pieces(self) -> tuple[list[int], list[int], list[memoryview]]:
        """The next chain, which is not a single buffer."""
        (chain,) = self.pop_batch(1)
        if not 0 < len(chain.writable) < MAX_BUFFERS:
            raise QueueError(f"a receive buffer of {len(chain.writable)} pieces")
        return [chain.head], [total(chain.writable)], chain.writable

    def _heads(self, limit: int) -> list[int]:
        """Of the chains that wait, at most ``limit``."""
        avail, size, at = self._avail, self.size, self.next_avail & self._mask
        index = avail[1]
        waiting, offered = (index - self.next_avail) & 0xFFFF, (index - self.next_used) & 0xFFFF
        if not waiting:
            return []
        if waiting > size or offered > size:  # each chain has a descriptor until it is used
            raise VirtqueueError(Fault.INDEX_JUMP, f"by {max(waiting, offered)}, size {size}")
        end = at + min(waiting, limit)
        heads: list[int] = avail[2 + at : 2 + min(end, size)].tolist()
        if end > size:
            heads += avail[2 : 2 + end - size].tolist()
        if max(heads) >= size:
            raise VirtqueueError(Fault.HEAD_OUT_OF_RANGE, f"{max(heads)}, size {size}")
        return heads

    def _buffer(self, address: int, length: int) -> memoryview:
        try:
            return self._view(address, length)
        except MemoryFault as error:
            raise VirtqueueError(Fault.BUFFER_OUTSIDE, error.message) from None

    def unpop(self, count: int = 1) -> None:
        """Forget the last ``count`` pops: the same chains come again."""
        self.next_avail -= count

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back; ``written`` bytes of its writable buffers are new, from the first on."""
        used = self.next_used
        _pack_used(self._used, 4 + ((used & self._mask) << 3), chain.head, written)
        self.next_used = used = used + 1
        self._used_words[1] = used & 0xFFFF

    def push_used(self, heads: array[int], lengths: array[int]) -> None:
        """Several at once, each a head and how many bytes were written: the driver sees all of them or none.
        Both arrays of type I, as in the ring, where they take turns."""
        used, slot, count = self._used_entries, self.next_used & self._mask, len(heads)
        if count == 1:  # the same as below in half the time
            used[2 * slot], used[2 * slot + 1] = heads[0], lengths[0]
        else:
            end = 2 * min(slot + count, self.size)
            fit, rest = end // 2 - slot, 2 * (slot + count) - end
            used[2 * slot : end : 2], used[2 * slot + 1 : end : 2] = heads[:fit], lengths[:fit]
            if rest:
                used[:rest:2], used[1:rest:2] = heads[fit:], lengths[fit:]
        self.next_used += count
        self._used_words[1] = self.next_used & 0xFFFF

    def _table_in_order(self, head: int, address: int, length: int) -> Chain | None:
        """An indirect table as drivers write it, each entry followed by the one behind it: taken apart as
        a whole. ``None`` where it is not so, or anything is wrong: ``_walk`` reads anew, and says what.
        """
        table = _tables.get(length) or _table(length)
        if table is None or not self._indirect:
            return None
        unpack, order, outward = table
        try:
            fields = unpack(self._view(address, length))
            lengths, flags = fields[1::4], fields[2::4]
            if fields[3:-1:4] != order:
                return None
            buffers, size = self._views(fields[::4], lengths), sum(lengths)
        except MemoryFault:
            return None
        readable = len(buffers) if flags == outward else _readable(flags)
        if readable is None or size > MAX_BYTES or 0 in lengths:
            return None
        return Chain(head, size, buffers[:readable], buffers[readable:])

    def _walk(
        self, chain: Chain, table: memoryview | bytes, entries: int, at: int, *, direct: bool
    ) -> Chain:
        readable, writable = chain.readable, chain.writable
        for _ in range(entries):
            address, length, flags, following = _unpack_descriptor(table, at << 4)
            if flags & _INDIRECT:
                if not direct:
                    raise VirtqueueError(Fault.INDIRECT_IN_INDIRECT, f"entry {at}")
                return self._walk_indirect(chain, address, length, flags)
            if not length:
                raise VirtqueueError(Fault.ZERO_LENGTH, f"at {address:#x}")
            buffer = self._buffer(address, length)
            if flags & _WRITE:
                writable.append(buffer)
            elif writable:
                raise VirtqueueError(Fault.READABLE_AFTER_WRITABLE, f"at {address:#x}")
            else:
                readable.append(buffer)
            chain.size += length
            if not flags & _CHAINED:
                if len(readable) + len(writable) > MAX_BUFFERS or chain.size > MAX_BYTES:
                    break
                return chain
            if following >= entries:
                raise VirtqueueError(Fault.NEXT_OUT_OF_RANGE, f"{following} of {entries}")
            at = following
        raise _refusal(chain, entries)

    def _walk_indirect(self, chain: Chain, address: int, length: int, flags: int) -> Chain:
        """§2.7.5.3: the last descriptor of a chain may stand for a table of more."""
        if not self._indirect:
            raise VirtqueueError(Fault.INDIRECT_NOT_NEGOTIATED, f"head {chain.head}")
        if flags & _CHAINED:
            raise VirtqueueError(Fault.INDIRECT_WITH_NEXT, f"head {chain.head}")
        entries, rest = divmod(length, abi.DESC.size)
        if rest or not entries:
            raise VirtqueueError(Fault.INDIRECT_LENGTH, f"{length} bytes")
        if entries > MAX_BUFFERS:
            raise VirtqueueError(Fault.INDIRECT_TOO_LONG, f"{entries}, at most {MAX_BUFFERS}")
        try:
            table = self._memory.read(address, length)
        except MemoryFault as error:
            raise VirtqueueError(Fault.INDIRECT_OUTSIDE, error.message) from None
        return self._walk(chain, table, entries, 0, direct=False)

    # -- notification -------------------------------------------------------------------------

    def disable_notifications(self) -> None:
        """Kicks are not needed for now. A hint: the driver may kick all the same (§2.7.10).

        With event index nothing has to be done: the driver kicks only when it passes the index
        that ``enable_notifications`` left.
        """
        if not self._event_index:
            self._used_words[0] = abi.USED_F_NO_NOTIFY

    def enable_notifications(self) -> bool:
        """Kick us for the next chain. ``True``: there is one already, and no kick will come for it."""
        if self._event_index:
            self._used_words[3 + 4 * self.size - 1] = self.next_avail & 0xFFFF
        else:
            self._used_words[0] = 0
        with self._fence:
            return self._avail[1] != self.next_avail & 0xFFFF

    def needs_interrupt(self) -> bool:
        """Ask after a batch of ``push``: does the driver want to hear of it (§2.7.7)?"""
        before, used = self._signalled, self.next_used
        if before == used:
            return False
        self._signalled = used
        with self._fence:
            if not self._event_index:
                return not self._avail[0] & abi.AVAIL_F_NO_INTERRUPT
            event = self._avail[2 + self.size]
        return (used - event - 1) & 0xFFFF < used - before

    @property
    def position(self) -> tuple[int, int]:
        """Where to go on, for ``position=``: the next available and the next used index."""
        return self.next_avail & 0xFFFF, self.next_used & 0xFFFF


def _readable(flags: tuple[int, ...]) -> int | None:
    """How many buffers of a table are readable, they come first; ``None`` if its flags say anything else."""
    readable, last = flags.count(_CHAINED), flags[-1]
    writable = len(flags) - 1 - readable
    chained = (_CHAINED,) * readable + (_CHAINED | _WRITE,) * writable
    if last not in _ALONE or (writable and not last) or flags[:-1] != chained:
        return None
    return readable + (not last)


def _refusal(chain: Chain, entries: int) -> VirtqueueError:
    """A chain that ends too late, or not at all."""
    if chain.size > MAX_BYTES:
        return VirtqueueError(Fault.TOO_MANY_BYTES, f"head {chain.head}")
    if len(chain.readable) + len(chain.writable) > MAX_BUFFERS:
        return VirtqueueError(Fault.TOO_LONG, f"more than {MAX_BUFFERS}")
    return VirtqueueError(Fault.LOOP, f"head {chain.head}, {entries} entries")


def check_geometry(size: int, desc: int, avail: int, used: int) -> None:
    """§2.7: sizes and alignments."""
    if size == 0:
        raise VirtqueueError(Fault.SIZE_ZERO, "0")
    if size > abi.QUEUE_SIZE_MAX:
        raise VirtqueueError(Fault.SIZE_TOO_LARGE, f"{size}, at most {abi.QUEUE_SIZE_MAX}")
    if size & (size - 1):
        raise VirtqueueError(Fault.SIZE_NOT_POWER_OF_TWO, f"{size}")
    if desc % abi.DESC_ALIGN:
        raise VirtqueueError(Fault.DESC_MISALIGNED, f"{desc:#x}")
    if avail % abi.AVAIL_ALIGN:
        raise VirtqueueError(Fault.AVAIL_MISALIGNED, f"{avail:#x}")
    if used % abi.USED_ALIGN:
        raise VirtqueueError(Fault.USED_MISALIGNED, f"{used:#x}")


def check_rings(memory: GuestMemory, size: int, desc: int, avail: int, used: int) -> None:
    """What every ring has to be before another process or the kernel is told where it lies."""
    check_geometry(size, desc, avail, used)
    try:
        memory.hva(desc, abi.DESC.size * size)
        memory.hva(avail, 6 + 2 * size)
        memory.hva(used, 6 + 8 * size)
    except MemoryFault as error:
        raise VirtqueueError(Fault.RING_OUTSIDE, error.message) from None
