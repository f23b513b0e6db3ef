"""Delivery of exceptions and interrupts through the guest's IDT, as the processor does it.

::

    vector ── IDTR ──> gate ── selector ──> code descriptor ──> new CS:RIP
                        │ IST, or a ring further in: stack from the TSS
    pushed, from above: [SS, RSP]  RFLAGS  CS  RIP  [error code]

Pure functions over a ``CpuState`` and a ``Memory``: no core is needed. Nothing of the state changes unless
the whole delivery succeeds; a fault on the way is raised as ``Fault``, what the hypervisor has to see
(an EPT violation, a task gate) passes through.

SDM vol. 3A §6.12 (protected mode), §6.14 (64-bit), §20.1.4 (real mode). Virtual-8086 mode is not simulated.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple, Protocol

from hostel.soft.exceptions import BP, DB, DF, GP, MC, NMI, NP, OF, PF, SS, TS
from hostel.soft.silicon import Event, EventType, PageFault
from hostel.soft.state import (
    CR0_PE,
    RFLAGS_AC,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    RIGHTS_UNUSABLE,
    RSP,
    CpuState,
    Segment,
    canonical,
)

_NOT_FAULTS = frozenset((DB, NMI, BP, OF, DF, MC))
"""All other exceptions push RF set, so that an instruction breakpoint does not fire twice (§17.3.1.1)."""
SOFTWARE = (
    EventType.SOFTWARE_INTERRUPT,
    EventType.PRIVILEGED_SOFTWARE_EXCEPTION,
    EventType.SOFTWARE_EXCEPTION,
)
_CHECKED = (EventType.SOFTWARE_INTERRUPT, EventType.SOFTWARE_EXCEPTION)
"""INT n, INT3 and INTO need a gate that their ring may use; INT1 does not (§6.12.1.2)."""
_CODE, _CONFORMING, _WRITABLE, _ACCESSED, _S, _PRESENT, _LONG, _BIG = (
    8,
    4,
    2,
    1,
    0x10,
    0x80,
    1 << 13,
    1 << 14,
)


_QWORDS = {count: Struct(f"<{count}Q") for count in (5, 6)}


STEP = 1 << 14
"""DR6.BS: a single step (vol. 3B §17.2.3)."""


class Fault(Exception):
    """An exception of the guest's own."""

    def __init__(
        self, vector: int, error: int | None = None, *, cr2: int = 0, dr6: int = STEP
    ) -> None:
        super().__init__(f"exception {vector}")
        self.dr6 = dr6
        """Of #DB: what DR6 gets."""
        self.vector = vector
        self.error = error
        self.cr2 = cr2

    @property
    def event(self) -> Event:
        return Event(self.vector, EventType.HARDWARE_EXCEPTION, self.error)


class TaskGate(Exception):
    """The IDT asks for a task switch, which always exits (SDM vol. 3C §25.2)."""

    def __init__(self, selector: int) -> None:
        super().__init__(f"task gate {selector:#x}")
        self.selector = selector


class Memory(Protocol):
    """Linear memory of the guest. Raises ``PageFault`` and ``EptFault``."""

    def read(self, address: int, size: int, user: bool = False) -> int: ...
    def write(self, address: int, size: int, value: int, user: bool = False) -> None: ...
    def write_bytes(self, address: int, data: bytes, user: bool = False) -> None: ...


class _Gate(NamedTuple):
    selector: int
    offset: int
    rights: int
    ist: int

    @property
    def dpl(self) -> int:
        return self.rights >> 5 & 3

    @property
    def wide(self) -> bool:
        """Of 32 bits, not 16."""
        return bool(self.rights & 8)


def deliver(state: CpuState, memory: Memory, event: Event, return_rip: int) -> None:
    """Enter the guest's handler. ``return_rip``: what it will return to."""
    try:
        if not state.cr0 & CR0_PE:
            _real(state, memory, event, return_rip)
        elif state.long_mode:
            _long(state, memory, event, return_rip)
        else:
            _protected(state, memory, event, return_rip)
    except PageFault as fault:
        raise Fault(PF, fault.code, cr2=fault.address) from None


def _pushed_flags(state: CpuState, event: Event) -> int:
    fault = event.type is EventType.HARDWARE_EXCEPTION and event.vector not in _NOT_FAULTS
    return state.rflags | RFLAGS_RF if fault else state.rflags


