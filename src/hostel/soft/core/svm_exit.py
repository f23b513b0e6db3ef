"""One #VMEXIT as its handler sees it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from iced_x86 import Instruction, OpKind

from hostel.soft.exceptions import DF, TripleFault, combine
from hostel.soft.physical import PhysicalMemory
from hostel.soft.register_checks import Pointers
from hostel.soft.silicon import Controls, Event, EventType, Primary, Reason, VmExit
from hostel.soft.state import CpuState, canonical

from . import svm_decode as decode

_U32 = 0xFFFF_FFFF


class Exit(msgspec.Struct):
    """What a handler looks at."""

    code: int
    info1: int
    info2: int
    port: int
    size: int
    linear: int
    """The address of the last access that missed the TLB; 0 if there was none."""
    state: CpuState
    controls: Controls
    instruction: Instruction
    time: int
    """Guest instructions so far."""
    read: Callable[[int, int], bytes]
    """Guest memory by linear address, as a supervisor; may raise ``PageFault``."""
    pointers: Pointers
    vectoring: Event | None = None
    inject: Event | None = None

    @property
    def tsc(self) -> int:
        controls = self.controls
        offset = controls.tsc_offset if controls.primary & Primary.TSC_OFFSETTING else 0
        return self.time + offset & (1 << 64) - 1

    def fault(self, vector: int, error: int | None = None) -> VmExit | None:
        """No VM exit: the guest gets this exception."""
        self.inject = Event(vector, EventType.HARDWARE_EXCEPTION, error)
        return None

    def operand(self) -> int:
        """The 16 bits of LMSW's, or LTR's; may raise ``PageFault``."""
        instruction = self.instruction
        if instruction.op0_kind == OpKind.MEMORY:
            data = self.read(decode.linear_address(instruction, self.state), 2)
            return int.from_bytes(data, "little")
        return self.state.gpr[decode.number(instruction.op0_register)] & 0xFFFF

    def has_good_base(self) -> bool:
        """Of LGDT's and LIDT's operand; may raise ``PageFault``."""
        if self.state.bits != 64:
            return True
        data = self.read(decode.linear_address(self.instruction, self.state), 10)
        return canonical(int.from_bytes(data[2:], "little"))

    def skip(self) -> VmExit | None:
        """No VM exit: the instruction is done."""
        self.state.rip = _wrapped(self.state, self.state.rip + self.instruction.len)
        self.state.interruptibility &= ~3
        return None

    def exit(
        self, reason: Reason, qualification: int = 0, *, linear: int = 0, instruction_info: int = 0
    ) -> VmExit:
        return VmExit(
            reason,
            qualification,
            self.instruction.len,
            linear,
            instruction_info=instruction_info,
        )


def _wrapped(state: CpuState, rip: int) -> int:
    return rip & ((1 << 64) - 1 if state.bits == 64 else _U32)


Handler = Callable[[Exit, PhysicalMemory], VmExit | None]


def on_top(first: Event | None, second: Event, bitmap: int) -> tuple[VmExit | None, Event | None]:
    """An exception for the guest, maybe while another was being delivered (SDM vol. 3A table 6-5): the exit,
    or the event to inject. ``bitmap``: which exceptions exit."""
    try:
        made = combine(first, second)
    except TripleFault:
        return VmExit(Reason.TRIPLE_FAULT), None
    if made is not second and bitmap >> DF & 1:
        return VmExit(Reason.EXCEPTION_NMI, interruption=made), None
    return None, made


def software_event(
    state: CpuState, vector: int, read: Callable[[CpuState, int, int], bytes]
) -> Event:
    """INT n, INT3 or INTO was under way, and RIP is behind it: step back."""
    linear = state.rip + (0 if state.bits == 64 else state.cs.base)
    short = vector in (3, 4) and read(state, linear - 1, 1) in (b"\xcc", b"\xce")
    length = 1 if short else 2
    state.rip -= length
    kind = EventType.SOFTWARE_EXCEPTION if length == 1 else EventType.SOFTWARE_INTERRUPT
    return Event(vector, kind, None, length)
