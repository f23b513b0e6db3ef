"""A ring of descriptors in guest memory, as its five registers describe it (8254x SDM §3.2.6, §3.4).

::

    base ── head ═════════ tail ── base + length      head to tail, tail not included: the card's
"""

from __future__ import annotations

from hostel.abi import e1000 as abi
from hostel.errors import GuestError
from hostel.memory import GuestMemory

BASE_LOW, BASE_HIGH, LENGTH, HEAD, TAIL = 0x00, 0x04, 0x08, 0x10, 0x18


class Ring:
    """``registers`` are the card's; the ring's own begin at ``first``. All of it is the guest's word: an
    index outside is a ``GuestError``, an address outside guest memory a ``MemoryFault``."""

    def __init__(self, registers: dict[int, int], first: int, memory: GuestMemory) -> None:
        self._registers = registers
        self._first = first
        self._memory = memory

    def _get(self, register: int) -> int:
        return self._registers.get(self._first + register, 0)

    @property
    def size(self) -> int:
        return self._get(LENGTH) // abi.DESC_SIZE

    @property
    def head(self) -> int:
        return self._get(HEAD)

    @property
    def address(self) -> int:
        """Of the descriptor at the head."""
        return self._get(BASE_HIGH) << 32 | self._get(BASE_LOW) + abi.DESC_SIZE * self.head

    @property
    def ready(self) -> int:
        """How many descriptors are the card's."""
        size, head, tail = self.size, self.head, self._get(TAIL)
        if not size or head == tail:
            return 0
        if head >= size or tail >= size:
            raise GuestError(
                f"a ring of {size} descriptors with its head at {head}, tail at {tail}"
            )
        return (tail - head) % size

    def read(self) -> bytes:
        return self._memory.read(self.address, abi.DESC_SIZE)

    def advance(self) -> None:
        self._registers[self._first + HEAD] = (self.head + 1) % self.size
