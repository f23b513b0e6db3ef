"""The core by intercept: guest code runs at full speed on unicorn's SVM, and stops where SVM stops it.

::

    enter ── load state, intercepts ──> run ──> #VMEXIT ──> svm_exits ──┬─> VmExit: save state
                                         ^                              │
                                         └── carried out, or injected ──┘

The world switch of VMRUN and #VMEXIT is done here, in Python, on the live registers: unicorn's own flushes
its TLB on the way in and on the way out. All that happens between is its C code: intercept checks, the
guest's own exceptions through its own IDT, and nested paging.

With EPT on the core walks an NPT of its own, made from the EPT (``npt.py``); with EPT off, the tables
that CR3 points at in host-physical memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

from iced_x86 import Code

from hostel.errors import MemoryFault
from hostel.soft.exceptions import GP, PF, UD, fault
from hostel.soft.paging.nested import FINAL, EptWalker, pointers_of
from hostel.soft.paging.walk import asked
from hostel.soft.physical import PAGE, PhysicalMemory, Span
from hostel.soft.silicon import (
    Access,
    Controls,
    CoreStatistics,
    EptFault,
    Event,
    EventType,
    PageFault,
    Pin,
    Primary,
    Reason,
    Secondary,
    VmExit,
)
from hostel.soft.state import ACTIVE, BLOCKED_BY_NMI, HALTED, RFLAGS_IF, CpuState

from . import vmcb
from .delivery import ept_exit
from .npt import NestedTables
from .svm_astray import is_astray, take_back
from .svm_decode import LONGEST, Fetcher
from .svm_env import Environment, translation_key
from .svm_exit import Exit, on_top, software_event
from .svm_exits import HANDLERS, fast_call
from .svm_host import REQUEST_EVENT, REQUEST_WINDOW, Processor, address_of
from .svm_memory import GuestView
from .vmcb import Vmcb

_OWN_HPA = (1 << 40) - (64 << 20)
"""Where the core sees memory of its own: below MAXPHYADDR, above everything that PhysicalMemory gives."""
_OWN_PAGES = 1024
_MSRPM_PAGES = 2
_FOREVER = 1 << 62
_EXTERNAL, _TIMER = int(Pin.EXTERNAL_INTERRUPT), int(Pin.PREEMPTION_TIMER)
_WINDOW, _NMI_WINDOW = int(Primary.INTERRUPT_WINDOW), int(Primary.NMI_WINDOW)
_HLT = int(Primary.HLT)
_EPT, _DESCRIPTOR_TABLE = int(Secondary.EPT), int(Secondary.DESCRIPTOR_TABLE)
_WITHOUT_INSTRUCTION = {
    vmcb.SHUTDOWN: Reason.TRIPLE_FAULT,
    vmcb.VINTR: Reason.INTERRUPT_WINDOW,
}
_ANY = (1 << 64) - 1
_UNDEFINED = vmcb.EXCEPTION + UD
_NOTHING: tuple[int, Access] = (0, Access.READ)


class SvmCore:
    """Implements ``silicon.Core``."""

    def __init__(self, physical: PhysicalMemory) -> None:
        self._physical = physical
        self._processor = Processor()
        self.statistics = CoreStatistics()
        self._own = mmap.mmap(-1, _OWN_PAGES * PAGE)
        memory = memoryview(self._own)
        self._processor.map(Span(_OWN_HPA, len(self._own), address_of(self._own)))
        for span in physical.spans:
            self._processor.map(span)
        physical.on_span.append(self._processor.map)
        self._processor.prepare()
        self._shared = self._processor.shared
        self._environment = Environment(self._processor)
        first = 1 + _MSRPM_PAGES
        memory[PAGE : first * PAGE] = b"\xff" * (_MSRPM_PAGES * PAGE)
        self._vmcb = Vmcb(memory[:PAGE], _OWN_HPA, self._processor.env, _OWN_HPA + PAGE)
        self._nested = NestedTables(
            memory[first * PAGE :], _OWN_HPA + first * PAGE, self._processor.no_execute
        )
        self._fetcher = Fetcher(self._processor.cpu, self._walk_code)
        self._key: tuple[object, ...] = ()
        self._machine = 0
        """Whose blocks are translated: an EPT's, or without one a VPID's (negative)."""
        self._state = CpuState()
        self._controls = Controls()
        self._kicked = threading.Event()
        self._injected: Event | None = None
        self._missing = _NOTHING
        self._lost = -1
        """RIP of an instruction whose bytes could not be had."""
        self._events = self._start = 0

    # --- The contract ---

    def enter(self, state: CpuState, controls: Controls, event: Event | None = None) -> VmExit:
        self._state, self._controls = state, controls
        self._shared.budget = self._start = controls.timer if controls.pin & _TIMER else _FOREVER
        before = self._shared.events
        self._switch_machine(controls)
        try:
            return self._until_exit(event)
        finally:
            self.statistics.instructions += self._start - self._shared.budget
            self.statistics.events_delivered += self._shared.events - before

    def _switch_machine(self, controls: Controls) -> None:
        machine = controls.ept_pointer if controls.secondary & _EPT else -controls.vpid
        if machine != self._machine:
            self._machine = machine
            self._processor.forget_blocks()

    def interrupt(self) -> None:
        self._kicked.set()
        self._shared.kick = 1

    def flush(self, address: int | None = None) -> None:
        self.statistics.flushes += 1
        self._processor.flush(address)
        if address is None:
            self._nested.clear()

    def forget(self) -> None:
        """Translations and translated code: the guest has run elsewhere meanwhile."""
        self._processor.flush()
        self._processor.forget_blocks()

    def wrote(self, hpa: int, size: int) -> None:
        """Somebody else changed memory: blocks translated from it are dropped."""
        for span in self._physical.spans:
            if span.hpa <= hpa < span.hpa + span.size:
                self._processor.forget_code(span.hva + hpa - span.hpa, size)

    def save_fpu(self) -> bytes:
        return self._environment.fpu()

    def load_fpu(self, data: bytes) -> None:
        self._environment.set_fpu(data)

    def close(self) -> None:
        if self._processor.map in self._physical.on_span:
            self._physical.on_span.remove(self._processor.map)
        self._processor.close()

    @property
    def exit_code(self) -> int:
        """EXITCODE of the last #VMEXIT, as SVM counts them (APM vol. 2 appendix C)."""
        return self._shared.exit - 0x100

    # --- The loop ---

    def _until_exit(self, event: Event | None) -> VmExit:
        while True:
            exit = self._before(event)
            if exit is not None:
                return exit
            self._load(event)
            self._processor.run(self._state.rip)
            self._environment.save(self._state)
            exit, event = self._after()
            if exit is not None:
                return exit

    def _before(self, event: Event | None) -> VmExit | None:
        """What exits before the first instruction (SDM vol. 3C §26.6.4 to §26.6.6)."""
        state, controls = self._state, self._controls
        if event is not None:
            state.activity = ACTIVE
            return None
        if controls.pin & _EXTERNAL and self._kicked.is_set():
            return self._interrupted()
        opened = state.rflags & RFLAGS_IF and not state.interruptibility & 3
        if controls.primary & _WINDOW and opened:
            state.activity = ACTIVE
            return VmExit(Reason.INTERRUPT_WINDOW)
        unblocked = not state.interruptibility & BLOCKED_BY_NMI
        if controls.primary & _NMI_WINDOW and unblocked:
            state.activity = ACTIVE
            return VmExit(Reason.NMI_WINDOW)
        if controls.pin & _TIMER and self._shared.budget <= 0:
            return VmExit(Reason.PREEMPTION_TIMER)
        return self._halted() if state.activity == HALTED else None

    def _halted(self) -> VmExit:
        """Nothing more will happen in the guest: its timer runs out, or somebody interrupts."""
        if self._controls.pin & _TIMER:
            self._shared.budget = 0
            return VmExit(Reason.PREEMPTION_TIMER)
        self._kicked.wait()
        return self._interrupted()

    def _interrupted(self) -> VmExit:
        self._kicked.clear()
        self._shared.kick = 0
        if self._kicked.is_set():  # another came between the two
            self._shared.kick = 1
        return VmExit(Reason.EXTERNAL_INTERRUPT)

    def _load(self, event: Event | None) -> None:
        state, controls = self._state, self._controls
        nested = self._nested.root if controls.secondary & _EPT else 0
        key = (*translation_key(state), controls.ept_pointer if nested else 0)
        if key != self._key:
            if key[-1] != (self._key[-1] if self._key else 0):
                self._nested.clear()
            self._processor.flush()
        if self._missing is not _NOTHING and nested:
            self._fill_missing()
        self._environment.load(state, bool(nested))
        self._vmcb.write(controls, state, nested)
        self._shared.address = self._shared.before = 0
        self._shared.cr3 = _ANY if nested else state.cr3
        self._injected, self._events = event, self._shared.events
        request = REQUEST_WINDOW if controls.primary & _WINDOW else 0
        if event is not None:
            self._inject(event)
            request |= REQUEST_EVENT
        self._processor.request.value = request

    def _inject(self, event: Event) -> None:
        """EVENTINJ: our stub takes it, before the first instruction."""
        shared, soft = self._shared, event.type >= EventType.SOFTWARE_INTERRUPT
        shared.vector = event.vector
        if event.type in (EventType.EXTERNAL, EventType.NMI):
            shared.kind = 1
        else:
            shared.kind = 2
            self._environment.set_exception(
                event.error or 0, soft, self._state.rip + event.length if soft else 0
            )
            if not soft:
                self._vmcb.in_delivery(event.vector)
        if event.type is EventType.NMI:
            self._environment.block_nmi()

    def _after(self) -> tuple[VmExit | None, Event | None]:
        """The processor stopped: a VM exit, or the event to go on with (or neither: just go on)."""
        state, shared = self._state, self._shared
        nested = self._controls.ept_pointer if self._controls.secondary & _EPT else 0
        self._key = (*translation_key(state), nested)
        if self._switched():
            state.cr3 = shared.cr3
            return VmExit(Reason.TASK_SWITCH), None  # half done, and to none that could be named
        if state.bits == 64 and is_astray(state, shared):
            self._vectoring()  # whatever this exit is for (a window, a single step): the #GP comes before
            return take_back(state, self._controls, shared, self._walk_code)
        if not shared.exit:
            return self._stopped(), None
        vectoring = self._vectoring()
        code = shared.exit - 0x100
        if code == vmcb.NPF:
            exit, event = self._nested_fault(vectoring)
        else:
            exit, event = self._intercepted(code, vectoring)
        if exit is not None:
            if exit.reason is not Reason.TRIPLE_FAULT:
                exit.vectoring = vectoring
            return exit, None
        return None, event if event is not None else (vectoring if code == vmcb.NPF else None)

    def _switched(self) -> bool:
        """A task switch, which nothing intercepts, has loaded CR3: without EPT it is not the guest's."""
        return self._shared.cr3 not in (_ANY, self._state.cr3)

    def _stopped(self) -> VmExit | None:
        """By the counter: kicked, or out of budget before a whole block."""
        if self._shared.kick:
            if self._controls.pin & _EXTERNAL:
                return self._interrupted()
            self._shared.kick = 0
            return None
        if self._shared.budget > 0:
            self._processor.limit(self._shared.budget)
            return None
        return VmExit(Reason.PREEMPTION_TIMER)

    # --- Exits ---

    def _intercepted(
        self, code: int, vectoring: Event | None
    ) -> tuple[VmExit | None, Event | None]:
        if code == vmcb.IRET:
            return self._step(code)
        if code in _WITHOUT_INSTRUCTION:
            return VmExit(_WITHOUT_INSTRUCTION[code]), None
        exit = self._exit(code, vectoring)
        if exit.instruction.code != Code.INVALID:
            self._lost = -1
        elif code not in vmcb.EXCEPTIONS or code == _UNDEFINED:
            if self._is_lost():
                return None, None
            exit.code = _UNDEFINED
        try:
            return self._instruction(exit, vectoring)
        except PageFault as refused:
            self._state.cr2 = refused.address
            return self._on_top(vectoring, fault(PF, refused.code))
        except EptFault as refused:
            return ept_exit(refused), None

    def _instruction(
        self, exit: Exit, vectoring: Event | None
    ) -> tuple[VmExit | None, Event | None]:
        if exit.code in (vmcb.SYSCALL, vmcb.SYSENTER):
            self._shared.budget -= 1
            return None, fast_call(exit)
        if exit.code in (vmcb.IDTR_WRITE, vmcb.GDTR_WRITE, vmcb.TR_WRITE):
            return self._load_table(exit)
        halts = exit.code == vmcb.HLT
        result = self._hlt(exit) if halts else HANDLERS[exit.code](exit, self._physical)
        if exit.inject is not None:
            return self._on_top(vectoring, exit.inject)
        if result is None:
            self._shared.budget -= 1
            if exit.code == vmcb.WRITE_CR + 3:
                self._key = (None, *self._key[1:])  # it flushes, whatever its value
        return result, None

    def _is_lost(self) -> bool:
        """It is none: #UD (LOCK where none may be). Or its page has left the tables of the guest, and was
        still in the TLB: dropped from there, it faults when it is fetched again."""
        if self._fetcher.read == LONGEST or self._lost == self._state.rip:
            return False
        self._lost = self._state.rip
        self._processor.flush()
        return True

    def _exit(self, code: int, vectoring: Event | None) -> Exit:
        shared = self._shared
        return Exit(
            code,
            self._vmcb.exit_info_1,
            self._vmcb.exit_info_2,
            shared.port,
            shared.size,
            shared.address,
            self._state,
            self._controls,
            self._fetcher.instruction(self._state),
            self.statistics.instructions + self._start - shared.budget,
            self._read,
            lambda cr3: pointers_of(self._physical, self._controls, cr3),
            vectoring,
        )

    def _hlt(self, exit: Exit) -> VmExit | None:
        if self._controls.primary & _HLT:
            return exit.exit(Reason.HLT)
        exit.skip()
        self._state.activity = HALTED
        return None

    def _step(self, code: int) -> tuple[VmExit | None, Event | None]:
        """This one instruction, as if it were not intercepted. (IRET opens the NMI window so.)"""
        shared = self._shared
        self._vmcb.let(code)
        rest, shared.budget = shared.budget, 1
        self._processor.limit(1)
        self._processor.run(self._state.rip)
        self._environment.save(self._state)
        shared.budget += rest - 1
        return self._after() if shared.exit or self._switched() else (None, None)

    def _load_table(self, exit: Exit) -> tuple[VmExit | None, Event | None]:
        """LGDT, LIDT, LTR. QEMU takes what is #GP(0): a base that is not canonical, which VM entry refuses; a
        null selector, and aborts at the next switch of stacks."""
        if self._controls.secondary & _DESCRIPTOR_TABLE:
            return HANDLERS[exit.code](exit, self._physical), None
        good = exit.operand() & 0xFFFC if exit.code == vmcb.TR_WRITE else exit.has_good_base()
        return self._step(exit.code) if good else self._on_top(None, fault(GP))

    def _on_top(self, first: Event | None, second: Event) -> tuple[VmExit | None, Event | None]:
        return on_top(first, second, self._controls.exception_bitmap)

    def _vectoring(self) -> Event | None:
        """The event in whose delivery the exit came (IDT-vectoring information)."""
        info, error = self._vmcb.take_vectoring()
        if not info:
            return None
        state, injected, vector = self._state, self._injected, info & 0xFF
        first = self._shared.events == self._events + 1
        self._shared.events -= 1
        if injected is not None and first and injected.vector == vector:
            if injected.type >= EventType.SOFTWARE_INTERRUPT:
                state.rip -= injected.length  # QEMU has stepped over the instruction already
            return injected
        if info >> 8 & 7 == 4:
            return software_event(state, vector, self._walk_code)
        return Event(vector, EventType.HARDWARE_EXCEPTION, error if info & vmcb.HAS_ERROR else None)

    # --- Memory ---

    def _nested_fault(self, vectoring: Event | None) -> tuple[VmExit | None, Event | None]:
        """An entry is missing in our copy: the EPT has it, or this is an EPT violation."""
        shared, gpa = self._shared, self._vmcb.exit_info_2
        ask = asked(self._state, Access(shared.access), shared.index == 1)
        view = GuestView(self._physical, self._state, self._controls, shared.address)
        try:
            page = view.nested_page(gpa, ask, writes=bool(self._vmcb.exit_info_1 & 2))
        except PageFault as refused:
            self._state.cr2 = refused.address
            return self._on_top(vectoring, fault(PF, refused.code))
        except EptFault as refused:
            self._missing = gpa, ask.access
            return ept_exit(refused), None
        except MemoryFault:
            reason = Reason.EPT_MISCONFIGURATION
            return VmExit(reason, linear=shared.address, physical=gpa), None
        self._nested.fill(gpa, page)
        return None, None

    def _fill_missing(self) -> None:
        """What the last EPT violation was about has been mended, most likely: no second nested page fault."""
        (gpa, access), self._missing = self._missing, _NOTHING
        walker = EptWalker(self._physical, self._controls.ept_pointer, 0)
        if not walker.marks:
            with contextlib.suppress(EptFault, MemoryFault):
                page = walker.translate(gpa, access, FINAL)
                self._physical.view(page.address & -PAGE, PAGE)
                self._nested.fill(gpa, page)

    def _read(self, linear: int, size: int) -> bytes:
        return GuestView(self._physical, self._state, self._controls, linear).read(size)

    def _walk_code(self, _: CpuState, linear: int, size: int) -> bytes:
        """Code whose page the core's TLB has dropped; nothing, if it is not there."""
        try:
            return self._read(linear, size)
        except (PageFault, EptFault, MemoryFault):
            return b""
