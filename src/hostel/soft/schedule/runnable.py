"""What the scheduler needs of a vCPU, and what it says of it."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import msgspec

from hostel.soft.pcpu import PhysicalCpu


class Stop(Enum):
    """Why a vCPU gave its pCPU back."""

    SLICE = "slice over"
    HALTED = "halted"
    """HLT: until an interrupt; ``idle`` tells."""
    BLOCKED = "blocked"
    """It waits for the monitor or a device; ``idle`` tells."""
    ENDED = "ended"
    """It never runs again."""


class Runnable(Protocol):
    """A vCPU. Its time is that of the pCPU it runs on: ``pcpu.tsc``."""

    @property
    def name(self) -> str:
        """Machine and number: "web/0". Nobody else has it."""

    def run(self, pcpu: PhysicalCpu, budget: int) -> Stop:
        """Run on this pCPU until its TSC has moved by ``budget`` (some instructions more are no harm), or
        until there is nothing to run.

        The vCPU makes its VMCS current if it is not, and enters with the preemption timer set to what is
        left of the budget. On a pCPU where it was not the last time, what that pCPU's TLB still holds under
        its VPID is out of date: INVVPID first (SDM vol. 3C §28.3.3.3).
        """

    def unload(self) -> None:
        """VMCLEAR on the pCPU where its VMCS is active, if it is anywhere: it will be run on another."""

    @property
    def idle(self) -> bool:
        """Halted or blocked, and nothing has come to wake it."""

    def wakes_at(self) -> int | None:
        """When (TSC) a timer of its own will wake it, if nothing else does before."""


class Slice(msgspec.Struct, frozen=True):
    """One line of the timeline: this vCPU had this pCPU from ``start`` to ``end``."""

    pcpu: int
    start: int
    end: int
    vcpu: str
    why: Stop
    """It stopped."""
    came_from: int | None = None
    """The pCPU it was on before, if another."""


class VcpuStatistics(msgspec.Struct):
    ran: int = 0
    """Time on a pCPU."""
    waited: int = 0
    """Time ready, without one."""
    slices: int = 0
    migrations: int = 0
    wakes: int = 0


class PcpuStatistics(msgspec.Struct):
    busy: int = 0
    idle: int = 0
    slices: int = 0
    switches: int = 0
    """Slices of another vCPU than the one before."""