def _real(state: CpuState, memory: Memory, event: Event, return_rip: int) -> None:
    if 4 * event.vector + 3 > state.idtr.limit:
        raise Fault(GP)
    entry = memory.read(state.idtr.base + 4 * event.vector, 4)
    rsp = state.gpr[RSP]
    for value in (state.rflags, state.cs.selector, return_rip):
        rsp = rsp & ~0xFFFF | (rsp - 2) & 0xFFFF
        memory.write(state.ss.base + (rsp & 0xFFFF), 2, value & 0xFFFF)
    state.gpr[RSP] = rsp
    state.rflags &= ~(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF)
    state.cs.selector = entry >> 16
    state.cs.base = state.cs.selector << 4
    state.rip = entry & 0xFFFF


def _gate(state: CpuState, memory: Memory, event: Event, size: int) -> _Gate:
    """The IDT's entry, checked as far as it goes by itself."""
    external = event.type not in SOFTWARE
    code = event.vector << 3 | 2 | external
    if size * event.vector + size - 1 > state.idtr.limit:
        raise Fault(GP, code)
    raw = memory.read(state.idtr.base + size * event.vector, size)
    rights = raw >> 40 & 0xFF
    kinds = (0xE, 0xF) if size == 16 else (5, 6, 7, 0xE, 0xF)
    if rights & 0x1F not in kinds:
        raise Fault(GP, code)
    offset = raw & 0xFFFF
    if rights & 8:
        offset |= raw >> 32 & 0xFFFF_0000
    if size == 16:
        offset |= (raw >> 64 & 0xFFFF_FFFF) << 32
    gate = _Gate(raw >> 16 & 0xFFFF, offset, rights, raw >> 32 & 7)
    if event.type in _CHECKED and gate.dpl < state.cpl:
        raise Fault(GP, code)
    if not rights & _PRESENT:
        raise Fault(NP, code)
    if rights & 0x1F == 5:
        raise TaskGate(gate.selector)
    return gate


def descriptor(state: CpuState, memory: Memory, selector: int, fault: int, external: int) -> int:
    """The eight bytes that a selector names, or ``fault`` with the selector as its error code."""
    index = selector & ~7
    table = state.ldtr if selector & 4 else state.gdtr
    unusable = selector & 4 and not state.ldtr.usable
    if unusable or index + 7 > table.limit:
        raise Fault(fault, selector & ~3 | external)
    return memory.read(table.base + index, 8)


def segment_of(selector: int, raw: int) -> Segment:
    """A segment register's hidden part, from a descriptor."""
    limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
    rights = raw >> 40 & 0xF0FF
    if rights & 0x8000:
        limit = limit << 12 | 0xFFF
    base = raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000
    return Segment(selector, base, limit, rights)


def _handler(state: CpuState, memory: Memory, gate: _Gate, external: int) -> Segment:
    """The code segment of a gate (§6.12.1), with its RPL set to the ring that it will run in."""
    if not gate.selector & ~3:
        raise Fault(GP, external)
    raw = descriptor(state, memory, gate.selector, GP, external)
    segment = segment_of(gate.selector, raw)
    rights, error = segment.rights, gate.selector & ~3 | external
    if rights & (_S | _CODE) != _S | _CODE or segment.dpl > state.cpl:
        raise Fault(GP, error)
    if state.long_mode and rights & (_LONG | _BIG) != _LONG:
        raise Fault(GP, error)
    if not rights & _PRESENT:
        raise Fault(NP, error)
    if not rights & _ACCESSED:
        table = state.ldtr if gate.selector & 4 else state.gdtr
        memory.write(table.base + (gate.selector & ~7) + 5, 1, rights & 0xFF | _ACCESSED)
        segment.rights |= _ACCESSED
    ring = state.cpl if rights & _CONFORMING else segment.dpl
    segment.selector = gate.selector & ~3 | ring
    return segment


def _enter(state: CpuState, gate: _Gate, segment: Segment, rsp: int, stack: Segment | None) -> None:
    """The point of no return: all that could fault is done."""
    if stack is not None:
        state.ss = stack
    state.cs = segment
    state.gpr[RSP] = rsp
    state.rip = gate.offset
    state.rflags &= ~(RFLAGS_TF | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT)
    if not gate.rights & 1:
        state.rflags &= ~RFLAGS_IF


