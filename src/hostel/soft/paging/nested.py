"""The second dimension: extended page tables, GPA → HPA (SDM vol. 3C §28.2), as the processor walks them.

::

    bits of an entry   0 R   1 W   2 X   5:3 memory type (a page's)   7 large page
                       8 accessed   9 dirty (a page's; both only with bit 6 of the EPTP)

``EptMemory`` makes guest tables readable by their GPAs through the EPT, so that the walker of the first
dimension (walk.py) can be used as it is: that is what makes a walk two-dimensional.

Execute-only pages are not supported (IA32_VMX_EPT_VPID_CAP bit 0 is 0): an entry that is present and
cannot be read is a misconfiguration.
"""

from __future__ import annotations

from typing import NamedTuple

from hostel.errors import MemoryFault
from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Access, Controls, EptFault, Reason, Secondary

from .tree import LARGE_PAGE, SHIFTS
from .walk import ADDRESS, PHYSICAL_BITS, Step, TableMemory, bits, pointers

READ, WRITE, EXECUTE = 1, 2, 4
RIGHTS = READ | WRITE | EXECUTE
WRITE_BACK = 6 << 3
EPT_ACCESSED, EPT_DIRTY = 1 << 8, 1 << 9
EPTP_FOUR_LEVELS = 3 << 3
EPTP_WRITE_BACK = 6
EPTP_ACCESSED_DIRTY = 1 << 6

LINEAR_VALID, FINAL = 1 << 7, 1 << 8
"""Exit qualification of a violation (SDM vol. 3C table 27-7): there is a linear address; the access was
to what it translates to, as opposed to a guest table entry on the way."""

_ABOVE = bits(51, PHYSICAL_BITS)
_LEVELS = (
    (4, 39, _ABOVE | bits(6, 3)),
    (3, 30, _ABOVE | bits(6, 3)),
    (2, 21, _ABOVE | bits(6, 3)),
    (1, 12, 0),
)
"""Number, shift, and what is reserved in an entry that leads to a table (SDM vol. 3C §28.2.2)."""
_NEEDED = (READ, WRITE, EXECUTE)


class EptPage(NamedTuple):
    address: int
    """HPA."""
    size: int
    rights: int
    dirty: bool
    """It may be written without another walk."""
    steps: tuple[Step, ...]


class EptWalker:
    """Walks one EPT for one access of the guest, and counts the entries it reads."""

    def __init__(self, physical: PhysicalMemory, pointer: int, linear: int) -> None:
        self.physical = physical
        self.root = pointer & ADDRESS
        self.marks = bool(pointer & EPTP_ACCESSED_DIRTY)
        self.linear = linear
        self.references = 0

    def translate(self, gpa: int, access: Access, cause: int) -> EptPage:
        """``cause``: bits 7 and 8 of the qualification, should it be a violation."""
        asked = _NEEDED[access]
        if self.marks and not cause & FINAL:
            asked = READ | WRITE  # entries of guest tables are accessed as by a write (§28.2.3.2)
        steps, rights, size = self._steps(gpa, asked, cause)
        if asked & ~rights:
            raise self._violation(gpa, asked | rights << 3 | cause)
        if self.marks:
            steps = self._mark(steps, bool(asked & WRITE))
        leaf = steps[-1].value
        dirty = not self.marks or bool(leaf & EPT_DIRTY)
        return EptPage(leaf & ADDRESS & -size | gpa & size - 1, size, rights, dirty, tuple(steps))

    def _steps(self, gpa: int, asked: int, cause: int) -> tuple[list[Step], int, int]:
        """The entries down to the page, the rights they leave together, the page's size."""
        table, rights = self.root, RIGHTS
        steps: list[Step] = []
        read = self.physical.read_u64
        for level, shift, reserved in _LEVELS:
            address = table + (gpa >> shift & 511) * 8
            value = read(address)
            self.references += 1
            steps.append(Step(level, address, value))
            if not value & RIGHTS:
                raise self._violation(gpa, asked | cause)
            page = level == 1 or value & LARGE_PAGE
            if not value & READ or (_malformed_page(value, level) if page else value & reserved):
                raise EptFault(Reason.EPT_MISCONFIGURATION, 0, self.linear, gpa)
            rights &= value
            if page:
                return steps, rights, 1 << shift
            table = value & ADDRESS
        raise AssertionError("level 1 always ends a walk")

    def _violation(self, gpa: int, qualification: int) -> EptFault:
        return EptFault(Reason.EPT_VIOLATION, qualification, self.linear, gpa)

    def _mark(self, steps: list[Step], dirty: bool) -> list[Step]:
        marked = []
        for step in steps:
            value = step.value | EPT_ACCESSED
            if dirty and step is steps[-1]:
                value |= EPT_DIRTY
            if value != step.value:
                self.physical.write_u64(step.address, value)
            marked.append(step._replace(value=value))
        return marked


def _malformed_page(value: int, level: int) -> bool:
    """An EPT misconfiguration (SDM vol. 3C §28.2.3.1): a memory type that is none, reserved bits."""
    if level == 4 or value >> 3 & 7 in (2, 3, 7):
        return True
    low = bits(SHIFTS[4 - level] - 1, 12) if level > 1 else 0
    return bool(value & (_ABOVE | low))


class EptMemory:
    """Guest-physical memory as the processor reaches it while it walks guest tables: through the EPT.

    ``cause``: of violations; a load of CR3 reads its table for no linear address."""

    def __init__(self, walker: EptWalker, cause: int = LINEAR_VALID) -> None:
        self._walker = walker
        self._cause = cause
        self._physical = walker.physical
        self.references = 0
        """Guest table entries that were read; those of the EPT are counted by the walker."""

    def _at(self, gpa: int, access: Access) -> int:
        return self._walker.translate(gpa, access, self._cause).address

    def read_u32(self, gpa: int) -> int:
        self.references += 1
        return self._physical.read_u32(self._at(gpa, Access.READ))

    def read_u64(self, gpa: int) -> int:
        self.references += 1
        return self._physical.read_u64(self._at(gpa, Access.READ))

    def write_u32(self, gpa: int, value: int) -> None:
        self._physical.write_u32(self._at(gpa, Access.WRITE), value)

    def write_u64(self, gpa: int, value: int) -> None:
        self._physical.write_u64(self._at(gpa, Access.WRITE), value)


def pointers_of(physical: PhysicalMemory, controls: Controls, cr3: int) -> list[int]:
    """What ``silicon.Mmu.pointers`` gives; nothing is there: all ones."""
    memory: TableMemory = physical
    if controls.secondary & Secondary.EPT:
        memory = EptMemory(EptWalker(physical, controls.ept_pointer, 0), cause=0)
    try:
        return pointers(memory, cr3)
    except MemoryFault:
        return [2**64 - 1] * 4
