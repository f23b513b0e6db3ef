"""A vCPU of the software hypervisor as the scheduler runs it, with a monitor that answers at once."""

from __future__ import annotations

from collections.abc import Callable

from hostel.hypervisor import Exit
from hostel.soft.hypervisor.vcpu import SoftVcpu
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.schedule.runnable import Stop

Answer = Callable[[Exit], bool]
"""The monitor's: does what the exit asks for. True: the guest has ended."""


class ScheduledVcpu:
    """Implements ``Runnable``."""

    def __init__(self, name: str, vcpu: SoftVcpu, answer: Answer) -> None:
        self.name = name
        self.vcpu = vcpu
        self._answer = answer

    def run(self, pcpu: PhysicalCpu, budget: int) -> Stop:
        end = pcpu.tsc + budget
        while (left := end - pcpu.tsc) > 0:
            exit = self.vcpu.run(pcpu, left)
            if exit is None:
                break  # its time is over, or it spins and waits for another
            if self._answer(exit):
                return Stop.ENDED
        return Stop.HALTED if self.vcpu.idle else Stop.SLICE

    def unload(self) -> None:
        self.vcpu.unload()

    @property
    def idle(self) -> bool:
        return self.vcpu.idle

    def wakes_at(self) -> int | None:
        """When the next timer of its machine is due: the PIT's, or a LAPIC's."""
        return self.vcpu.machine.irqchip.deadline
