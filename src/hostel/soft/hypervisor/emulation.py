"""An access that no VM entry can make: to a device (MMIO), or a write to read-only memory.

::

    exit ── attempt ── reads a device ──► Exit for the monitor ──► its answer ── attempt again … ── done
                                                       writes for the monitor, one Exit each ◄──┘

An attempt that needs an answer is given up without a trace and made anew when the answer is there, like
KVM's emulator. Reads and writes go to the interrupt chips, an eventfd, or the monitor, in this order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostel.hypervisor import Exit, InternalError, MmioExit
from hostel.soft.physical import PAGE
from hostel.soft.silicon import Access, PageFault, Reason
from hostel.soft.vmx.fields import Field

from . import emulator, guest_memory
from .emulator import Unemulated

if TYPE_CHECKING:
    from .vcpu import SoftVcpu

_CODE_64, _CODE_32 = 1 << 13, 1 << 14


class _Ask(Exception):
    """An answer is missing."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__()
        self.gpa, self.size = gpa, size


class _Nowhere(Exception):
    """An instruction is fetched from where there is no memory."""


def begin(vcpu: SoftVcpu, gpa: int) -> Exit | None:
    """``gpa``: what the instruction could not reach."""
    return _attempt(vcpu, gpa, [])


def _attempt(vcpu: SoftVcpu, gpa: int, answers: list[bytes]) -> Exit | None:
    cpu = _Cpu(vcpu, answers)
    try:
        emulator.step(cpu)
    except _Ask as ask:
        return vcpu.ask_mmio(ask.gpa, ask.size, lambda data: _attempt(vcpu, gpa, [*answers, data]))
    except PageFault as error:
        vcpu.inject_page_fault(error)
        return None
    except _Nowhere:
        words = f"an instruction is fetched from GPA {gpa:#x}, where there is no memory"
        return InternalError(Reason.EPT_VIOLATION, (gpa,), words)
    except Unemulated as error:
        words = f"no memory at GPA {gpa:#x}, and this cannot be emulated: {error}"
        return InternalError(Reason.EPT_VIOLATION, (gpa,), words)
    cpu.commit()
    return _write_out(vcpu, cpu.writes)


def _write_out(vcpu: SoftVcpu, writes: list[tuple[int, bytes]]) -> Exit | None:
    """To devices, in order; what the monitor has to do is an ``Exit`` each."""
    for index, (gpa, data) in enumerate(writes):
        machine = vcpu.machine
        if machine.has_chips and machine.irqchip.write_mmio(vcpu.id, gpa, data):
            continue
        if machine.ioeventfds.write(gpa, data, pio=False):
            continue
        if rest := writes[index + 1 :]:
            vcpu.then(lambda _: _write_out(vcpu, rest))
        return MmioExit(gpa, True, memoryview(data))
    return None


class _Cpu:
    """Implements ``emulator.Cpu``: registers as they shall be, kept back until ``commit``."""

    def __init__(self, vcpu: SoftVcpu, answers: list[bytes]) -> None:
        self._vcpu = vcpu
        self._answers = answers
        self._asked = 0
        self._registers: dict[int, int] = {}
        self._rights = vcpu.read(Field.GUEST_CS_RIGHTS)
        self.rip = vcpu.read(Field.GUEST_RIP)
        self.rflags = vcpu.read(Field.GUEST_RFLAGS)
        self.writes: list[tuple[int, bytes]] = []
        """To devices, when all is done."""

    @property
    def bits(self) -> int:
        if self._rights & _CODE_64 and self._vcpu.in_long_mode():
            return 64
        return 32 if self._rights & _CODE_32 else 16

    def register(self, number: int) -> int:
        known = self._registers.get(number)
        return self._vcpu.register(number) if known is None else known

    def set_register(self, number: int, value: int) -> None:
        self._registers[number] = value

    def segment_base(self, name: str) -> int:
        return self._vcpu.read(Field[f"GUEST_{name.upper()}_BASE"])

    def fetch(self, linear: int, size: int) -> bytes:
        """Up to the first byte that cannot be fetched, if the instruction may be shorter."""
        code = b""
        while len(code) < size:
            at = linear + len(code)
            room = min(size - len(code), PAGE - at % PAGE)
            try:
                gpa = guest_memory.translate(self._vcpu, at, Access.FETCH)
            except PageFault:
                if code:
                    break
                raise
            piece = guest_memory.peek(self._vcpu, gpa, room)
            if piece is None:
                if code:
                    break
                raise _Nowhere
            code += piece
        return code

    def load(self, linear: int, size: int) -> bytes:
        pieces = guest_memory.pieces(self._vcpu, linear, size, Access.READ)
        return b"".join(self._load(gpa, length) for gpa, length in pieces)

    def _load(self, gpa: int, size: int) -> bytes:
        data = guest_memory.peek(self._vcpu, gpa, size)
        if data is not None:
            return data
        if self._asked < len(self._answers):
            self._asked += 1
            return self._answers[self._asked - 1]
        machine = self._vcpu.machine
        data = machine.irqchip.read_mmio(self._vcpu.id, gpa, size) if machine.has_chips else None
        if data is None:
            raise _Ask(gpa, size)
        self._answers.append(data)
        self._asked += 1
        return data

    def store(self, linear: int, data: bytes) -> None:
        at = 0
        for gpa, length in guest_memory.pieces(self._vcpu, linear, len(data), Access.WRITE):
            piece, at = data[at : at + length], at + length
            if not guest_memory.poke(self._vcpu, gpa, piece):
                self.writes.append((gpa, piece))

    def commit(self) -> None:
        vcpu = self._vcpu
        for number, value in self._registers.items():
            vcpu.set_register(number, value)
        vcpu.write(Field.GUEST_RIP, self.rip)
        vcpu.write(Field.GUEST_RFLAGS, self.rflags)
        vcpu.end_shadow()
