"""The software hypervisor behind the monitor's contract: what ``kvm/`` is with a kernel.

::

    vCPU threads of the monitor ──run──► whose turn is it? (a fixed order) ──► SoftVcpu.run on the one pCPU
    devices, event loop ──irq_line, irqfd──► inbox ──► whose turn it is, between two entries

The translator is one for all vCPUs, so one runs at a time: for a slice, then the next that has something to
run, round and round. The turn stays with a vCPU while the monitor answers its exit, and while all are idle.
So the order never depends on the host's threads (docs/soft.md). Others never wait for a running guest: what
they want done goes into the inbox, and the guest is interrupted.

When all are idle the clock goes on as the host's does, up to the next timer; so a guest that sleeps takes no
time of the host, and its timers come when they should.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hostel.abi import kvm as abi
from hostel.errors import HostError
from hostel.hypervisor import GsiRoute, MsiMessage
from hostel.memory import Region

from . import cpuid
from .eventfds import Irqfds
from .extra import unicorn_version
from .lock import FairLock
from .vcpu import Counters, Statistics, Vcpu

if TYPE_CHECKING:
    from hostel.spec import Paging, Trap

    from .record.inputs import Inputs

SLICE = 200_000
"""Guest instructions in one turn: some hundred microseconds."""
ALONE = 50 * SLICE
"""The same of a machine's only vCPU: an exit less often. Whoever wants something done interrupts it."""


class System:
    """Implements ``hypervisor.System``. ``inputs``: who records or replays what comes from outside to the
    machine that will be made."""

    def __init__(
        self, *, paging: Paging = "ept", trap: Trap = "translate", inputs: Inputs | None = None
    ) -> None:
        unicorn_version()
        self._paging: Paging = paging
        self._trap: Trap = trap
        self._inputs = inputs

    def supported_cpuid(self) -> list[abi.CpuidEntry2]:
        return cpuid.supported()

    def has_tsc_deadline(self) -> bool:
        return True

    def create_vm(self) -> Vm:
        return Vm(paging=self._paging, trap=self._trap, inputs=self._inputs)

    def close(self) -> None:
        pass


class Vm:
    """Implements ``hypervisor.Vm``: one machine, on a physical machine of its own with one pCPU."""

    def __init__(
        self,
        *,
        paging: Paging,
        trap: Trap,
        inputs: Inputs | None,
    ) -> None:
        from .hypervisor.host import Host
        from .hypervisor.machine import SoftMachine

        self.host = Host(trap=trap)
        try:
            self.machine = SoftMachine(self.host, paging=paging)
        except BaseException:
            self.host.close()
            raise
        self.machine.has_chips = False  # until ``create_chipset``
        self.pcpu = self.host.pcpus[0]
        self.vcpus: list[Vcpu] = []
        self.lock = FairLock()
        """Whoever runs a vCPU or changes the machine holds it."""
        self.holder: Vcpu | None = None
        """Whose turn it is. Changed by itself only, with the lock."""
        self.turn_end = 0
        """When (TSC) the turn is over."""
        self.inbox: deque[Callable[[], object]] = deque()
        self.inputs = inputs
        self.on_input: Callable[[], None] = lambda: None
        """The devices take what the console has: called by a vCPU, where ``inputs`` says so."""
        self._irqfds = Irqfds(self._pulse)
        self._closed = False

    # --- Turns ---

    def pass_on(self) -> bool:
        """The turn is over: it goes to the next vCPU that has something to run, or stays. Whether one has."""
        at = self.vcpus.index(self.holder) + 1 if self.holder else 0
        for vcpu in (*self.vcpus[at:], *self.vcpus[:at]):
            if not vcpu.idle:
                self.holder = vcpu
                self.turn_end = self.pcpu.tsc + (SLICE if len(self.vcpus) > 1 else ALONE)
                vcpu.wake()
                return True
        return False

    def drain(self) -> None:
        """Do what others want done. With the turn."""
        self.machine.attention = False
        while self.inbox:
            self.inbox.popleft()()

    def post(self, action: Callable[[], object]) -> None:
        """Have it done soon by whose turn it is. From any thread."""
        self.inbox.append(action)
        self.call()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """To look at the machine, or change it, from any thread that does not run a vCPU now."""
        self.call()
        self.lock.take()
        try:
            yield
        finally:
            self.lock.give()

    def call(self) -> None:
        """Have whose turn it is look what there is. From any thread."""
        if (holder := self.holder) is not None:
            holder.call()

    # --- Time that nobody uses ---

    @property
    def now(self) -> int:
        """Nanoseconds, instruction-counted: the machine's time."""
        return self.pcpu.tsc

    @property
    def position(self) -> tuple[int, int, int]:
        """Whose turn it is, instructions executed, time."""
        holder = self.holder.id if self.holder else 0
        return holder, self.pcpu.core.statistics.instructions, self.now

    @property
    def until_timer(self) -> int | None:
        """Nanoseconds until the next timer; None: there is none."""
        deadline = self.machine.irqchip.deadline
        return None if deadline is None else max(deadline - self.pcpu.tsc, 0)

    def pass_time(self, passed: int) -> None:
        """All vCPUs were idle for so long: the clock goes on, but not past a timer."""
        left = self.until_timer
        self.pcpu.tsc += passed if left is None else min(passed, left)
        self.machine.tick(self.pcpu.tsc)

    # --- Memory ---

    def map(
        self, slot: int, region: Region, *, read_only: bool = False, log_dirty: bool = False
    ) -> None:
        if log_dirty:
            raise HostError("the software hypervisor keeps no dirty log")
        with self.held():
            self.machine.map(slot, region, read_only=read_only)

    def unmap(self, slot: int) -> None:
        with self.held():
            self.machine.unmap(slot)

    # --- vCPUs and interrupts ---

    def create_chipset(self, reserved: int) -> None:
        self.machine.has_chips = True

    def create_vcpu(self, id: int) -> Vcpu:
        vcpu = Vcpu(self, self.machine.add_vcpu(id))
        self.vcpus.append(vcpu)
        self.holder = self.holder or vcpu  # the first begins
        return vcpu

    def irq_line(self, gsi: int, level: bool) -> None:
        self.post(lambda: self.machine.irqchip.irq_line(gsi, level))

    def signal_msi(self, message: MsiMessage) -> bool:
        self.post(lambda: self.machine.irqchip.signal(message))
        return True

    def set_gsi_routes(self, routes: list[GsiRoute]) -> None:
        self.post(lambda: self.machine.irqchip.set_routes(routes))

    def _pulse(self, gsi: int) -> None:
        """KVM's irqfd is an edge too: up, and down again."""
        self.irq_line(gsi, True)
        self.irq_line(gsi, False)

    def irqfd(self, gsi: int, fd: int, *, assign: bool = True) -> None:
        if assign:
            self._irqfds.assign(gsi, fd)
        else:
            self._irqfds.deassign(gsi, fd)

    def ioeventfd(
        self,
        address: int,
        size: int,
        fd: int,
        *,
        match: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        eventfds = self.machine.ioeventfds
        change = eventfds.assign if assign else eventfds.deassign
        change(address, size, fd, match, pio=pio)

    # --- Statistics, the end ---

    def open_stats(self) -> Statistics:
        return Statistics(self._counters)

    def _counters(self) -> Counters:
        paging, core = self.machine.paging.statistics, self.pcpu.core.statistics
        return {
            **{name: getattr(paging, name) for name in paging.__struct_fields__},
            **{f"core_{name}": getattr(core, name) for name in core.__struct_fields__},
        }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._irqfds.close()
        self.machine.close()
        self.host.close()
