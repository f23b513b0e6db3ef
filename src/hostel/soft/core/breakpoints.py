"""Hardware breakpoints: DR0 to DR3 under DR7 (SDM vol. 3B §17.2).

While one is armed each instruction is looked at before it runs, as with a tight code segment
(``segments.py``): exact, and slow. On an instruction it is a fault, before it and unless RFLAGS.RF is set;
on data a trap, behind it. Breakpoints on ports (CR4.DE) are not armed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hostel.soft.state import DR6_ONES, CpuState

ENABLED, DETECT = 0xFF, 1 << 13
"""Of DR7: any of the four; general detect, and DR6.BD."""
_LENGTHS = (1, 2, 8, 4)
_FETCH, _WRITE, _EITHER = 0, 1, 3


class Touched(NamedTuple):
    """Linear memory that an instruction reaches."""

    address: int
    size: int
    writes: bool


def fetched(state: CpuState, linear: int) -> int:
    """The bits of DR6 for an instruction here."""
    return sum(
        1 << number
        for number, kind, _ in _armed(state)
        if kind == _FETCH and state.dr[number] == linear
    )


def touched(state: CpuState, memory: Iterable[Touched]) -> int:
    """The same for data."""
    places, hits = list(memory), 0
    for number, kind, length in _armed(state):
        start = state.dr[number] & -length
        for address, size, writes in places:
            wanted = kind == _EITHER or (kind == _WRITE and writes)
            if wanted and address < start + length and start < address + size:
                hits |= 1 << number
    return hits


def _armed(state: CpuState) -> list[tuple[int, int, int]]:
    """Number, kind, length of those that DR7 enables, locally or globally."""
    dr7 = state.dr7
    return [
        (number, dr7 >> 16 + 4 * number & 3, _LENGTHS[dr7 >> 18 + 4 * number & 3])
        for number in range(4)
        if dr7 >> 2 * number & 3
    ]


def load_debug(state: CpuState, number: int, value: int) -> None:
    """MOV DR, its value checked: what is reserved stays as it is (SDM vol. 3B §17.2)."""
    if number < 4:
        state.dr[number] = value
    elif number == 6:
        state.dr6 = value & 0xE00F | DR6_ONES
    else:
        state.dr7 = value & 0xFFFF_2FFF | 0x400
