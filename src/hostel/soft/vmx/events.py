"""What can be seen of a physical processor's VMX operation: its mode, a trace, and statistics."""

from __future__ import annotations

from collections import Counter
from enum import Enum

import msgspec

from hostel.soft.silicon import Reason


class Mode(Enum):
    OFF = "off"
    """Outside VMX operation."""
    ROOT = "root"
    NON_ROOT = "non-root"


class TraceEvent(msgspec.Struct, frozen=True):
    """An instruction of the hypervisor's, or (``what`` is "VM exit") the end of non-root mode."""

    time: int
    """The TSC when it was done."""
    pcpu: int
    mode: Mode
    """In which it began."""
    what: str
    operands: tuple[int, ...] = ()
    result: str = ""


class VmxStatistics(msgspec.Struct):
    """Counted since the processor was made."""

    instructions: int = 0
    """VMX instructions, and RDMSR and WRMSR, in root mode."""
    entries: int = 0
    failures: int = 0
    """Instructions that ended in VMfail."""
    exits: Counter[Reason] = msgspec.field(default_factory=Counter)
    guest_time: int = 0
    """Guest instructions: time in non-root mode."""
