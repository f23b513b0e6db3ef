"""The driver's side of a split virtqueue, in Python: for tests, fuzzing and benchmarks of devices.

::

    driver = DriverQueue(memory, base=0x10000, size=16)
    head = driver.add([b"request"], [4096])       # readable bytes, room to write into
    ... the device under test serves the queue ...
    for done in driver.completed(): done.head, done.written, done.data

It lays the rings and a heap for its buffers one after the other from ``base``. The ``set_*`` methods
write whatever they are told: that is how a hostile driver is played.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import msgspec

from hostel.abi import virtio as abi
from hostel.memory import GuestMemory

Buffer = tuple[int, int, bool]
"""Address, length, writable."""


class Completion(msgspec.Struct, frozen=True):
    """A chain that came back through the used ring."""

    head: int
    written: int
    data: bytes
    """The first ``written`` bytes of the writable buffers."""


class DriverQueue:
    """A well-behaved driver, unless told otherwise."""

    def __init__(
        self,
        memory: GuestMemory,
        base: int,
        size: int = 16,
        *,
        heap: int = 1 << 20,
        event_index: bool = False,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_index = event_index
        self.desc = base
        self.avail = self.desc + abi.DESC.size * size
        self.used = _up(self.avail + 6 + 2 * size, abi.USED_ALIGN)
        self.heap = _up(self.used + 6 + 8 * size, 4096)
        self.end = self.heap + heap
        self._heap_next = self.heap
        self._heap_free: dict[int, list[int]] = {}
        self._free = list(range(size - 1, -1, -1))
        self._chains: dict[int, tuple[list[int], list[Buffer]]] = {}
        self._next_avail = 0
        self._kicked_at = 0
        self._next_used = 0
        self._fence = threading.Lock()
        memory.write(base, bytes(self.heap - base))

    @property
    def features(self) -> int:
        """The ring features that this driver negotiates."""
        event_index = self.event_index << abi.RING_F_EVENT_IDX
        return event_index | 1 << abi.RING_F_INDIRECT_DESC

    # -- a driver's work ----------------------------------------------------------------------

    def add(
        self,
        readable: Iterable[bytes] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Offer a chain; its head. ``IndexError`` where no descriptor is free."""
        readable, writable = list(readable), list(writable)
        need = 1 if indirect else len(readable) + len(writable)
        if need > len(self._free):
            raise IndexError(f"{need} descriptors wanted, {len(self._free)} free")
        buffers = [self._store(data) for data in readable]
        buffers += [(self._allocate(length), length, True) for length in writable]
        entries = [self._free.pop() for _ in range(need)]
        if indirect:
            table = b"".join(_entry(buffers, at, at + 1) for at in range(len(buffers)))
            address = self._allocate(len(table))
            self.memory.write(address, table)
            self.set_descriptor(entries[0], address, len(table), abi.DESC_F_INDIRECT)
            buffers.append((address, len(table), False))
        else:
            for at, index in enumerate(entries):
                following = entries[at + 1] if at + 1 < len(entries) else 0
                self.memory.write(self.desc + 16 * index, _entry(buffers, at, following))
        self._chains[entries[0]] = (entries, buffers)
        self.offer(entries[0])
        return entries[0]

    def completed(self) -> list[Completion]:
        """What the device has used since the last call; its buffers are free again."""
        done = self._take_used()
        while self.event_index:
            self.set_used_event(self._next_used)
            with self._fence:  # what was used before the device saw this is told by no interrupt
                more = self._take_used()
            if not more:
                break
            done += more
        return done

    def _take_used(self) -> list[Completion]:
        done = []
        while self.memory.read_u16(self.used + 2) != self._next_used & 0xFFFF:
            slot = self.used + 4 + 8 * (self._next_used % self.size)
            head, written = self.memory.read_u32(slot), self.memory.read_u32(slot + 4)
            done.append(Completion(head, written, self._release(head, written)))
            self._next_used += 1
        return done

    @property
    def wants_kick(self) -> bool:
        """Whether the device asked to hear of what was added since the last look (§2.7.10)."""
        before, self._kicked_at = self._kicked_at, self._next_avail
        if not self.event_index:
            flags = self.memory.read_u16(self.used)
            return before != self._next_avail and not flags & abi.USED_F_NO_NOTIFY
        event = self.memory.read_u16(self.used + 4 + 8 * self.size)
        return (self._next_avail - event - 1) & 0xFFFF < self._next_avail - before

    # -- and a hostile driver's ---------------------------------------------------------------

    def set_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        entry = abi.DESC.pack(address, length, flags, following)
        self.memory.write(self.desc + abi.DESC.size * index, entry)

    def offer(self, head: int) -> None:
        """Put ``head`` in the available ring, whatever it is."""
        self.memory.write_u16(self.avail + 4 + 2 * (self._next_avail % self.size), head)
        self._next_avail += 1
        self.set_available_index(self._next_avail)

    def set_available_index(self, value: int) -> None:
        self.memory.write_u16(self.avail + 2, value & 0xFFFF)

    def set_used_event(self, value: int) -> None:
        self.memory.write_u16(self.avail + 4 + 2 * self.size, value & 0xFFFF)

    def set_flags(self, value: int) -> None:
        self.memory.write_u16(self.avail, value)

    # -- buffers ------------------------------------------------------------------------------

    def _store(self, data: bytes) -> Buffer:
        address = self._allocate(len(data))
        self.memory.write(address, data)
        return address, len(data), False

    def _allocate(self, length: int) -> int:
        room = _up(length, 16)
        if free := self._heap_free.get(room):
            return free.pop()
        address = self._heap_next
        if address + room > self.end:
            raise MemoryError(f"the mock driver's heap has no {length} bytes left")
        self._heap_next += room
        return address

    def _release(self, head: int, written: int) -> bytes:
        entries, buffers = self._chains.pop(head)
        self._free.extend(reversed(entries))
        data = bytearray()
        for address, length, writable in buffers:
            if writable and len(data) < written:
                data += self.memory.read(address, min(length, written - len(data)))
            self._heap_free.setdefault(_up(length, 16), []).append(address)
        return bytes(data)


def _entry(buffers: list[Buffer], at: int, following: int) -> bytes:
    address, length, writable = buffers[at]
    more = at + 1 < len(buffers)
    flags = more * abi.DESC_F_NEXT | writable * abi.DESC_F_WRITE
    return abi.DESC.pack(address, length, flags, following if more else 0)


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