# --- 64-bit mode ---


def _tss_word(state: CpuState, memory: Memory, offset: int, size: int, external: int) -> int:
    if offset + size - 1 > state.tr.limit:
        raise Fault(TS, state.tr.selector & ~3 | external)
    return memory.read(state.tr.base + offset, size)


def _long(state: CpuState, memory: Memory, event: Event, return_rip: int) -> None:
    external = int(event.type not in SOFTWARE)
    gate = _gate(state, memory, event, 16)
    segment = _handler(state, memory, gate, external)
    ring = segment.selector & 3
    stack = None
    if gate.ist:
        rsp = _tss_word(state, memory, 0x1C + 8 * gate.ist, 8, external)
    elif ring < state.cpl:
        rsp = _tss_word(state, memory, 4 + 8 * ring, 8, external)
    else:
        rsp = state.gpr[RSP]
    if not canonical(rsp):
        raise Fault(SS, external)
    if not canonical(gate.offset):
        raise Fault(GP, external)
    if ring < state.cpl:
        stack = Segment(ring, 0, 0, RIGHTS_UNUSABLE | ring << 5)
    frame = [state.ss.selector, state.gpr[RSP], _pushed_flags(state, event)]
    frame += [state.cs.selector, return_rip]
    if event.error is not None:
        frame.append(event.error)
    rsp = (rsp & ~15) - 8 * len(frame) & 2**64 - 1
    frame.reverse()
    memory.write_bytes(rsp, _QWORDS[len(frame)].pack(*frame), ring == 3)
    _enter(state, gate, segment, rsp, stack)


# --- Protected mode ---


def _protected(state: CpuState, memory: Memory, event: Event, return_rip: int) -> None:
    external = int(event.type not in SOFTWARE)
    gate = _gate(state, memory, event, 8)
    segment = _handler(state, memory, gate, external)
    ring = segment.selector & 3
    if gate.offset > segment.limit:
        raise Fault(GP, external)
    frame = [_pushed_flags(state, event), state.cs.selector, return_rip]
    if event.error is not None:
        frame.append(event.error)
    stack, rsp = state.ss, state.gpr[RSP]
    if ring < state.cpl:
        stack, rsp = _inner_stack(state, memory, ring, external)
        frame = [state.ss.selector, state.gpr[RSP], *frame]
    rsp = _push(memory, stack, rsp, frame, 4 if gate.wide else 2)
    _enter(state, gate, segment, rsp, stack)


def _inner_stack(state: CpuState, memory: Memory, ring: int, external: int) -> tuple[Segment, int]:
    """SS:ESP of a ring further in, from the TSS (§6.12.1)."""
    if state.tr.rights & 8:
        rsp = _tss_word(state, memory, 4 + 8 * ring, 4, external)
        selector = _tss_word(state, memory, 8 + 8 * ring, 2, external)
    else:
        rsp = _tss_word(state, memory, 2 + 4 * ring, 2, external)
        selector = _tss_word(state, memory, 4 + 4 * ring, 2, external)
    error = selector & ~3 | external
    if not selector & ~3:
        raise Fault(TS, external)
    stack = segment_of(selector, descriptor(state, memory, selector, TS, external))
    data = stack.rights & (_S | _CODE | _WRITABLE) == _S | _WRITABLE
    if selector & 3 != ring or stack.dpl != ring or not data:
        raise Fault(TS, error)
    if not stack.rights & _PRESENT:
        raise Fault(SS, error)
    return stack, rsp


def _push(memory: Memory, stack: Segment, rsp: int, frame: list[int], size: int) -> int:
    mask = 0xFFFF_FFFF if stack.rights & _BIG else 0xFFFF
    grows_down, user = stack.rights & 4, stack.dpl == 3
    for value in frame:
        rsp = rsp & ~mask | (rsp - size) & mask
        offset = rsp & mask
        inside = offset > stack.limit if grows_down else offset + size - 1 <= stack.limit
        if not inside:
            raise Fault(SS, 0)
        memory.write((stack.base + offset) & 0xFFFF_FFFF, size, value & (1 << 8 * size) - 1, user)
    return rsp
