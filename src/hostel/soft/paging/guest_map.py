"""The memory map of one machine: which guest-physical addresses are memory, and whose host-physical.

What is in no slot is no memory: devices may be there (MMIO), or nothing. A read of a table entry from
there gives all ones, as on a bus where nobody answers; a write to it, or to read-only memory, is lost.
So a guest that points CR3 or a table at nowhere harms itself only.

Implements ``TableMemory`` (walk.py): guest tables read by their GPAs.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable

import msgspec

from hostel.soft.physical import PAGE, PhysicalMemory


class Slot(msgspec.Struct, frozen=True, order=True):
    """Pages of guest-physical memory and their place in host-physical memory."""

    gpa: int
    size: int
    hpa: int
    read_only: bool = False

    @property
    def end(self) -> int:
        return self.gpa + self.size


class GuestMap:
    def __init__(self, physical: PhysicalMemory) -> None:
        self.physical = physical
        self.slots: list[Slot] = []
        self.on_remove: list[Callable[[Slot], None]] = []
        """Called with each slot taken away: tables that were made from it must forget it."""
        self._starts: list[int] = []

    def add(self, gpa: int, size: int, hpa: int, *, read_only: bool = False) -> Slot:
        slot = Slot(gpa, size, hpa, read_only)
        if size <= 0 or (gpa | size | hpa) % PAGE:
            raise ValueError(f"a slot is made of whole pages: {slot}")
        if any(other.gpa < slot.end and gpa < other.end for other in self.slots):
            raise ValueError(f"{slot} overlaps another")
        insort(self.slots, slot)
        self._starts = [each.gpa for each in self.slots]
        return slot

    def remove(self, gpa: int) -> None:
        """Take away the slot that starts at ``gpa``."""
        slot = self.find(gpa)
        if slot is None or slot.gpa != gpa:
            raise ValueError(f"no slot starts at {gpa:#x}")
        self.slots.remove(slot)
        self._starts = [each.gpa for each in self.slots]
        for tell in self.on_remove:
            tell(slot)

    def find(self, gpa: int) -> Slot | None:
        at = bisect_right(self._starts, gpa) - 1
        if at >= 0:
            slot = self.slots[at]
            if gpa < slot.gpa + slot.size:
                return slot
        return None

    def hpa(self, gpa: int) -> int | None:
        slot = self.find(gpa)
        return None if slot is None else gpa - slot.gpa + slot.hpa

    # --- TableMemory ---

    def read_u32(self, gpa: int) -> int:
        hpa = self.hpa(gpa)
        return 0xFFFF_FFFF if hpa is None else self.physical.read_u32(hpa)

    def read_u64(self, gpa: int) -> int:
        hpa = self.hpa(gpa)
        return 0xFFFF_FFFF_FFFF_FFFF if hpa is None else self.physical.read_u64(hpa)

    def write_u32(self, gpa: int, value: int) -> None:
        slot = self.find(gpa)
        if slot is not None and not slot.read_only:
            self.physical.write_u32(gpa - slot.gpa + slot.hpa, value)

    def write_u64(self, gpa: int, value: int) -> None:
        slot = self.find(gpa)
        if slot is not None and not slot.read_only:
            self.physical.write_u64(gpa - slot.gpa + slot.hpa, value)
