"""The walker of ordinary page tables: 32-bit, PAE and 4-level (SDM vol. 3A ch. 4), step by step.

::

    linear address ──┬─ CR3 → PML4E → PDPTE → PDE → PTE → physical address      4-level
                     ├─       CR3 → PDPTE → PDE → PTE                           PAE
                     └─               CR3 → PDE → PTE                           32-bit

One walker for all who walk: the processor (physical memory, or guest memory behind EPT), the
hypervisor's software, the tests' reference. It differs by the ``TableMemory`` it is given only.

- ``walk`` reads and changes nothing; ``mark`` sets accessed and dirty bits, once the access is sure to
  succeed: from the top down, the dirty bit last and by a write only. A walk that faults leaves no mark
  (SDM vol. 3A §4.8 lets a processor do so, and not do so).
- A PAE guest's four PDPTEs are read as part of each walk, as AMD has it under nested paging (APM vol. 2
  §15.25.10); Intel keeps what it read when CR3 was loaded (SDM vol. 3A §4.4.1). ``pointers`` reads them for
  the checks that come with that load.
- Which physical address bits there are is ``PHYSICAL_BITS``; those above are reserved.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from hostel.soft.silicon import Access, PageFault
from hostel.soft.state import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    RFLAGS_AC,
    CpuState,
)

PHYSICAL_BITS = 40
"""MAXPHYADDR, CPUID 0x80000008: what unicorn's own walker takes for it too."""

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, GLOBAL = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NO_EXECUTE = 1 << 63

ERROR_PRESENT, ERROR_WRITE, ERROR_USER, ERROR_RESERVED, ERROR_FETCH = 1, 2, 4, 8, 16
"""Of #PF's error code (SDM vol. 3A §4.7)."""


def bits(high: int, low: int) -> int:
    """A mask, written as the manuals do: bits high:low."""
    return (1 << high + 1) - (1 << low)


ADDRESS = bits(PHYSICAL_BITS - 1, 12)
_ABOVE = bits(51, PHYSICAL_BITS)


class TableMemory(Protocol):
    """Where the tables are."""

    def read_u32(self, address: int, /) -> int: ...
    def read_u64(self, address: int, /) -> int: ...
    def write_u32(self, address: int, value: int, /) -> None: ...
    def write_u64(self, address: int, value: int, /) -> None: ...


class ControlRegisters(Protocol):
    """A ``CpuState``, or ``Registers``."""

    @property
    def cr0(self) -> int: ...
    @property
    def cr3(self) -> int: ...
    @property
    def cr4(self) -> int: ...
    @property
    def efer(self) -> int: ...


class Asked(NamedTuple):
    """An access, as far as rights go."""

    access: Access
    user: bool
    """By CPL 3, and not an implicit one (to a GDT, an IDT, a TSS)."""
    override: bool = False
    """A supervisor's that SMAP lets pass: see ``asked``."""


class Level(NamedTuple):
    """One level of tables in one paging mode."""

    number: int
    """1 holds PTEs, 2 PDEs, 3 PDPTEs, 4 PML4Es."""
    shift: int
    """An entry maps ``1 << shift`` bytes."""
    mask: int
    """Of the index."""
    reserved: int
    """Bits that must be 0 in an entry that leads to a table, or in a PTE."""
    large_reserved: int | None = None
    """The same for an entry that maps a large page; None: this level has none."""
    plain: bool = False
    """A PAE PDPTE: it has no rights and no accessed bit."""


class Format(NamedTuple):
    name: str
    entry: int
    """Bytes of an entry."""
    root: int
    """Which bits of CR3 are the address of the top table."""
    levels: tuple[Level, ...]


LONG = Format(
    "4-level",
    8,
    ADDRESS,
    (  # SDM vol. 3A tables 4-15 to 4-20
        Level(4, 39, 511, _ABOVE | LARGE),
        Level(3, 30, 511, _ABOVE, _ABOVE | bits(29, 13)),
        Level(2, 21, 511, _ABOVE, _ABOVE | bits(20, 13)),
        Level(1, 12, 511, _ABOVE),
    ),
)
_PAE_ABOVE = bits(62, PHYSICAL_BITS)
PDPTE_RESERVED = bits(63, PHYSICAL_BITS) | bits(8, 5) | bits(2, 1)
"""Of one that is present (table 4-8)."""
PAE = Format(
    "PAE",
    8,
    bits(31, 5),
    (  # tables 4-8 to 4-11
        Level(3, 30, 3, PDPTE_RESERVED, plain=True),
        Level(2, 21, 511, _PAE_ABOVE, _PAE_ABOVE | bits(20, 13)),
        Level(1, 12, 511, _PAE_ABOVE),
    ),
)
_LEGACY_PTE = Level(1, 12, 1023, 0)
LEGACY = Format("32-bit", 4, bits(31, 12), (Level(2, 22, 1023, 0), _LEGACY_PTE))
LEGACY_PSE = Format(
    "32-bit, PSE",
    4,
    bits(31, 12),
    (Level(2, 22, 1023, 0, 1 << 21), _LEGACY_PTE),  # table 4-4, with PSE-36
)


class Step(NamedTuple):
    """A table entry that was read."""

    level: int
    address: int
    value: int


class Walk(NamedTuple):
    """Where a linear address leads, with the rights that all levels together leave."""

    address: int
    """The physical address: a GPA, or an HPA in a 1-D walk."""
    size: int
    """Of the page."""
    writable: bool
    user: bool
    executable: bool
    is_global: bool
    dirty: bool
    format: Format | None
    """None: paging is off."""
    steps: tuple[Step, ...]


