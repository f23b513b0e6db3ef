"""A VMCS: the region in its frame, and what the processor remembers of it while it is active.

All data is in the frame's bytes. Beside them a processor may cache, and ours does: which areas it has
found right since they were last written, and the execution controls as its core takes them. VMWRITE
drops what it touches; VMCLEAR and VMPTRLD drop all.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from hostel.errors import MemoryFault
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import Controls, Primary
from hostel.soft.vmx.fields import (
    ACCESS,
    EXIT_AREA,
    EXIT_AT,
    GUEST_AREA,
    GUEST_AT,
    HOST_AREA,
    HOST_AT,
    PLACE,
    SEGMENTS,
    Field,
    Kind,
)
from hostel.soft.vmx.results import AbortCause

CLEAR, LAUNCHED = 0, 1
"""Launch states (SDM vol. 3C §24.1)."""

_U32 = Struct("<I")
_U64 = Struct("<Q")
_ABORT, _LAUNCH, _OPERATION = 4, 8, 12

CONTROLS_CHANGED, GUEST_CHANGED, HOST_CHANGED, SEGMENTS_CHANGED, UNCHECKED = (
    1 << n for n in range(5)
)
"""What a VMWRITE touched, as the next entry's checks see it. ``UNCHECKED``: nothing they look at."""
ALL_CHANGED = 15

CHECKED_EACH_TIME = {
    Field.GUEST_RIP,
    Field.PREEMPTION_TIMER,
    Field.ENTRY_INTERRUPTION_INFO,
    Field.ENTRY_EXCEPTION_ERROR,
    Field.ENTRY_INSTRUCTION_LENGTH,
}
"""What a hypervisor writes before many an entry: checked at every one, so that the rest need not be."""
NEVER_CHECKED = {
    *(Field.GUEST_RSP, Field.GUEST_SMBASE, Field.GUEST_SYSENTER_CS),
    *(Field.EXCEPTION_BITMAP, Field.PAGE_FAULT_MASK, Field.PAGE_FAULT_MATCH, Field.TSC_OFFSET),
    *(Field.CR0_MASK, Field.CR0_SHADOW, Field.CR4_MASK, Field.CR4_SHADOW),
    *(field for field in Field if field.name.startswith("CR3_TARGET") and field.width == 3),
}
"""Fields that may hold anything (§26.2, §26.3)."""


def _touched(field: Field) -> int:
    if field in CHECKED_EACH_TIME or field in NEVER_CHECKED:
        return UNCHECKED
    if field.kind is Kind.GUEST:
        segment = field.name.split("_")[1].lower() in SEGMENTS
        return SEGMENTS_CHANGED if segment else GUEST_CHANGED
    return {Kind.CONTROL: CONTROLS_CHANGED, Kind.HOST: HOST_CHANGED, Kind.EXIT: UNCHECKED}[
        field.kind
    ]


TOUCHED = {encoding: _touched(Field(encoding & ~1)) for encoding in ACCESS}
_DECODED = frozenset(
    encoding
    for encoding in ACCESS
    if encoding >> 10 & 3 == Kind.CONTROL and encoding & ~1 not in CHECKED_EACH_TIME
)


class Decoded(msgspec.Struct):
    """The control fields, as entries and exits use them."""

    controls: Controls
    """As a core takes them: it always adds an offset to its own count of instructions."""
    entry: int
    leave: int
    """The VM-exit controls."""
    tsc_offset: int
    """0 unless "use TSC offsetting" is set."""
    entry_load: tuple[int, int]
    """An MSR area: address, count."""
    exit_store: tuple[int, int]
    exit_load: tuple[int, int]


class Vmcs:
    """Not a value: one object a region, as long as some pCPU may have it active."""

    __slots__ = ("changed", "checked_as", "decoded", "guest", "hpa", "owner", "view")

    def __init__(self, hpa: int, view: memoryview) -> None:
        self.hpa = hpa
        self.view = view
        self.owner: int | None = None
        """The pCPU it is active on."""
        self.changed = ALL_CHANGED
        """Written since an entry found it right."""
        self.checked_as: tuple[int, ...] = ()
        """What the rules for the guest's state depended on when it was found right."""
        self.decoded: Decoded | None = None
        self.guest: tuple[int, ...] = ()
        """The guest-state area as it was entered."""

    def forget(self) -> None:
        """Keep nothing: the bytes may be changed by anyone."""
        self.changed = ALL_CHANGED
        self.decoded = None

    # --- Header ---

    @property
    def revision(self) -> int:
        value: int = _U32.unpack_from(self.view, 0)[0]
        return value

    @property
    def launch_state(self) -> int:
        value: int = _U32.unpack_from(self.view, _LAUNCH)[0]
        return value

    @property
    def launched_by(self) -> int:
        """Which VMX operation of its pCPU (they are counted) launched it."""
        value: int = _U32.unpack_from(self.view, _OPERATION)[0]
        return value

    def set_clear(self) -> None:
        _U32.pack_into(self.view, _LAUNCH, CLEAR)

    def set_launched(self, operation: int) -> None:
        _U32.pack_into(self.view, _LAUNCH, LAUNCHED)
        _U32.pack_into(self.view, _OPERATION, operation)

    def set_abort(self, cause: AbortCause) -> None:
        _U32.pack_into(self.view, _ABORT, cause)

    def set_instruction_error(self, number: int) -> None:
        _U64.pack_into(self.view, PLACE[Field.INSTRUCTION_ERROR], number)

    # --- Fields ---

    def read(self, encoding: int) -> int:
        """A field that exists (``ACCESS``): the processor's own reading, nothing is checked."""
        place, mask, shift = ACCESS[encoding]
        value: int = _U64.unpack_from(self.view, place)[0]
        return value >> shift & mask

    def write(self, encoding: int, value: int) -> None:
        """All 64 bits of a 64-bit field at once, or only its high half."""
        place, mask, _ = ACCESS[encoding]
        old: int = _U64.unpack_from(self.view, place)[0]
        new = old & 0xFFFF_FFFF | (value & mask) << 32 if encoding & 1 else value & mask
        if new == old:
            return
        _U64.pack_into(self.view, place, new)
        if encoding == Field.PRIMARY_CONTROLS and old ^ new == Primary.INTERRUPT_WINDOW:
            self._turn_window()
            return
        self.changed |= TOUCHED[encoding]
        if encoding in _DECODED:
            self.decoded = None

    def _turn_window(self) -> None:
        """The control that hypervisors turn on and off all the time, and that no check looks at."""
        if self.decoded is not None:
            self.decoded.controls.primary ^= Primary.INTERRUPT_WINDOW

    # --- Areas, in the order of fields.py ---

    def guest_area(self) -> tuple[int, ...]:
        return GUEST_AREA.unpack_from(self.view, GUEST_AT)

    def host_area(self) -> tuple[int, ...]:
        return HOST_AREA.unpack_from(self.view, HOST_AT)

    def save_guest_area(self, values: tuple[int, ...]) -> None:
        GUEST_AREA.pack_into(self.view, GUEST_AT, *values)

    def save_exit_area(self, values: tuple[int, ...]) -> None:
        EXIT_AREA.pack_into(self.view, EXIT_AT, *values)


def region(memory: PhysicalMemory, hpa: int) -> memoryview | None:
    """The frame at ``hpa``; None where there is no memory: reads there give all ones, writes are lost."""
    try:
        return memory.view(hpa, PAGE)
    except MemoryFault:
        return None
