"""A mini guest on the host's own KVM: the yardstick of the labs."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec

from hostel.boot.load import load_kernel
from hostel.errors import GuestError, HostelError
from hostel.hypervisor import Interrupted, PioExit
from hostel.kvm import System, Vcpu
from hostel.kvm.stats import Stats
from hostel.memory import PAGE, GuestMemory
from hostel.soft import mini
from hostel.soft.mini.surroundings import ENDINGS, Surroundings
from hostel.vmm import layout
from hostel.vmm.irq import pin_routes

from .reasons import MODULES, Traced, Tracer

DEADLINE = 60.0


class Run(msgspec.Struct, frozen=True):
    """What one vCPU's guest did, and what the kernel counted of it."""

    said: str
    ended: str
    returns: int
    """Times that KVM_RUN came back to this process."""
    port_io: int
    """Of these, for a port."""
    vcpu: dict[str, int]
    """KVM's statistics of it."""
    traced: Traced | None
    """None where the host does not let us count KVM's tracepoints."""


def missing() -> str:
    """Why there is no KVM to compare with; empty if there is one."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no /dev/kvm that opens"
    try:
        System().close()
    except HostelError as error:
        return str(error)
    return ""


def module() -> str:
    """Which kernel module is KVM here: one of ``MODULES``, or one that needs no such hardware (PVM)."""
    names = [path.name for path in Path("/sys/module").glob("kvm_*")]
    return next((name for name in MODULES if name in names), min(names, default="kvm"))


def paging() -> str:
    """How this KVM virtualizes memory: ``nested`` or ``shadow``."""
    name = module()
    if name not in MODULES:
        return "shadow"  # it knows nothing else
    with open(f"/sys/module/{name}/parameters/{MODULES[name]}") as file:
        return "nested" if file.read().strip() in ("Y", "1") else "shadow"


def play(name: str, **parameters: int) -> Run:
    """Run it to its end. ``GuestError`` if it does not come to one in a minute."""
    guest = mini.guest(name, **parameters)
    with ExitStack() as undo:
        memory = undo.enter_context(GuestMemory(guest.memory))
        entry = load_kernel(memory, mini.image(name, **parameters))
        system = undo.enter_context(System())
        vm = undo.enter_context(system.create_vm())
        for slot, region in enumerate(memory.regions):
            vm.map(slot, region)
        if guest.irqchip:
            vm.create_chipset(layout.HYPERVISOR_PAGES)
            vm.set_gsi_routes(pin_routes())
        else:
            vm.set_identity_map_address(layout.HYPERVISOR_PAGES)
            vm.set_tss_address(layout.HYPERVISOR_PAGES + PAGE)
        vcpu = undo.enter_context(vm.create_vcpu(0))
        vcpu.set_cpuid(system.supported_cpuid())
        entry.apply(vcpu)
        around = Surroundings()
        tracer = undo.enter_context(Tracer(module()))
        ended, returns, port_io = _serve(vcpu, around, name)
        statistics = _plain(undo.enter_context(closing(vcpu.open_stats())))
        traced = tracer.read(statistics["exits"])
        return Run(around.words, ended, returns, port_io, statistics, traced)


def _plain(statistics: Stats) -> dict[str, int]:
    values = statistics.read()
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _serve(vcpu: Vcpu, around: Surroundings, name: str) -> tuple[str, int, int]:
    """How it ended, how often KVM_RUN came back, and how often of these for a port."""
    returns = port_io = 0
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        vcpu.kick()

    timer = threading.Timer(DEADLINE, interrupt)
    timer.daemon = True
    timer.start()
    try:
        while True:
            exit = vcpu.run()
            returns += 1
            port_io += isinstance(exit, PioExit)
            ended = around.answer(exit)
            if ended in ENDINGS:
                return ended, returns, port_io
            if ended or (isinstance(exit, Interrupted) and late.is_set()):
                raise GuestError(f"the mini guest {name} on KVM ended with {exit}")
    finally:
        timer.cancel()