def pointers(memory: TableMemory, cr3: int) -> list[int]:
    """PAE's four PDPTEs (SDM vol. 3A §4.4.1)."""
    return [memory.read_u64((cr3 & PAE.root) + 8 * number) for number in range(4)]


def format_of(registers: ControlRegisters) -> Format | None:
    """The paging mode (SDM vol. 3A §4.1.1); None is paging off."""
    if not registers.cr0 & CR0_PG:
        return None
    if registers.efer & EFER_LMA:
        return LONG
    if registers.cr4 & CR4_PAE:
        return PAE
    return LEGACY_PSE if registers.cr4 & CR4_PSE else LEGACY


def asked(state: CpuState, access: Access, user: bool) -> Asked:
    """RFLAGS.AC lets a supervisor access pass SMAP, if it is an explicit one (SDM vol. 3A §4.6.1)."""
    return Asked(access, user, bool(state.rflags & RFLAGS_AC) and not user and state.cpl < 3)


def permits(page: Walk, registers: ControlRegisters, asked: Asked) -> bool:
    """Access rights (SDM vol. 3A §4.6.1)."""
    access = asked.access
    if page.format is None:
        return True
    if asked.user:
        if not page.user:
            return False
        return (True, page.writable, page.executable)[access]
    if access is Access.FETCH:
        return page.executable and not (page.user and registers.cr4 & CR4_SMEP)
    if page.user and registers.cr4 & CR4_SMAP and not asked.override:
        return False
    return access is Access.READ or page.writable or not registers.cr0 & CR0_WP


def error_code(registers: ControlRegisters, asked: Asked, why: int) -> int:
    """``why``: 0 not present, ERROR_PRESENT rights, both ERROR_PRESENT and ERROR_RESERVED."""
    code = why | asked.user << 2
    if asked.access is Access.WRITE:
        code |= ERROR_WRITE
    elif asked.access is Access.FETCH:
        no_execute = registers.cr4 & CR4_PAE and registers.efer & EFER_NXE
        if no_execute or registers.cr4 & CR4_SMEP:
            code |= ERROR_FETCH
    return code


def walk(memory: TableMemory, registers: ControlRegisters, address: int, asked: Asked) -> Walk:
    """Translate, or raise ``PageFault``."""
    page = look_up(memory, registers, address)
    if isinstance(page, Walk) and permits(page, registers, asked):
        return page
    why = ERROR_PRESENT if isinstance(page, Walk) else page.why
    raise PageFault(address, error_code(registers, asked, why))


class Missing(NamedTuple):
    """A walk that led nowhere."""

    why: int
    """As ``error_code`` has it."""
    steps: tuple[Step, ...]


def look_up(memory: TableMemory, registers: ControlRegisters, address: int) -> Walk | Missing:
    """The walk alone, whoever asks: entries until a page, or one that is not present or malformed."""
    format = format_of(registers)
    if format is None:
        return Walk(address & 0xFFFF_FFFF, 4096, True, True, True, False, True, None, ())
    read = memory.read_u64 if format.entry == 8 else memory.read_u32
    unusable = 0 if registers.efer & EFER_NXE or format.entry == 4 else NO_EXECUTE
    table = registers.cr3 & format.root
    rights = WRITABLE | USER
    steps: list[Step] = []
    for level in format.levels:
        at = table + (address >> level.shift & level.mask) * format.entry
        value = read(at)
        steps.append(Step(level.number, at, value))
        if not value & PRESENT:
            return Missing(0, tuple(steps))
        large = level.large_reserved is not None and value & LARGE
        reserved = level.large_reserved if large else level.reserved
        if value & ((reserved or 0) | unusable):
            return Missing(ERROR_PRESENT | ERROR_RESERVED, tuple(steps))
        if not level.plain:
            rights = rights & (value | NO_EXECUTE) | value & NO_EXECUTE
        if large or level.number == 1:
            return _page(format, level, address, rights, tuple(steps))
        table = value & ADDRESS
    raise AssertionError("level 1 always ends a walk")


def _page(format: Format, level: Level, address: int, rights: int, steps: tuple[Step, ...]) -> Walk:
    size, value = 1 << level.shift, steps[-1].value
    base = value & ADDRESS & -size
    if format.entry == 4 and level.number == 2:
        base = value & bits(31, 22) | (value & bits(20, 13)) << 19  # PSE-36: bits 39:32 (table 4-4)
    return Walk(
        base | address & size - 1,
        size,
        bool(rights & WRITABLE),
        bool(rights & USER),
        not rights & NO_EXECUTE,
        bool(value & GLOBAL),
        bool(value & DIRTY),
        format,
        steps,
    )


def mark(memory: TableMemory, page: Walk, access: Access) -> Walk:
    """Set the accessed bits, and the dirty bit for a write; the walk with its entries as they are now."""
    if page.format is None:
        return page
    write = memory.write_u64 if page.format.entry == 8 else memory.write_u32
    steps = list(page.steps)
    last = len(steps) - 1
    for at, (step, level) in enumerate(zip(page.steps, page.format.levels, strict=False)):
        value = step.value if level.plain else step.value | ACCESSED
        if at == last and access is Access.WRITE:
            value |= DIRTY
        if value != step.value:
            write(step.address, value)
            steps[at] = Step(step.level, step.address, value)
    dirty = page.dirty or access is Access.WRITE
    return page._replace(steps=tuple(steps), dirty=dirty)
