"""The memory map that a kernel is handed: what is RAM, and what it must leave alone.

::

    0 ─────────────── EBDA_START   RAM; the boot data lie here, and a kernel knows which of them
    EBDA_START ─────── 640 KiB     reserved, as on every PC
    ACPI_ADDRESS ── + ACPI_SIZE    the ACPI tables
    1 MiB ──────────── low end     RAM
    ECAM                           reserved: Linux believes in MCFG only if the map says so too
    4 GiB ───────────── high end   RAM
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hostel.abi.boot import E820_ACPI, E820_RAM, E820_RESERVED
from hostel.errors import SpecError
from hostel.memory import Region
from hostel.vmm import layout

_EBDA_END = 0xA_0000


class E820(msgspec.Struct, frozen=True):
    addr: int
    size: int
    type: int

    @property
    def end(self) -> int:
        return self.addr + self.size


def memory_map(regions: Sequence[Region]) -> tuple[E820, ...]:
    """Sorted and without overlaps."""
    low, *high = regions
    if low.gpa != 0 or low.size <= layout.KERNEL_ADDRESS:
        raise SpecError("a machine needs more than 1 MiB of memory to boot a kernel")
    return (
        _span(0, layout.EBDA_START, E820_RAM),
        _span(layout.EBDA_START, _EBDA_END, E820_RESERVED),
        E820(layout.ACPI_ADDRESS, layout.ACPI_SIZE, E820_ACPI),
        _span(layout.KERNEL_ADDRESS, low.size, E820_RAM),
        E820(layout.ECAM_START, layout.ECAM_SIZE, E820_RESERVED),
        *(E820(region.gpa, region.size, E820_RAM) for region in high),
    )


def _span(start: int, end: int, type: int) -> E820:
    return E820(start, end - start, type)
