"""A mini guest on a hypervisor: what it said, what it left, how it ended.

The same for every hypervisor of the contract: vCPUs on threads, and the two ports that a mini guest owns.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from types import MappingProxyType
from typing import Any

import msgspec

from hostel.boot.load import load_kernel
from hostel.hypervisor import Exit, System, Vcpu, Vm
from hostel.kvm import System as KvmSystem
from hostel.memory import PAGE, GuestMemory
from hostel.soft import mini
from hostel.soft.mini.surroundings import Surroundings
from hostel.soft.vm import System as SoftSystem
from hostel.spec import Paging, Trap
from hostel.vmm import layout
from hostel.vmm.irq import pin_routes

PATIENCE = 60.0

Machine = Callable[[mini.Guest, GuestMemory], AbstractContextManager[list[Vcpu]]]


class Outcome(msgspec.Struct, frozen=True):
    """All that two hypervisors must agree on."""

    ends: str
    console: str
    results: mini.Results
    writes: tuple[tuple[int, bytes], ...] = ()
    """To what is no memory: address and bytes, in their order."""


@contextmanager
def on_kvm(guest: mini.Guest, memory: GuestMemory) -> Iterator[list[Vcpu]]:
    """vCPUs of a VM of the host's KVM, as a power-on leaves them."""
    with KvmSystem() as system, system.create_vm() as vm:
        if not guest.irqchip:
            vm.set_identity_map_address(layout.HYPERVISOR_PAGES)
            vm.set_tss_address(layout.HYPERVISOR_PAGES + PAGE)
        with _vcpus(system, vm, guest, memory) as vcpus:
            yield vcpus


def on_soft(paging: Paging, trap: Trap) -> Machine:
    """Of the software hypervisor, with this way of paging and this core."""

    @contextmanager
    def machine(guest: mini.Guest, memory: GuestMemory) -> Iterator[list[Vcpu]]:
        with closing(SoftSystem(paging=paging, trap=trap)) as system:
            vm = system.create_vm()
            with closing(vm), _vcpus(system, vm, guest, memory) as vcpus:
                yield vcpus

    return machine


@contextmanager
def _vcpus(system: System, vm: Vm, guest: mini.Guest, memory: GuestMemory) -> Iterator[list[Vcpu]]:
    for slot, region in enumerate(memory.regions):
        vm.map(slot, region)
    if guest.irqchip:
        vm.create_chipset(layout.HYPERVISOR_PAGES)
        vm.set_gsi_routes(pin_routes())
    with ExitStack() as undo:
        vcpus = []
        for id in range(guest.cpus):
            vcpu = vm.create_vcpu(id)
            undo.callback(vcpu.close)
            vcpu.set_cpuid(system.supported_cpuid())
            vcpus.append(vcpu)
        yield vcpus


class _Run:
    """Threads of one guest; the first ending counts."""

    def __init__(self, vcpus: list[Vcpu]) -> None:
        self.vcpus = vcpus
        self.around = Surroundings()
        self.ends = ""
        self.done = threading.Event()
        self.error: BaseException | None = None

    def serve(self, vcpu: Vcpu) -> None:
        try:
            while not self.done.is_set():
                if ends := self.answer(vcpu.run()):
                    self.ends = self.ends or ends
                    self.done.set()
        except BaseException as error:
            self.error = error
            self.done.set()

    def answer(self, exit: Exit) -> str:
        """How the guest has ended; "" if it goes on."""
        ends = self.around.answer(exit)
        return f"exit {self.around.code}" if ends == "exit" and self.around.code else ends

    def until_end(self, patience: float = PATIENCE) -> None:
        threads = [threading.Thread(target=self.serve, args=(vcpu,)) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        if not self.done.wait(patience):
            self.ends = "no end"
            self.done.set()
        for vcpu, thread in zip(self.vcpus, threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)
        if self.error is not None:
            raise self.error


def play(machine: Machine, name: str, **parameters: int) -> Outcome:
    with _played(machine, name, parameters) as (run, memory):
        said, writes = run.around.words, tuple(run.around.writes)
        return Outcome(run.ends, said, mini.results(memory), writes)


def statistics(machine: Machine, name: str) -> dict[str, Any]:
    """Of its first vCPU, when it has ended."""
    with _played(machine, name, {}) as (run, _):
        return run.vcpus[0].open_stats().read()


def spoiled(machine: Machine, name: str, changes: Mapping[int, int], patience: float) -> str:
    """How it ends with these bytes of it changed."""
    with _played(machine, name, {}, changes, patience) as (run, _):
        return run.ends


@contextmanager
def _played(
    machine: Machine,
    name: str,
    parameters: dict[str, int],
    changes: Mapping[int, int] = MappingProxyType({}),
    patience: float = PATIENCE,
) -> Iterator[tuple[_Run, GuestMemory]]:
    guest = mini.guest(name, **parameters)
    with GuestMemory(guest.memory) as memory:
        entry = load_kernel(memory, mini.image(name, **parameters))
        for address, byte in changes.items():
            memory.write(address, bytes([byte]))
        with machine(guest, memory) as vcpus:
            entry.apply(vcpus[0])
            run = _Run(vcpus)
            run.until_end(patience)
            yield run, memory


def on_qemu(name: str, **parameters: int) -> str:
    """What it says on QEMU's emulated processor."""
    guest = mini.guest(name)
    machine = (
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        str(guest.cpus),
        "-m",
        str(guest.memory >> 20),
    )
    console = (
        "-chardev",
        "stdio,id=console",
        "-device",
        "isa-debugcon,iobase=0xe9,chardev=console",
    )
    leave = ("-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4")
    kernel = ("-display", "none", "-nodefaults", "-kernel", str(mini.image(name, **parameters)))
    done = subprocess.run(
        ["qemu-system-x86_64", *machine, *console, *leave, *kernel],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout.decode("latin-1")
