"""Mini guests on a host of the software hypervisor with several pCPUs, run by the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

from hostel.abi import kvm as abi
from hostel.boot.load import load_kernel
from hostel.hypervisor import Exit, Vcpu
from hostel.memory import GuestMemory
from hostel.soft import cpuid, mini, registers
from hostel.soft.cpuid import Cpuid
from hostel.soft.hypervisor.host import Host
from hostel.soft.hypervisor.machine import SoftMachine
from hostel.soft.hypervisor.vcpu import SoftVcpu
from hostel.soft.mini.surroundings import Surroundings
from hostel.soft.pcpu import PhysicalCpu
from hostel.soft.schedule.scheduler import Scheduler
from hostel.soft.schedule.vcpu import ScheduledVcpu
from hostel.spec import Paging, Trap
from hostel.vmm.irq import pin_routes


class FirstState:
    """The registers of a vCPU before it runs, for ``EntryState.apply``."""

    def __init__(self, vcpu: SoftVcpu, pcpu: PhysicalCpu) -> None:
        self.vcpu = vcpu
        vcpu.load(pcpu)

    def get_sregs(self) -> abi.Sregs:
        return registers.sregs(self.vcpu.export_state(), self.vcpu.lapic.base)

    def set_sregs(self, sregs: abi.Sregs) -> None:
        state = self.vcpu.export_state()
        registers.set_sregs(state, sregs)
        self.vcpu.import_state(state)

    def set_regs(self, regs: abi.Regs) -> None:
        state = self.vcpu.export_state()
        registers.set_regs(state, regs)
        self.vcpu.import_state(state)


class Guest:
    """One machine with a mini guest in it, and what it said."""

    def __init__(
        self, name: str, host: Host, memory: GuestMemory, paging: Paging, guest: mini.Guest
    ) -> None:
        self.name = name
        self.memory = memory
        self._around = Surroundings()
        self.ends = ""
        self.expected = guest.console
        self.machine = SoftMachine(host, paging=paging)
        for slot, region in enumerate(memory.regions):
            self.machine.map(slot, region)
        if guest.irqchip:
            self.machine.has_chips = True
            self.machine.irqchip.set_routes(pin_routes())
        vcpus = [self.machine.add_vcpu(id) for id in range(guest.cpus)]
        for vcpu in vcpus:
            vcpu.cpuid = Cpuid(cpuid.supported())
        self.vcpus = [ScheduledVcpu(f"{name}/{vcpu.id}", vcpu, self.answer) for vcpu in vcpus]
        entry = load_kernel(memory, mini.image(guest.name, **guest.parameters))
        entry.apply(cast(Vcpu, FirstState(vcpus[0], host.pcpus[0])))

    @property
    def said(self) -> str:
        return self._around.words

    def answer(self, exit: Exit) -> bool:
        self.ends = self._around.answer(exit) or self.ends
        return bool(self.ends)


class Guests:
    def __init__(self, host: Host, undo: ExitStack, paging: Paging, slice: int) -> None:
        self.host = host
        self.scheduler = Scheduler(host.pcpus, slice=slice)
        self.guests: list[Guest] = []
        self._undo = undo
        self._paging = paging

    def start(self, name: str, **parameters: int) -> Guest:
        guest = mini.guest(name, **parameters)
        memory = self._undo.enter_context(GuestMemory(guest.memory))
        made = Guest(f"{name}{len(self.guests)}", self.host, memory, self._paging, guest)
        self._undo.callback(made.machine.close)
        self.guests.append(made)
        for vcpu in made.vcpus:
            self.scheduler.add(vcpu)
        return made

    def run(self, most: int) -> None:
        """Until every guest has ended; at most so much virtual time."""
        while not all(guest.ends for guest in self.guests):
            done = self.scheduler.step()
            if done is None or done.end > most:
                return
            for guest in self.guests:
                if guest.ends:  # its other vCPUs end with it
                    for vcpu in guest.vcpus:
                        if vcpu.name in self.scheduler.entries:
                            self.scheduler.remove(vcpu.name)


@contextmanager
def guests(
    pcpus: int, *, paging: Paging = "ept", trap: Trap = "translate", slice: int = 20_000
) -> Iterator[Guests]:
    with ExitStack() as undo:
        host = undo.enter_context(Host(pcpus, trap=trap))
        yield Guests(host, undo, paging, slice)
