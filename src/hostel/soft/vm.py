"""The software hypervisor behind the monitor's contract: what ``kvm/`` is with a kernel.

::

    vCPU threads of the monitor ──run──► turn (one at a time, in order) ──► SoftVcpu.run on the one pCPU
    devices, event loop ──irq_line, irqfd──► inbox ──► whoever has the turn, before the next entry

The translator is one for all vCPUs, so one runs at a time: for a slice, then the next in the queue. Others
never wait for a running guest: what they want done goes into the inbox, and the guest is interrupted.

A vCPU that is idle waits without the turn. When all are, the clock goes on as the host's does, up to the
next timer; so a guest that sleeps takes no time of the host, and its timers come when they should.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hostel.abi import kvm as abi
from hostel.errors import HostError
from hostel.hypervisor import Exit, GsiRoute, Interrupted, MsiMessage
from hostel.memory import Region

from . import cpuid, registers
from .cpuid import Cpuid
from .eventfds import Irqfds
from .extra import unicorn_version

if TYPE_CHECKING:
    from hostel.spec import Paging, Trap

    from .hypervisor.vcpu import SoftVcpu
    from .state import CpuState

SLICE = 200_000
"""Guest instructions in one turn: some hundred microseconds."""
ALONE = 50 * SLICE
"""The same of a machine's only vCPU. Whoever wants something done interrupts it at once."""
TSC_KHZ = 1_000_000
"""A guest instruction is a tick of the TSC and a nanosecond."""
HOST_VECTOR = 0xF0
"""Of the host's interrupt that gets a guest out. It means: look into the inbox."""
_LAPIC_SIZE = 0x400
_LAPIC_SETTABLE = (0x80, 0xD0, 0xE0, 0xF0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x3E0)
"""Registers that hold a setting: TPR, LDR, DFR, SVR, the LVT, the divider. Writing others acts."""
_INTERRUPTED = Interrupted()

Counters = dict[str, int | list[int]]


class System:
    """Implements ``hypervisor.System``."""

    def __init__(self, *, paging: Paging = "ept", trap: Trap = "translate") -> None:
        unicorn_version()
        self._paging: Paging = paging
        self._trap: Trap = trap

    def supported_cpuid(self) -> list[abi.CpuidEntry2]:
        return cpuid.supported()

    def has_tsc_deadline(self) -> bool:
        return True

    def create_vm(self) -> Vm:
        return Vm(paging=self._paging, trap=self._trap)

    def close(self) -> None:
        pass


class Turn:
    """A lock that is given in the order in which it was asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Lock] = deque()
        self._held = False

    def take(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            ticket = threading.Lock()
            ticket.acquire()
            self._queue.append(ticket)
        ticket.acquire()

    def take_if_free(self) -> bool:
        with self._lock:
            if self._held:
                return False
            self._held = True
            return True

    def give(self) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().release()  # it is the next one's now
            else:
                self._held = False


class Vm:
    """Implements ``hypervisor.Vm``: one machine, on a physical machine of its own with one pCPU."""

    def __init__(self, *, paging: Paging, trap: Trap) -> None:
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
        self._turn = Turn()
        self._inbox: deque[Callable[[], object]] = deque()
        self._irqfds = Irqfds(self._pulse)
        self._idle_since: int | None = None
        """Host nanoseconds, while every vCPU is idle."""
        self._closed = False

    # --- The turn, and what others want done ---

    def take_turn(self) -> None:
        self._turn.take()
        self._drain()

    def give_turn(self) -> None:
        """What came into the inbox meanwhile is done by the next who has the turn; if nobody, now."""
        self._turn.give()
        while self._inbox and self._turn.take_if_free():
            self._drain()
            self._turn.give()

    def post(self, action: Callable[[], object]) -> None:
        """Have it done soon by whoever has the turn. From any thread."""
        self._inbox.append(action)
        if self._turn.take_if_free():
            self._drain()
            self.give_turn()
        else:
            self.machine.attention = True
            self.pcpu.interrupt(HOST_VECTOR)

    def _drain(self) -> None:
        self.machine.attention = False
        self._catch_up()
        while self._inbox:
            self._inbox.popleft()()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.take_turn()
        try:
            yield
        finally:
            self.give_turn()

    # --- Time that nobody uses ---

    def _catch_up(self) -> None:
        """All vCPUs were idle: the clock has gone on with the host's, but not past a timer."""
        if self._idle_since is None:
            return
        now = time.monotonic_ns()
        passed, self._idle_since = now - self._idle_since, now
        deadline = self.machine.irqchip.deadline
        left = passed if deadline is None else max(min(passed, deadline - self.pcpu.tsc), 0)
        self.pcpu.tsc += left
        self.machine.tick(self.pcpu.tsc)

    def note_idle(self) -> float | None:
        """A vCPU is idle. For how many seconds, until the next timer; None: without end. It has the turn."""
        if all(vcpu.waiting for vcpu in self.vcpus) and self._idle_since is None:
            self._idle_since = time.monotonic_ns()
        deadline = self.machine.irqchip.deadline
        return None if deadline is None else max(deadline - self.pcpu.tsc, 0) / 1e9

    def note_running(self) -> None:
        self._idle_since = None

    # --- Memory ---

    def map(
        self, slot: int, region: Region, *, read_only: bool = False, log_dirty: bool = False
    ) -> None:
        if log_dirty:
            raise HostError("the software hypervisor keeps no dirty log")
        with self.turn():
            self.machine.map(slot, region, read_only=read_only)

    def unmap(self, slot: int) -> None:
        with self.turn():
            self.machine.unmap(slot)

    # --- vCPUs and interrupts ---

    def create_chipset(self, reserved: int) -> None:
        self.machine.has_chips = True

    def create_vcpu(self, id: int) -> Vcpu:
        vcpu = Vcpu(self, self.machine.add_vcpu(id))
        self.vcpus.append(vcpu)
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


