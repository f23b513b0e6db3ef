"""A vCPU of the software hypervisor behind the monitor's contract: ``run``, ``kick``, its state.

::

    run ──► my turn? ──no── sleep ──────────────────────────┐
             │ yes                                          │
             ├─ idle, others are not: pass the turn on ◄────┤
             ├─ all are idle: sleep to the next timer       │
             └─ run ──┬─ an exit: the monitor's; the turn stays mine
                      └─ the turn is over (slice, PAUSE, HLT): pass it on

A kick needs no turn, so a machine can always be stopped. A vCPU that was kicked keeps its turn.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hostel.abi import kvm as abi
from hostel.errors import HostError
from hostel.hypervisor import DebugExit, Exit, Interrupted, MmioExit, PioExit

from . import registers
from .core.events import STEP
from .cpuid import Cpuid
from .exceptions import DB
from .hypervisor.inject import Activity
from .state import DR6_ONES, RFLAGS_IF
from .vmx.fields import Field

if TYPE_CHECKING:
    from .hypervisor.vcpu import SoftVcpu
    from .record.inputs import Inputs
    from .state import CpuState
    from .vm import Vm

TSC_KHZ = 1_000_000
"""A guest instruction is a tick of the TSC and a nanosecond."""
HOST_VECTOR = 0xF0
"""Of the host's interrupt that gets a guest out."""
_LAPIC_SIZE = 0x400
_LAPIC_SETTABLE = (0x80, 0xD0, 0xE0, 0xF0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x3E0)
"""Registers that hold a setting: TPR, LDR, DFR, SVR, the LVT, the divider. Writing others acts."""
_INTERRUPTED = Interrupted()

Counters = dict[str, int | list[int]]


