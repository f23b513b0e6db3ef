"""Code and stores between the cores of one machine: what one writes, another must not go on executing.

Each core keeps blocks translated from frames of memory. A store is seen by the core that makes it, and by no
other. So a frame is either code for some cores, or writable for some without being asked, as with lines of a
cache: who is granted the one takes the other away from everybody else.

All cores on one ``PhysicalMemory`` take part. They run one at a time (``silicon.py``).
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from hostel.soft.physical import PhysicalMemory


class Party(Protocol):
    """One core, as the others see it."""

    @property
    def code_frames(self) -> set[int]: ...

    def drop_blocks(self, hpa: int, size: int) -> None:
        """Those translated from these bytes."""

    def lose_code(self, frame: int) -> None:
        """Nothing translated from it may run on, and it has to be asked for again."""

    def lose_writable(self, frame: int) -> None:
        """The next store has to ask."""


_parties: WeakKeyDictionary[PhysicalMemory, WeakSet[Party]] = WeakKeyDictionary()


class Coherence:
    """What one core, ``party``, tells the others and asks of them."""

    def __init__(self, physical: PhysicalMemory, party: Party) -> None:
        self._all = _parties.setdefault(physical, WeakSet())
        self._all.add(party)
        self._party = party

    def leave(self) -> None:
        self._all.discard(self._party)

    def __contains__(self, frame: int) -> bool:
        """Is it code for anybody?"""
        return any(frame in party.code_frames for party in self._all)

    def fetching(self, frame: int) -> None:
        """It becomes code here: nobody writes to it unasked."""
        for party in self._all:
            party.lose_writable(frame)

    def writing(self, frame: int) -> None:
        """Stores to it will not be seen by the others."""
        for party in self._all:
            if party is not self._party and frame in party.code_frames:
                party.lose_code(frame)

    def wrote(self, hpa: int, size: int) -> None:
        """It was written from outside of all cores, or by Python for one of them."""
        for party in self._all:
            party.drop_blocks(hpa, size)
