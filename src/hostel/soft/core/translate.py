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
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hostel.errors import HostError
from hostel.soft.physical import PAGE, PhysicalMemory
from hostel.soft.silicon import (
    Access,
    Controls,
    CoreStatistics,
    EptFault,
    Event,
    EventType,
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

from .delivery import SHADOWED, STEP, Delivery, ept_exit
from .engine import EXCEPTION, FOREVER, FULL, ILLEGAL, TO_SCAN, Engine
from .env import DR, EIP, FPU, FPU_END, HF_CS64, HF_INHIBIT, IS_INT
from .events import BP, DB, OF, PF, UD, WITH_ERROR_CODE, Fault
from .instructions import STATELESS, Handlers
from .linear import LinearMemory
from .outcome import Outcome
from .scan import LONGEST, Scanner
from .translations import Translations
from .view import INT3, SplitView
from .window import Reader, Window, Writer

if TYPE_CHECKING:
    from iced_x86 import Instruction

_FINAL = 1 << 8
"""Of an EPT violation's qualification: the access itself, not the walk to it (table 27-7)."""


class TranslatingCore:
    """``Core`` of ``soft/silicon.py``."""

    def __init__(self, physical: PhysicalMemory, mmu: Mmu) -> None:
        self.physical = physical
        self.mmu = mmu
        self.state = CpuState()
        self.controls = Controls()
        self.statistics = CoreStatistics()
        self.shadow = 0
        """Interruptibility that the instruction being executed leaves behind."""
        scanner = Scanner()
        self.translations = Translations(self)
        self.view = SplitView(physical, scanner, self.statistics)
        self.engine = Engine(self.translations.fill, self.view.meet)
        self.memory = LinearMemory(
            physical, self.translations.ask, self.engine.write, self.view.fetched
        )
        self._scanner = scanner
        self.delivery = Delivery(self)
        self._handlers = Handlers()
        self._positions: dict[tuple[int, int], int] = {}
        self._synced = self._cut = False
        self._left = FOREVER
        self.window = Window(self.engine)
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
        self._sync()
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
        self.engine.flush(address)
        self.memory.flush()
        if address is None:
            self.view.frames.clear()
        else:
            self.view.frames.pop(address // PAGE, None)

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
        self.engine.close()

    @property
    def tsc(self) -> int:
        """Time is instructions executed."""
        offset = self.controls.tsc_offset if self.controls.primary & Primary.TSC_OFFSETTING else 0
        return self.statistics.instructions + offset & 2**64 - 1

    # --- Where the state is ---

    def _sync(self) -> None:
        if not self._synced:
            self.engine.env.save(self.state)
            self._synced = True

    def _resume(self) -> None:
        if self._synced:
            self.engine.env.load(self.state)
            self._synced = False

    def _going_on(self, exit: VmExit | None) -> VmExit | None:
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
        self._sync()
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
            self._count(self._left)
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
            return self._raise(fault)
        except PageFault as fault:
            return self._raise(Fault(PF, fault.code, cr2=fault.address))
        except EptFault as fault:
            self._sync()
            return ept_exit(fault)

    def _blocks(self) -> VmExit | None:
        awaited = self.controls.primary & (Primary.INTERRUPT_WINDOW | Primary.NMI_WINDOW)
        cut, self._cut = self._cut, False
        if (awaited and self.engine.env.hflags & HF_INHIBIT) or (cut and self._left == 1):
            return self._one()
        return self._go(self._left, cut)

    def _go(self, budget: int, cut: bool) -> VmExit | None:
        self.translations.refused, self.translations.at_limit = None, False
        error = self.engine.run(budget, cut=cut)
        spent = budget - self.engine.context.budget
        stopped = self.engine.context.stopped
        if stopped or self.translations.at_limit:
            self._count(spent)
            return self._after_stop(stopped, budget)
        return self._after_event(error, spent)

    def _count(self, instructions: int) -> None:
        self._left -= instructions
        self.statistics.instructions += instructions

    def _after_stop(self, stopped: int, budget: int) -> VmExit | None:
        if stopped == TO_SCAN:
            self.view.make(self.engine)
        elif stopped == FULL:
            self.engine.forget_blocks()
            self.view.forget_blocks()
            self._positions.clear()
        elif budget > 1 and not self.engine.context.kick:
            self._cut = True
        return None

    def _after_event(self, error: int, spent: int) -> VmExit | None:
        """The engine stopped inside a block, or at one that it could not fetch."""
        env = self.engine.env
        if self.translations.refused is not None:
            fault, access = self.translations.refused
            self._count(spent if access is Access.FETCH else spent - self._unfinished())
            return self._after_refusal(fault, access)
        vector = UD if error == ILLEGAL else self.engine.exception
        if error not in (0, EXCEPTION, ILLEGAL):
            raise HostError(f"a translation leads to where no memory is (unicorn error {error})")
        if not error or not 0 <= vector < 32:
            # It stopped by itself at what should have been replaced, so it is no instruction here.
            self._count(spent)
            raise Fault(UD)
        if vector == BP and env.u32[IS_INT // 4]:
            return self._after_int3(spent)
        if vector == OF and env.u32[IS_INT // 4]:
            self._count(spent)
            return self._trap(OF)
        if vector == DB:
            self._count(spent)
            self._sync()
            self.state.dr6 |= env.u64[DR // 8 + 6] & STEP
            return self._raise(Fault(DB))
        self._count(spent - self._unfinished())
        raise Fault(vector, env.error_code & 0xFFFF if vector in WITH_ERROR_CODE else None)

    def _after_int3(self, spent: int) -> VmExit | None:
        env = self.engine.env
        at = env.linear_rip - 1 & (2**64 - 1 if env.hflags & HF_CS64 else 0xFFFF_FFFF)
        if self.view.code(at, 1) == INT3:
            self._count(spent)
            return self._trap(BP)
        self._count(spent - 1)
        env.u64[EIP // 8] = env.rip - 1 & (2**64 - 1 if env.bits == 64 else 0xFFFF_FFFF)
        return self._act(self._instruction())

    def _trap(self, vector: int) -> VmExit | None:
        """INT3 or INTO, which has been executed; the event belongs to the instruction."""
        self._sync()
        self.state.rip -= 1
        event = Event(vector, EventType.SOFTWARE_EXCEPTION, None, 1)
        return self._going_on(self.delivery.software(event))

    def _after_refusal(self, fault: PageFault | EptFault, access: Access) -> VmExit | None:
        env, exact = self.engine.env, self.engine.fault_address
        if access is Access.FETCH and exact // PAGE != env.linear_rip // PAGE:
            # The translator looks ahead; the instruction at hand may not reach that page at all.
            instruction = self._instruction()
            if not self._crosses(instruction):
                return self._one()
        if isinstance(fault, PageFault):
            raise Fault(PF, fault.code, cr2=exact)
        physical = fault.physical
        if fault.qualification & _FINAL or fault.reason != Reason.EPT_VIOLATION:
            physical = physical & ~(PAGE - 1) | exact % PAGE
        raise EptFault(fault.reason, fault.qualification, exact, physical)

    def _crosses(self, instruction: Instruction) -> bool:
        return self.engine.env.linear_rip % PAGE + instruction.len > PAGE

    def _unfinished(self) -> int:
        """How many instructions of the current block were counted and have not been executed."""
        context, env = self.engine.context, self.engine.env
        if context.count <= 1:
            return int(context.count)
        key = context.block, env.rip
        done = self._positions.get(key)
        if done is None:
            length = env.linear_rip - context.pc
            code = self.view.code(context.pc, length) if 0 <= length < PAGE else b""
            done = self._positions[key] = self._scanner.position(code, env.bits)
        return max(int(context.count) - done, 0)

    # --- One instruction ---

    def _one(self) -> VmExit | None:
        """Execute the instruction at RIP, and no more."""
        instruction = self._instruction()
        if self._scanner.sensitive(instruction, self.engine.env.cpl == 3):
            return self._act(instruction)
        return self._go(1, cut=True)

    def _instruction(self) -> Instruction:
        """The one at RIP, from its own bytes; its second page is fetched only if it has one."""
        env = self.engine.env
        at, bits = env.linear_rip, env.bits
        room = PAGE - at % PAGE
        if at // PAGE not in self.view.frames:
            self.view.fetch(at, self.translations.ask(at, Access.FETCH, env.cpl == 3).frame)
        found = self._scanner.decode(self.view.code(at, min(LONGEST, room)), bits)
        if found.len and found.len <= room and (found.code or room >= LONGEST):
            return found
        following = at + room
        frame = self.translations.ask(following, Access.FETCH, env.cpl == 3).frame
        self.view.fetch(following, frame)
        return self._scanner.decode(self.view.code(at, LONGEST), bits)

    def _act(self, instruction: Instruction) -> VmExit | None:
        """What a sensitive instruction does in this ring, under these controls."""
        handler = self._handlers.of(instruction)
        if handler not in STATELESS:
            self._sync()
        self.shadow = 0
        result = handler(self, instruction)
        if isinstance(result, VmExit):
            return result
        if result in (Outcome.NATIVE, Outcome.IMPLICIT):
            return self._natively(result is Outcome.IMPLICIT)
        self.statistics.instructions_replaced += 1
        return self._complete(instruction, result)

    def _natively(self, implicit: bool) -> VmExit | None:
        self._resume()
        self.translations.implicit = implicit
        try:
            return self._go(1, cut=True)
        finally:
            self.translations.implicit = False

    def _complete(self, instruction: Instruction, result: Outcome) -> VmExit | None:
        state = self.state
        if result is Outcome.DONE:
            mask = 2**64 - 1 if state.bits == 64 else 0xFFFF_FFFF
            state.rip = state.rip + instruction.len & mask
        stepped = state.rflags & RFLAGS_TF
        state.rflags &= ~RFLAGS_RF
        state.interruptibility = state.interruptibility & ~SHADOWED | self.shadow
        self._count(1)
        if stepped:
            state.dr6 |= STEP
            return self._raise(Fault(DB))
        self._resume()
        return None

    # --- Exceptions and interrupts ---

    def _raise(self, fault: Fault) -> VmExit | None:
        self._sync()
        return self._going_on(self.delivery.fault(fault))

    def deliver_software(self, event: Event) -> Outcome | VmExit:
        return self.delivery.software(event) or Outcome.JUMPED

    # --- For a hypervisor ---

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """What this processor can do: EAX, EBX, ECX, EDX."""
        return self.engine.cpuid(leaf, subleaf)

    def wrote(self, hpa: int, size: int) -> None:
        """Somebody else changed memory: blocks translated from it are dropped."""
        self.engine.write(hpa, self.physical.read(hpa, size))

    def step_emulated(
        self,
        state: CpuState,
        controls: Controls,
        pages: Mapping[int, int],
        reader: Reader,
        writer: Writer,
    ) -> VmExit | None:
        """One instruction, of which accesses to ``pages`` (linear page: guest-physical page) are answered by
        ``reader(gpa, size)`` and ``writer(gpa, size, value)``, in pieces of up to 4 bytes.

        A repeated string instruction goes on to its end, or as long as it stays in these pages. What exits
        or faults comes back as from ``enter``: say, the violation of a second page, to be added to ``pages``.
        """
        self._begin(state, controls)
        self._left = FOREVER
        self._resume()
        with self.window.opened(pages, reader, writer):
            exit = self._guarded(self._whole_instruction)
        self._sync()
        return exit

    def _whole_instruction(self) -> VmExit | None:
        before, start = self.statistics.instructions, self.engine.env.rip
        instruction = self._instruction()
        repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
        while True:
            exit = self._one()
            begun = self.statistics.instructions != before
            if exit is not None or (begun and not (repeated and self.engine.env.rip == start)):
                return exit
            if begun and self.engine.context.kick:
                return None