class Vcpu:
    """Implements ``hypervisor.Vcpu``."""

    def __init__(self, vm: Vm, soft: SoftVcpu) -> None:
        self.id = soft.id
        self._vm = vm
        self._soft = soft
        self._kicked = False
        self._awake = threading.Event()
        self._runs = False
        self._steps = False
        self._unfinished = False
        """The instruction that is stepped over waits for the monitor's answer."""
        self._late: threading.Timer | None = None
        """Interrupts a kicked vCPU of a recorded machine, if its slice does not end by itself."""

    # --- Running ---

    def run(self) -> Exit:
        vm = self._vm
        vm.lock.take()
        try:
            while not self._kicked:
                if vm.holder is not self:
                    self._sleep(None)
                elif (exit := self._go_on()) is not None:
                    return exit
            self._obey()
            return _INTERRUPTED
        finally:
            vm.lock.give()

    def _obey(self) -> None:
        """A kick."""
        self._kicked = False
        if (late := self._late) is not None:
            late.cancel()
            self._late = None

    def _go_on(self) -> Exit | None:
        """With the turn: until it is over, or somebody wants something."""
        vm = self._vm
        if vm.inputs is not None and not self._ask(vm.inputs):
            return _INTERRUPTED
        vm.drain()
        if self.idle:
            if not vm.pass_on():
                self._idle()
            return None
        exit = self._step() if self._steps else self._run()
        if exit is None:
            if self._soft.pauses or self.idle or vm.pcpu.tsc >= vm.turn_end:
                vm.pass_on()
            vm.lock.give()  # to who waits for it
            vm.lock.take()
        elif vm.inputs is not None:
            vm.inputs.note(exit)
        return exit

    def _ask(self, inputs: Inputs) -> bool:
        """What came from outside, if it is recorded or replayed. False: the machine is over."""
        border = inputs.border()
        if border is border.INPUT:
            self._vm.lock.give()  # devices have locks of their own
            self._vm.on_input()
            self._vm.lock.take()
        return border is not border.OVER

    def _run(self) -> Exit | None:
        vm = self._vm
        self._runs = True
        try:
            return self._soft.run(vm.pcpu, vm.turn_end - vm.pcpu.tsc)
        finally:
            self._runs = False

    def _step(self) -> Exit | None:
        """One instruction, or a piece of it: None."""
        vm, soft = self._vm, self._soft
        if not self._unfinished and vm.pcpu.tsc >= vm.turn_end:
            return None
        before = self._place()
        exit = soft.run(vm.pcpu, 0 if self._unfinished else 1)  # 1: a VM entry, for one instruction
        done = self._unfinished or (self._place() != before and soft.event is None)
        self._unfinished = isinstance(exit, PioExit | MmioExit)
        return exit or (self._debug_exit() if done else None)

    def _place(self) -> tuple[int, int]:
        """What moves with each instruction: the one if it exits, the other if not."""
        soft = self._soft
        soft.load(self._vm.pcpu)
        return soft.read(Field.GUEST_RIP), soft.instructions

    def _debug_exit(self) -> DebugExit:
        state = self._soft.full_state()
        base = 0 if state.bits == 64 else state.cs.base
        return DebugExit(DB, base + state.rip, DR6_ONES | STEP, state.dr7)

    def _idle(self) -> None:
        """So are all others: time passes as the host's does."""
        vm, begun = self._vm, time.monotonic_ns()
        left = vm.until_timer
        if vm.inputs is None:
            self._sleep(left)
            vm.pass_time(time.monotonic_ns() - begun)
        elif (passed := vm.inputs.idle(left, self._sleep)) is not None:
            vm.pass_time(passed)

    def _sleep(self, left: int | None) -> bool:
        """Without the lock, until something may have come, or so many nanoseconds. False: a kick came."""
        vm = self._vm
        self._awake.clear()
        if not (self._kicked or (vm.holder is self and vm.inbox)):
            vm.lock.give()
            self._awake.wait(None if left is None else left / 1e9)
            vm.lock.take()
        return not self._kicked

    @property
    def idle(self) -> bool:
        """Halted, or waiting to be started, with nothing to wake it."""
        return self._soft.idle

    def wake(self) -> None:
        self._awake.set()

    def call(self) -> None:
        """Out of sleep, and out of the guest; a recorded machine looks at its turn's next border, which is
        soon. From any thread."""
        self._awake.set()
        if self._vm.inputs is None:
            self._interrupt()

    def kick(self) -> None:
        inputs = self._vm.inputs
        self._kicked = True
        self._awake.set()
        if inputs is None or not inputs.patience:
            self._interrupt()
        elif self._runs and self._late is None:
            self._late = threading.Timer(inputs.patience, self._cut, (inputs,))
            self._late.daemon = True
            self._late.start()

    def _interrupt(self) -> None:
        self._vm.machine.attention = True
        if self._runs:
            self._vm.pcpu.interrupt(HOST_VECTOR)

    def _cut(self, inputs: Inputs) -> None:
        """A slice full of what is slow: the machine ends within it."""
        if self._kicked and self._runs:
            inputs.cut = True
            self._interrupt()

    @property
    def place(self) -> str:
        """Where it is, for a person. Nothing runs it now."""
        if self._soft.activity is Activity.WAITS_FOR_SIPI:
            return "waits for its start-up message"
        regs = self.get_regs()
        if self._soft.activity is Activity.RUNNING:
            interrupts = "on" if regs.rflags & RFLAGS_IF else "off"
            return f"runs at RIP {regs.rip:#x}, interrupts {interrupts}"
        if self._soft.halted_open:
            return f"is halted at RIP {regs.rip:#x} and waits for an interrupt"
        waker = "nothing" if len(self._vm.vcpus) == 1 else "only an NMI or INIT"
        return f"is halted at RIP {regs.rip:#x} with interrupts off: {waker} can wake it"

    # --- State ---

    def _look(self) -> CpuState:
        with self._vm.held():
            self._soft.load(self._vm.pcpu)
            return self._soft.export_state()

    def _change(self, change: Callable[[CpuState], None]) -> None:
        with self._vm.held():
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

        with self._vm.held():
            self._soft.load(self._vm.pcpu)
            return {index: host_read(self._soft, index) for index in indices}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        from .hypervisor.msrs import host_write

        with self._vm.held():
            self._soft.load(self._vm.pcpu)
            for index, value in values.items():
                host_write(self._soft, index, value)

    def set_cpuid(self, entries: Sequence[abi.CpuidEntry2]) -> None:
        self._soft.cpuid = Cpuid(entries)

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        if control & ~(abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP):
            raise HostError("the software hypervisor has no breakpoints", cure="single steps")
        self._steps = control == abi.GUESTDBG_ENABLE | abi.GUESTDBG_SINGLESTEP

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