class Vcpu:
    """Implements ``hypervisor.Vcpu``."""

    def __init__(self, vm: Vm, soft: SoftVcpu) -> None:
        self.id = soft.id
        self.waiting = False
        """It is idle. Changed with the turn only."""
        self._vm = vm
        self._soft = soft
        self._kicked = False
        self._awake = threading.Event()
        self._runs = False
        soft.lapic.on_event = self._awake.set

    # --- Running ---

    def run(self) -> Exit:
        vm = self._vm
        vm.take_turn()
        try:
            while not self._kicked:
                self._set_waiting(self._soft.idle)
                if self.waiting:
                    self._wait()
                elif (exit := self._slice()) is not None:
                    return exit
                else:
                    vm.give_turn()
                    vm.take_turn()
            self._kicked = False
            return _INTERRUPTED
        finally:
            self._set_waiting(False)
            vm.give_turn()

    def _slice(self) -> Exit | None:
        self._runs = True
        try:
            return self._soft.run(self._vm.pcpu, SLICE if len(self._vm.vcpus) > 1 else ALONE)
        finally:
            self._runs = False

    def _set_waiting(self, waiting: bool) -> None:
        self.waiting = waiting
        if not waiting:
            self._vm.note_running()

    def _wait(self) -> None:
        """Without the turn, until something may have come."""
        self._awake.clear()
        seconds = self._vm.note_idle()
        self._vm.give_turn()
        if not self._kicked:
            self._awake.wait(seconds)
        self._vm.take_turn()

    def kick(self) -> None:
        self._kicked = True
        self._awake.set()
        if self._runs:
            self._vm.machine.attention = True
            self._vm.pcpu.interrupt(HOST_VECTOR)

    # --- State ---

    def _look(self) -> CpuState:
        with self._vm.turn():
            self._soft.load(self._vm.pcpu)
            return self._soft.export_state()

    def _change(self, change: Callable[[CpuState], None]) -> None:
        with self._vm.turn():
            self._soft.load(self._vm.pcpu)
            state = self._soft.export_state()
            change(state)
            self._soft.import_state(state)

    def get_regs(self) -> abi.Regs:
        return registers.regs(self._look())

    def set_regs(self, regs: abi.Regs) -> None:
        self._change(lambda state: registers.set_regs(state, regs))

    def get_sregs(self) -> abi.Sregs:
        return registers.sregs(self._look(), self._soft.lapic.base)

    def set_sregs(self, sregs: abi.Sregs) -> None:
        self._change(lambda state: registers.set_sregs(state, sregs))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        from .hypervisor.msrs import host_read

        with self._vm.turn():
            self._soft.load(self._vm.pcpu)
            return {index: host_read(self._soft, index) for index in indices}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        from .hypervisor.msrs import host_write

        with self._vm.turn():
            self._soft.load(self._vm.pcpu)
            for index, value in values.items():
                host_write(self._soft, index, value)

    def set_cpuid(self, entries: Sequence[abi.CpuidEntry2]) -> None:
        self._soft.cpuid = Cpuid(entries)

    def get_tsc_khz(self) -> int:
        return TSC_KHZ

    def get_lapic(self) -> abi.LapicState:
        lapic = self._soft.lapic
        words = (lapic.read(at, 4).ljust(16, b"\0") for at in range(0, _LAPIC_SIZE, 16))
        return abi.LapicState.from_buffer_copy(b"".join(words))

    def set_lapic(self, state: abi.LapicState) -> None:
        page = bytes(state)
        for at in _LAPIC_SETTABLE:
            self._soft.lapic.write(at, page[at : at + 4])

    def open_stats(self) -> Statistics:
        return Statistics(self._counters)

    def _counters(self) -> Counters:
        soft = self._soft
        exits = Counter({reason.name.lower(): count for reason, count in soft.exits.items()})
        return {
            "exits": exits.total(),
            **dict(sorted(exits.items())),
            "instructions": soft.instructions,
            "migrations": soft.migrations,
        }

    def close(self) -> None:
        """Its VMCS goes with the machine."""


class Statistics:
    """Implements ``hypervisor.Statistics``."""

    def __init__(self, read: Callable[[], Counters]) -> None:
        self.read = read

    def close(self) -> None:
        pass
