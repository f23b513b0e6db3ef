"""Mini guests: small kernels of our own, the same on every hypervisor.

::

    image("churn", pages=64) -> Path      an ELF file with a PVH note, or a boot sector's 512 bytes
    guest("churn").console                what it says, with the parameters of the table
    names()                               the table (guests.py)
    results(memory) -> Results            what it left on its result page

Each says the same on every host, ends by the debug exit, and leaves values and data to be compared: so
one hypervisor is tested by another. Sizes are parameters: small for a test, large for a benchmark.
"""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec

from hostel.errors import SpecError
from hostel.memory import Memory

from .build import built
from .guests import (
    GUESTS,
    LOAD_ADDRESS,
    MOST,
    RESULT_MAGIC,
    RESULT_PAGE,
    SECTOR_ADDRESS,
    Guest,
)

__all__ = [
    "LOAD_ADDRESS",
    "SECTOR_ADDRESS",
    "Guest",
    "Results",
    "guest",
    "image",
    "names",
    "results",
]

_RESULT_HEADER = struct.Struct("<8s3Q")
_MOST_VALUES = 508


class Results(msgspec.Struct, frozen=True):
    values: tuple[int, ...]
    data: bytes
    """The memory that it wants compared, whole."""


def names() -> tuple[str, ...]:
    return tuple(GUESTS)


def guest(name: str, **parameters: int) -> Guest:
    """A row of the table, with these parameters in place of its own."""
    try:
        row = GUESTS[name]
    except KeyError:
        raise SpecError(
            f"there is no mini guest {name!r}", cure=f"one of: {', '.join(GUESTS)}"
        ) from None
    return msgspec.structs.replace(row, parameters=row.parameters | parameters)


def image(name: str, **parameters: int) -> Path:
    """The file, built if need be. Parameters that are not given are those of the table."""
    entry = guest(name)
    for parameter, value in parameters.items():
        _check(entry, parameter, value)
    return built(name, entry.mode, entry.parameters | parameters)


def _check(entry: Guest, parameter: str, value: int) -> None:
    if parameter not in entry.parameters:
        raise SpecError(
            f"mini guest {entry.name} has no parameter {parameter!r}",
            cure=f"one of: {', '.join(entry.parameters) or 'none'}",
        )
    most = entry.most.get(parameter, MOST)
    least = entry.least.get(parameter, 0 if most == 1 else 1)
    if not least <= value <= most:
        raise SpecError(f"{parameter} of mini guest {entry.name} is {least} to {most}, not {value}")


def results(memory: Memory) -> Results:
    """What a guest left behind. Nothing, if it never came so far."""
    magic, count, address, size = _RESULT_HEADER.unpack(memory.read(RESULT_PAGE, 32))
    if magic != RESULT_MAGIC:
        return Results((), b"")
    count = min(count, _MOST_VALUES)
    values = struct.unpack(f"<{count}Q", memory.read(RESULT_PAGE + 32, 8 * count))
    return Results(values, memory.read(address, size))
