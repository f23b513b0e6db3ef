"""The core by translation: blocks in which sensitive instructions are replaced.

::

    enter ── state ──> │ run blocks ──┬─ INT3 of ours ──> the instruction's handler ──┬─ done: go on
                       │      ▲       ├─ exception ─────> intercepted? ── no ── IDT ──┤
                       │      └───────┼─ TLB miss that the Mmu refuses ── #PF, EPT ───┤
                       │              └─ a block to scan; no instructions left ───────┘
    exit  <─ state ─── │ <── VmExit

*Who is right.* While blocks run, the state is the engine's; ``_sync`` brings it into ``state`` for Python
to work on, ``_resume`` takes it back. Control registers and MSRs never change outside of Python.

The INT3 of a block was placed for an instruction; a guest's own INT3 is one in memory too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hostel.soft.exceptions import DB, GP, PF
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.register_checks import Refused
from hostel.soft.silicon import (
    Access,
    Controls,
    CoreStatistics,
    EptFault,
    Event,
    Mmu,
    PageFault,
    Pin,
    Primary,
    Reason,
    VmExit,
)
from hostel.soft.state import (
    ACTIVE,
    BLOCKED_BY_MOV_SS,
    BLOCKED_BY_NMI,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_TF,
    CpuState,
)

from .breakpoints import fetched, touched
from .delivery import SHADOWED, Delivery, ept_exit
from .engine import FOREVER, FULL, TO_SCAN, Engine
from .env import CR, EFLAGS, FPU, FPU_END, segmented
from .events import STEP, Fault
from .flags import HF_CS64, HF_INHIBIT, HF_LMA, TIGHT_CS
from .instructions import STATELESS, Handlers
from .linear import LinearMemory
from .outcome import Outcome
from .scan import LONGEST, Scanner
from .segments import Landing
from .stops import Stops
from .translations import Translations
from .view import SplitView

if TYPE_CHECKING:
    from iced_x86 import Instruction


class TranslatingCore:
    """``Core`` of ``soft/silicon.py``."""

    def __init__(
        self, physical: PhysicalMemory, mmu: Mmu, statistics: CoreStatistics | None = None
    ) -> None:
        self.physical = physical
        self.mmu = mmu
        self.state = CpuState()
        self.controls = Controls()
        self.statistics = statistics or CoreStatistics()
        self.shadow = 0
        """Interruptibility that the instruction being executed leaves behind."""
        scanner = Scanner()
        self.translations = Translations(self)
        self.view = SplitView(physical, scanner, self.statistics)
        self.engine = Engine(self.translations.fill, self.view.meet)
        self.memory = LinearMemory(physical, self.translations.ask, self.translations.coherence)
        self.scanner = scanner
        self.delivery = Delivery(self)
        self._handlers = Handlers()
        self.stops = Stops(self)
        self.hits = 0
        """Breakpoints on data that the instruction being executed hits."""
        self.before = b""
        """The registers, as an instruction that loads segments found them, while it runs in long mode."""
        self._synced = self._cut = False
        self._left = FOREVER
        self._kick = threading.Event()
        for span in physical.spans:
            self.engine.map(span)
        physical.on_span.append(self.engine.map)

    # --- The contract ---

    def enter(self, state: CpuState, controls: Controls, event: Event | None = None) -> VmExit:
        self._begin(state, controls)
        exit = self.delivery.inject(event) if event else None
        if exit is None:
            self._resume()
            exit = self._run()
        self.sync()
        return exit

    def _begin(self, state: CpuState, controls: Controls) -> None:
        self.state, self.controls = state, controls
        timed = controls.pin & Pin.PREEMPTION_TIMER
        self._left = controls.timer if timed else FOREVER
        self._cut, self._synced = False, True

    def _run(self) -> VmExit:
        while True:
            exit = self._pending() or self._advance()
            if exit is not None:
                return exit

    def interrupt(self) -> None:
        self.engine.context.kick = 1
        self._kick.set()

    def flush(self, address: int | None = None) -> None:
        self.statistics.flushes += 1
        self.memory.flush()
        if address is None:
            self.engine.flush()
            self.view.frames.clear()
            self.translations.flush()
        else:
            for alias in (address, address + (1 << 32)):  # see Translations.linear
                self.engine.flush(alias)
                self.view.frames.pop(alias // PAGE, None)

    def flush_all(self, *, keep_global: bool) -> None:
        """The guest's own flush, by a MOV to a control register that did not exit."""
        self.mmu.flush(self.controls, keep_global=keep_global)
        self.flush()

    def save_fpu(self) -> bytes:
        return bytes(self.engine.env.bytes[FPU:FPU_END])

    def load_fpu(self, data: bytes) -> None:
        self.engine.env.bytes[FPU:FPU_END] = data

    def close(self) -> None:
        if self.engine.map in self.physical.on_span:
            self.physical.on_span.remove(self.engine.map)
        self.translations.coherence.leave()
        self.engine.close()

    @property
    def tsc(self) -> int:
        """Time is instructions executed."""
        offset = self.controls.tsc_offset if self.controls.primary & Primary.TSC_OFFSETTING else 0
        return self.statistics.instructions + offset & 2**64 - 1

    # --- Where the state is ---

    def sync(self) -> None:
        if not self._synced:
            self.engine.env.save(self.state)
            self._synced = True

    def _resume(self) -> None:
        if self._synced:
            self.engine.env.load(self.state)
            self._synced = False

    def going_on(self, exit: VmExit | None) -> VmExit | None:
        if exit is None:
            self._resume()
        return exit

    # --- Between blocks ---

    def _pending(self) -> VmExit | None:
        """Exits that no instruction causes, in the order of SDM vol. 3C §25.2 and §6.9."""
        if self.engine.context.kick:
            self.engine.context.kick = 0
            self._kick.clear()
            return VmExit(Reason.EXTERNAL_INTERRUPT)
        if self._left <= 0:
            return VmExit(Reason.PREEMPTION_TIMER)
        if self.controls.primary & (Primary.INTERRUPT_WINDOW | Primary.NMI_WINDOW):
            exit = self._window_open()
            if exit is not None:
                return exit
        return None if self.state.activity == ACTIVE else self._wait()

    def _window_open(self) -> VmExit | None:
        self.sync()
        state, wanted = self.state, self.controls.primary
        blocked = state.interruptibility
        if wanted & Primary.NMI_WINDOW and not blocked & (BLOCKED_BY_NMI | BLOCKED_BY_MOV_SS):
            return VmExit(Reason.NMI_WINDOW)
        interrupts = state.rflags & RFLAGS_IF and not blocked & SHADOWED
        if wanted & Primary.INTERRUPT_WINDOW and interrupts:
            return VmExit(Reason.INTERRUPT_WINDOW)
        self._resume()
        return None

    def _wait(self) -> VmExit:
        """Halted: time passes until the timer or an interrupt."""
        if self.controls.pin & Pin.PREEMPTION_TIMER:
            self.count(self._left)
            return VmExit(Reason.PREEMPTION_TIMER)
        self._kick.wait()
        self._kick.clear()
        self.engine.context.kick = 0
        return VmExit(Reason.EXTERNAL_INTERRUPT)

    def _advance(self) -> VmExit | None:
        """Run blocks until something happens, and act on it."""
        return self._guarded(self._blocks)

    def _guarded(self, work: Callable[[], VmExit | None]) -> VmExit | None:
        try:
            return work()
        except Fault as fault:
            return self.raise_fault(fault)
        except Refused:
            return self.raise_fault(Fault(GP, 0))
        except PageFault as fault:
            return self.raise_fault(Fault(PF, fault.code, cr2=fault.address))
        except EptFault as fault:
            self.sync()
            return ept_exit(fault)

    def _blocks(self) -> VmExit | None:
        awaited = self.controls.primary & (Primary.INTERRUPT_WINDOW | Primary.NMI_WINDOW)
        cut, self._cut = self._cut, False
        if (awaited and self.engine.env.hflags & HF_INHIBIT) or (cut and self._left == 1):
            return self.one()
        return self._go(self._left, cut)

    def _go(self, budget: int, cut: bool) -> VmExit | None:
        self.translations.refused, self.translations.at_limit = None, False
        error = self.engine.run(budget, cut=cut)
        spent = budget - self.engine.context.budget
        stopped = self.engine.context.stopped
        if stopped or self.translations.at_limit:
            self.count(spent)
            return self._after_stop(stopped, single=cut and budget == 1)
        return self.stops.act(error, spent)

    def count(self, instructions: int) -> None:
        self._left -= instructions
        self.statistics.instructions += instructions

    def spend(self) -> None:
        """Of the timer, for a delivery: a handler that faults at once must not last for ever."""
        self._left -= 1

    def _after_stop(self, stopped: int, *, single: bool) -> VmExit | None:
        if stopped == TO_SCAN:
            self.view.make(self.engine)
        elif stopped == FULL:
            self.forget_blocks()
        elif not single and not self.engine.context.kick:
            self._cut = True  # a block is longer than what is left
        return None

    def forget_blocks(self) -> None:
        self.engine.forget_blocks()
        self.view.forget_blocks()
        self.stops.forget_blocks()

    # --- One instruction ---

    def one(self) -> VmExit | None:
        """Execute the instruction at RIP, and no more."""
        instruction = self.instruction()
        env = self.engine.env
        if self.scanner.sensitive(instruction, env.cpl == 3, segmented(env.hflags)):
            return self.act(instruction)
        return self._go(1, cut=True)

    def instruction(self) -> Instruction:
        """The one at RIP, from its own bytes; its second page is fetched only if it has one."""
        env = self.engine.env
        at, bits = env.linear_rip, env.bits
        room = PAGE - at % PAGE
        if at // PAGE not in self.view.frames:
            self.view.fetch(at, self.translations.ask(at, Access.FETCH, env.cpl == 3).frame)
        found = self.scanner.decode(self.view.code(at, min(LONGEST, room)), bits)
        if found.len and found.len <= room and (found.code or room >= LONGEST):
            return found
        following = at + room
        linear = self.translations.linear(following)
        frame = self.translations.ask(linear, Access.FETCH, env.cpl == 3).frame
        self.view.fetch(following, frame)
        return self.scanner.decode(self.view.code(at, LONGEST), bits)

    def act(self, instruction: Instruction) -> VmExit | None:
        """What a sensitive instruction does in this ring, under these controls."""
        env = self.engine.env
        self.hits = self._watch(instruction) if env.watching else 0
        if not env.hflags & HF_CS64:
            self.scanner.reach.check(env, instruction)
        handler = self._handlers.of(instruction)
        if handler not in STATELESS:
            self.sync()
        self.shadow = 0
        result = handler(self, instruction)
        if isinstance(result, VmExit):
            return result
        if result in (Outcome.NATIVE, Outcome.IMPLICIT):
            return self._natively(instruction, result is Outcome.IMPLICIT)
        self.statistics.instructions_replaced += 1
        return self._complete(instruction, result)

    def _watch(self, instruction: Instruction) -> int:
        """Breakpoints: one on the instruction is a fault; those on data that it will hit are returned."""
        env = self.engine.env
        if not env.u64[EFLAGS // 8] & RFLAGS_RF:
            bits = fetched(self.state, env.linear_rip)
            if bits:
                raise Fault(DB, dr6=bits)
        return touched(self.state, self.scanner.reach.touches(env, instruction))

    def _natively(self, instruction: Instruction, implicit: bool) -> VmExit | None:
        self._resume()
        env, delivered = self.engine.env, self.statistics.events_delivered
        limited = env.hflags & (TIGHT_CS | HF_CS64) == TIGHT_CS
        landing = Landing(env, instruction.len) if limited else None
        self.translations.implicit = implicit
        self.before = bytes(env.bytes[:CR]) if implicit and env.hflags & HF_LMA else b""
        try:
            exit = self._go(1, cut=True)
        finally:
            self.translations.implicit, self.before = False, b""
        if exit is None and not self._synced:
            env.note_segments()
            if landing:
                landing.check()
            if self.hits and self.statistics.events_delivered == delivered:
                return self.raise_fault(Fault(DB, dr6=self.hits))
        return exit

    def _complete(self, instruction: Instruction, result: Outcome) -> VmExit | None:
        state = self.state
        if result is Outcome.DONE:
            mask = 2**64 - 1 if state.bits == 64 else 0xFFFF_FFFF
            state.rip = state.rip + instruction.len & mask
        stepped = state.rflags & RFLAGS_TF
        state.rflags &= ~RFLAGS_RF
        state.interruptibility = state.interruptibility & ~SHADOWED | self.shadow
        self.count(1)
        if stepped or self.hits:
            return self.raise_fault(Fault(DB, dr6=self.hits | (STEP if stepped else 0)))
        self._resume()
        return None

    # --- Exceptions and interrupts ---

    def raise_fault(self, fault: Fault) -> VmExit | None:
        self.sync()
        return self.going_on(self.delivery.fault(fault))

    def deliver_software(self, event: Event) -> Outcome | VmExit:
        return self.delivery.software(event) or Outcome.JUMPED

    # --- For a hypervisor ---

    def wrote(self, hpa: int, size: int) -> None:
        """Somebody else changed memory: blocks translated from it are dropped, in all cores on it."""
        self.translations.coherence.wrote(hpa, size)
