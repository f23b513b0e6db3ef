"""A physical machine in software with mini guests on it, run step by step: where the labs play.

::

    Stage ── Host, its pCPUs in VMX operation, every VMX instruction written down
      └─ Actor ── a mini guest: its memory, its machine, its vCPUs, what it said

Deterministic: one thread, and time is counted in guest instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from hostel.boot.entry import initial_regs, initial_sregs
from hostel.boot.load import load_kernel
from hostel.errors import GuestError
from hostel.hypervisor import Exit
from hostel.memory import GuestMemory
from hostel.soft import mini, registers
from hostel.soft.cpuid import supported
from hostel.soft.hypervisor.host import Host
from hostel.soft.hypervisor.machine import SoftMachine
from hostel.soft.hypervisor.vcpu import SoftVcpu
from hostel.soft.mini.surroundings import ENDINGS, Surroundings
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.vmx.events import TraceEvent
from hostel.spec import Paging, Trap

SLICE = 100_000
"""Guest instructions of a vCPU until the next one has its turn, where nothing else is said."""

Answer = Callable[[Exit], bool]
"""A device of the lab's own: whether it took the exit."""


class Stage:
    """A context manager."""

    def __init__(self, pcpus: int = 1, *, trap: Trap = "translate", traced: bool = False) -> None:
        self._undo = ExitStack()
        self.host = self._undo.enter_context(Host(pcpus, trap=trap))
        self.trace: list[TraceEvent] = []
        if traced:
            for pcpu in self.host.pcpus:
                self._restart(pcpu)

    def _restart(self, pcpu: PhysicalCpu) -> None:
        """From the beginning, so that VMXON is in the trace."""
        region = pcpu.vmxon_pointer
        assert region is not None
        pcpu.vmxoff()
        pcpu.tsc = 0
        pcpu.trace = self.trace.append
        pcpu.vmxon(region)

    def actor(self, name: str, paging: Paging = "ept", **parameters: int) -> Actor:
        actor = Actor(self, name, paging, parameters)
        self._undo.callback(actor.close)
        return actor

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()


class Actor:
    """Made by ``Stage.actor``."""

    def __init__(self, stage: Stage, name: str, paging: Paging, parameters: dict[str, int]) -> None:
        self.guest = mini.guest(name, **parameters)
        self._surroundings = Surroundings()
        self.ended = ""
        """How: ``exit``, ``halt``, ``shutdown``; empty while it runs."""
        self.answers: list[Answer] = []
        self._stage = stage
        image = mini.image(name, **parameters)  # before there is anything to be closed
        self.memory = GuestMemory(self.guest.memory)
        self.machine = SoftMachine(stage.host, paging=paging)
        self.machine.has_chips = self.guest.irqchip
        for slot, region in enumerate(self.memory.regions):
            self.machine.map(slot, region)
        self.vcpus = [self.machine.add_vcpu(id) for id in range(self.guest.cpus)]
        for vcpu in self.vcpus:
            vcpu.cpuid = type(vcpu.cpuid)(supported())
        self._start(image)

    def _start(self, image: Path) -> None:
        entry = load_kernel(self.memory, image)
        first = self.vcpus[0]
        first.load(self._stage.host.pcpus[0])
        state = first.export_state()
        registers.set_sregs(state, initial_sregs(entry, registers.sregs(state, first.lapic.base)))
        registers.set_regs(state, initial_regs(entry))
        first.import_state(state)

    # --- Running ---

    def step(self, vcpu: SoftVcpu, pcpu: PhysicalCpu, budget: int = SLICE) -> None:
        """For so many guest instructions at most, or to its first exit that is for the monitor."""
        exit = vcpu.run(pcpu, budget)
        if exit is not None:
            self.answer(exit)

    def play(self, limit: int = 50_000_000) -> None:
        """To its end, its vCPUs in turn on the first pCPU."""
        pcpu = self._stage.host.pcpus[0]
        end = pcpu.tsc + limit
        while not self.ended:
            if pcpu.tsc > end:
                raise GuestError(f"the mini guest {self.guest.name} does not end")
            busy = [vcpu for vcpu in self.vcpus if not vcpu.idle]
            for vcpu in busy:
                if not self.ended:
                    self.step(vcpu, pcpu)
            if not busy:
                self._wait(pcpu)
        if self.ended != self.guest.ends:
            raise GuestError(
                f"the mini guest {self.guest.name} ended by {self.ended}, not by {self.guest.ends}",
                cost="what was counted is worth nothing",
            )

    def _wait(self, pcpu: PhysicalCpu) -> None:
        """All halt: time passes to the next timer, or it is the end."""
        deadline = self.machine.irqchip.deadline
        if deadline is None:
            self.ended = "halt"
        else:
            pcpu.tsc = max(pcpu.tsc, deadline)
            self.machine.tick(pcpu.tsc)

    def answer(self, exit: Exit) -> None:
        """As the monitor would: the console, the debug exit; nobody else is there."""
        if any(answer(exit) for answer in self.answers):
            return
        if ended := self._surroundings.answer(exit):
            if ended not in ENDINGS:
                raise GuestError(f"the mini guest {self.guest.name} ended with {exit}")
            self.ended = ended

    def has_ended_by(self, exit: Exit) -> bool:
        """``answer``, for a scheduler."""
        self.answer(exit)
        return bool(self.ended)

    @property
    def words(self) -> str:
        return self._surroundings.words

    def close(self) -> None:
        self.machine.close()
        self.memory.close()
