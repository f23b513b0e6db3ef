"""What the handler of a sensitive instruction says came of it, and the exits that many of them share."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from hostel.soft.exceptions import GP
from hostel.soft.silicon import Reason, VmExit
from hostel.soft.state import CpuState

from .events import Fault

if TYPE_CHECKING:
    from iced_x86 import Instruction


class Outcome(Enum):
    DONE = auto()
    """Executed: go on behind it."""
    JUMPED = auto()
    """Executed, and RIP is set."""
    NATIVE = auto()
    """Let the core run it as it stands."""
    IMPLICIT = auto()
    """The same; its reads of descriptor tables are a supervisor's in any ring (SDM vol. 3A §4.6)."""


Result = Outcome | VmExit


def leave(
    reason: Reason,
    instruction: Instruction,
    qualification: int = 0,
    *,
    linear: int = 0,
    info: int = 0,
) -> VmExit:
    return VmExit(
        reason,
        qualification,
        length=instruction.len,
        linear=linear,
        instruction_info=info,
    )


def need_ring0(state: CpuState) -> None:
    """Faults of privilege come before VM exits (SDM vol. 3C §25.1.1)."""
    if state.cpl:
        raise Fault(GP, 0)
