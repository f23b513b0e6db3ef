"""A driver as bytes: what a fuzzer mutates, and what it means.

::

    op     then
    0      queue, flags, for each readable buffer its length and bytes, for each writable one a size: a chain
    1      queue, index, place, length, flags, next: a descriptor, as it is
    2      queue, head: offered, whatever it is
    3      queue, distance: the available index jumps
    4      queue: a notification
    5      offset, width, value: a write to the config space
    6      status: a write to the device's status
    7      reset, and start anew
    8      length, bytes: the host's side says something
    9      wait until the device has seen all that

Bytes that are missing are zeros; any bytes are a program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostel.virtio.mock import DriverQueue
from virtio.rig import Driver

SIZES = (1, 2, 4, 8, 16, 44, 64, 512, 1024, 4096, 4140, 12, 60000, 3, 100, 256)
PLACES = (0, 1, 4096, 0x10000, 0xC000_0000, 0xFFFF_F000, 1 << 32, 2**64 - 1)
CHAIN, DESCRIPTOR, OFFER, JUMP, KICK, CONFIG, STATUS, RESTART, HOST, WAIT = range(10)
MOST = 64
"""Operations of one program."""


class Input:
    """Takes numbers and bytes off a program."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def bytes(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part.ljust(size, b"\0")

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.bytes(size), "little")


class Player:
    """Plays programs on one driver."""

    def __init__(
        self,
        driver: Driver,
        start: Callable[[], None],
        speak: Callable[[bytes], None],
        settle: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._start, self._speak, self._settle = start, speak, settle
        self._operations: tuple[Callable[[Input], None], ...] = (
            self._chain,
            self._descriptor,
            lambda at: self._queue(at).offer(at.number(2)),
            self._jump,
            lambda at: driver.kick(self._index(at)),
            self._config,
            lambda at: driver.set_status(at.number()),
            lambda at: start(),
            lambda at: speak(at.bytes(at.number(2) & 0xFFF)),
            lambda at: settle(),
        )

    def play(self, data: bytes) -> None:
        program = Input(data)
        self._start()
        for _ in range(MOST):
            if not program:
                break
            operation = self._operations[program.number() % len(self._operations)]
            try:
                operation(program)
            except (IndexError, MemoryError):  # the mock driver has no descriptor or no room left
                break
        for index in self._driver.queues:
            self._driver.kick(index)
        self._settle()

    def _index(self, at: Input) -> int:
        return at.number() % len(self._driver.queues)

    def _queue(self, at: Input) -> DriverQueue:
        return self._driver.queues[self._index(at)]

    def _chain(self, at: Input) -> None:
        queue, flags = self._queue(at), at.number()
        readable = [at.bytes(at.number(2) & 0x1FFF) for _ in range(flags & 3)]
        writable = [SIZES[at.number() % len(SIZES)] for _ in range(flags >> 2 & 3)]
        readable = [part for part in readable if part]
        if readable or writable:
            queue.add(readable, writable, indirect=bool(flags & 16))

    def _descriptor(self, at: Input) -> None:
        queue, index, place = self._queue(at), at.number() % 8, at.number()
        address = queue.heap + at.number(2) if place & 1 else PLACES[place >> 1 & 7] + at.number(2)
        length = at.number(4)
        queue.set_descriptor(index, address % 2**64, length, at.number(), at.number())

    def _jump(self, at: Input) -> None:
        queue = self._queue(at)
        queue.set_available_index(queue._next_avail + at.number(2))

    def _config(self, at: Input) -> None:
        offset, width = at.number() & 63, 1 << (at.number() & 3)
        address = self._driver.config_address(offset)
        self._driver.rig.write(address, width, at.number(width))


def chain(queue: int, readable: Sequence[bytes], writable: Sequence[int]) -> bytes:
    """The program that offers such a chain, as far as a program can, and notifies."""
    parts = list(readable)[:3]
    sizes = [min(range(len(SIZES)), key=lambda at: abs(SIZES[at] - size)) for size in writable][:3]
    program = bytes([CHAIN, queue, len(parts) | len(sizes) << 2])
    program += b"".join(len(part[:8191]).to_bytes(2, "little") + part[:8191] for part in parts)
    return program + bytes(sizes) + bytes([KICK, queue])
