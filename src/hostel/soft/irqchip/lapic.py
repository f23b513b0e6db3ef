"""The local APIC of one processor (SDM vol. 3A ch. 10): the reason why so much of a hypervisor is about it.

::

    IPI of another ──┐
    IOAPIC, MSI ─────┼─► IRR ──(priority above PPR)──► the processor takes it: ISR ──EOI──► gone
    its own timer ───┘

An IOAPIC sits on the board, is programmed at boot and then only forwards. The local APIC is part of the
processor: every interrupt, IPI, timer tick and EOI passes through it, and whether a vector may interrupt
now depends on what that processor does. So it moves with the vCPU, and is touched all the time.

Registers are reached by MMIO (xAPIC) or MSRs (x2APIC, §10.12). Vectors are bits of Python integers:
bit 32 of ``irr`` is vector 32. Times are nanoseconds of the machine's clock; the timer counts at 1 GHz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from hostel.hypervisor import MsiMessage

BASE = 0xFEE0_0000
ENABLED, X2APIC, BSP = 1 << 11, 1 << 10, 1 << 8
MSR_BASE, MSR_X2APIC, MSR_TSC_DEADLINE = 0x1B, 0x800, 0x6E0

FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = 0, 1, 2, 4, 5, 6, 7
"""Delivery modes (§10.5.1, §10.6.1)."""

ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SVR = 2, 3, 8, 9, 10, 11, 13, 14, 15
ISR, TMR, IRR, ESR = 0x10, 0x18, 0x20, 0x28
ICR, ICR_HIGH, LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x30, 0x31, 0x32, 0x35, 0x36, 0x37
INITIAL, CURRENT, DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F
"""Register numbers: the MMIO offset / 16, and the MSR - 0x800 (§10.4.1, §10.12.1.2)."""

_LVTS = (LVT_TIMER, 0x33, 0x34, LVT_LINT0, LVT_LINT1, LVT_ERROR)
_MASKED = 1 << 16
_PERIODIC, _DEADLINE = 1, 2
_READ_ONLY = {VERSION, APR, PPR, CURRENT}
_X2APIC_ONLY_WRITE = {EOI, SELF_IPI}


class Refused(Exception):
    """The access is a #GP(0) to the guest (an MSR that is not there, a reserved bit)."""


class Message(msgspec.Struct, frozen=True):
    """What travels between APICs (§10.6, §10.11)."""

    mode: int
    vector: int
    destination: int
    logical: bool = False
    level: bool = False
    asserted: bool = True
    shorthand: int = 0
    """0 none, 1 self, 2 all, 3 all but self (§10.6.1)."""
    wide: bool = False
    """The destination has 32 bits: sent in x2APIC mode."""

    @classmethod
    def of_msi(cls, message: MsiMessage) -> Message:
        """§10.11.1; bits 5–11 of the address are the high destination bits of KVM's extension: ours too."""
        high = message.address >> 32 & 0xFFFF_FF00
        return cls(
            mode=message.data >> 8 & 7,
            vector=message.data & 0xFF,
            destination=(message.address >> 12 & 0xFF) | high,
            logical=bool(message.address & 4),
            level=bool(message.data >> 15 & 1),
            wide=bool(high),
        )


class ApicBus(Protocol):
    """What carries messages to the other APICs, and an EOI to the IOAPIC."""

    def send(self, message: Message, sender: Lapic | None = None) -> bool: ...
    def end_of_interrupt(self, vector: int) -> None: ...


class Lapic:
    """One processor's. Its processor looks before each entry what there is to take.

    ``clock`` gives the nanoseconds that the timer counts; ``fire`` is to be called when ``deadline`` has
    come.
    """

    def __init__(self, id: int, bus: ApicBus, clock: Callable[[], int]) -> None:
        self.id = id
        self._bus, self._clock = bus, clock
        self.external: Callable[[], bool] = lambda: False
        """Whether the PIC asks (LINT0 in ExtINT mode, the virtual wire)."""
        self.statistics = {"fixed": 0, "ipis_sent": 0, "timer": 0, "eois": 0, "nmis": 0}
        self.base = BASE | ENABLED | (BSP if id == 0 else 0)
        self.tsc_offset = 0
        """Between the guest's time-stamp counter and ``clock``, if it has written that counter."""
        self.reset()

    def reset(self) -> None:
        """After RESET or INIT (§10.4.7.1, §10.4.7.3); an INIT keeps ``base``."""
        self.irr = self.isr = self.tmr = 0
        self.nmi = self.init = False
        self.sipi: int | None = None
        self._registers = dict.fromkeys(_LVTS, _MASKED)
        self._registers |= {TPR: 0, LDR: 0, DFR: 0xFFFF_FFFF, SVR: 0xFF, ESR: 0}
        self._registers |= {ICR: 0, ICR_HIGH: 0, INITIAL: 0, DIVIDE: 0}
        if (
            self.id == 0
        ):  # firmware leaves the virtual wire to the PIC open (MP specification §3.6.2.2)
            self._registers[LVT_LINT0] = EXTINT << 8
            self._registers[LVT_LINT1] = NMI << 8
        self._start = 0
        self.deadline: int | None = None
        self.tsc_deadline = 0

    # --- What the processor asks ---

    @property
    def enabled(self) -> bool:
        """By the base MSR and the spurious vector register: else it takes no fixed interrupt."""
        return bool(self.base & ENABLED and self._registers[SVR] & 1 << 8)

    @property
    def tpr(self) -> int:
        return self._registers[TPR]

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._set(TPR, value)

    @property
    def ppr(self) -> int:
        """§10.8.3.1."""
        tpr, in_service = self._registers[TPR], max(self.isr.bit_length() - 1, 0)
        return tpr if tpr >> 4 >= in_service >> 4 else in_service & 0xF0

    @property
    def pending(self) -> int | None:
        """The vector that may interrupt now; -1 for the PIC's, whose vector ``acknowledge`` of it gives."""
        vector = self.irr.bit_length() - 1
        if vector >= 0 and vector >> 4 > self.ppr >> 4 and self.enabled:
            return vector
        lint0 = self._registers[LVT_LINT0]
        wired = not self.base & ENABLED or (lint0 & _MASKED == 0 and lint0 >> 8 & 7 == EXTINT)
        return -1 if wired and self.id == 0 and self.external() else None

    def acknowledge(self, vector: int) -> None:
        """The processor takes it: out of IRR, into ISR."""
        self.irr &= ~(1 << vector)
        self.isr |= 1 << vector

    # --- What others send ---

    def matches(self, message: Message) -> bool:
        """Whether a message without shorthand is for this APIC (§10.6.2)."""
        everyone = 0xFFFF_FFFF if message.wide else 0xFF
        if not message.logical:
            return message.destination in (self.id, everyone)
        if self.base & X2APIC:
            cluster, bits = message.destination >> 16, message.destination & 0xFFFF
            mine = self._x2apic_ldr
            return cluster == mine >> 16 and bool(bits & mine & 0xFFFF)
        mine = self._registers[LDR] >> 24
        if self._registers[DFR] >> 28 == 0xF:  # the flat model
            return bool(mine & message.destination)
        return mine >> 4 == message.destination >> 4 and bool(mine & message.destination & 0xF)

    def deliver(self, message: Message) -> bool:
        """False: it is lost, the APIC is off."""
        if message.mode in (FIXED, LOWEST):
            return self._raise(message.vector, level=message.level)
        if message.mode == NMI:
            self.nmi = True
            self.statistics["nmis"] += 1
        elif message.mode == INIT and (message.asserted or not message.level):
            self.init = True
        elif message.mode == SIPI:
            self.sipi = message.vector
        else:
            return False
        return True

    def _raise(self, vector: int, *, level: bool = False) -> bool:
        if not self.enabled:
            return False
        if vector < 16:  # §10.5.2: received illegal vector
            self._registers[ESR] |= 1 << 6
            return False
        bit = 1 << vector
        self.irr |= bit
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        self.statistics["fixed"] += 1
        return True

    # --- Registers by MMIO ---

    def read(self, offset: int, size: int) -> bytes:
        """An access is to be 32 bits at a multiple of 16; a byte of it is answered too."""
        number, at = offset >> 4, offset & 15
        value = self._read(number) if at < 4 and not self.base & X2APIC else 0
        return value.to_bytes(16, "little")[at : at + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        if offset & 15 == 0 and not self.base & X2APIC:
            self._write(offset >> 4, int.from_bytes(data[:4], "little"))

    # --- Registers by MSR ---

    def read_msr(self, index: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE, and x2APIC's; ``Refused`` is a #GP."""
        if index == MSR_BASE:
            return self.base
        if index == MSR_TSC_DEADLINE:
            return self.tsc_deadline
        number = self._x2apic_number(index)
        if number in _X2APIC_ONLY_WRITE:
            raise Refused
        if number == ICR:
            return self._registers[ICR_HIGH] << 32 | self._registers[ICR]
        return self._read(number)

    def write_msr(self, index: int, value: int) -> None:
        if index == MSR_BASE:
            self._set_base(value)
        elif index == MSR_TSC_DEADLINE:
            self._arm_deadline(value)
        else:
            self._write_x2apic(self._x2apic_number(index), value)

    def _x2apic_number(self, index: int) -> int:
        number = index - MSR_X2APIC
        known = number in self._registers or number in _X2APIC_ONLY_WRITE | _READ_ONLY | {ID}
        known = known or ISR <= number < ESR
        if not self.base & X2APIC or not known or number in (DFR, ICR_HIGH, APR):
            raise Refused
        return number

    def _write_x2apic(self, number: int, value: int) -> None:
        if number in _READ_ONLY | {ID, LDR} or ISR <= number < ESR:
            raise Refused
        if number in (EOI, ESR) and value:
            raise Refused
        if number == SELF_IPI:
            self._raise(value & 0xFF)
        elif number == ICR:
            self._registers[ICR_HIGH] = value >> 32
            self._write(ICR, value & 0xFFFF_FFFF)
        elif value >> 32:
            raise Refused
        else:
            self._write(number, value)

    def _set_base(self, value: int) -> None:
        """§10.12.1: which modes may follow which. The page does not move, though §10.4.5 would allow it."""
        mode, wanted = self.base & (ENABLED | X2APIC), value & (ENABLED | X2APIC)
        allowed = {0: (0, ENABLED), ENABLED: (0, ENABLED, ENABLED | X2APIC)}.get(
            mode, (0, ENABLED | X2APIC)
        )
        if wanted not in allowed or value & ~0xFFF != BASE or value & 0x2FF:
            raise Refused
        self.base = BASE | wanted | self.base & BSP
        if not wanted:
            base = self.base
            self.reset()
            self.base = base

    # --- Registers ---

    @property
    def _x2apic_ldr(self) -> int:
        return (self.id >> 4) << 16 | 1 << (self.id & 15)

    @property
    def _ldr(self) -> int:
        return self._x2apic_ldr if self.base & X2APIC else self._registers[LDR]

    def _read(self, number: int) -> int:
        if ISR <= number < ESR:
            bank = (self.isr, self.tmr, self.irr)[(number - ISR) >> 3]
            return bank >> 32 * (number & 7) & 0xFFFF_FFFF
        computed = _COMPUTED.get(number)
        return computed(self) if computed else self._registers.get(number, 0)

    def _write(self, number: int, value: int) -> None:
        if number == EOI:
            self._end_of_interrupt()
        elif number == ESR:
            self._registers[ESR] = 0
        elif number == ICR:
            self._registers[ICR] = value & ~(1 << 12)
            self._send(value)
        elif number in (INITIAL, DIVIDE):
            self._registers[number] = value & (0xB if number == DIVIDE else 0xFFFF_FFFF)
            self._start_timer()
        elif number == LVT_TIMER:
            self._set_timer(value)
        elif number in self._registers:
            self._set(number, value)

    def _set(self, number: int, value: int) -> None:
        masks = {TPR: 0xFF, LDR: 0xFF00_0000, SVR: 0x1FF, ICR_HIGH: 0xFFFF_FFFF}
        if number == DFR:
            value |= 0x0FFF_FFFF
        self._registers[number] = value & masks.get(number, 0xFFFF_FFFF)

    def _end_of_interrupt(self) -> None:
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        self.statistics["eois"] += 1
        if self.tmr >> vector & 1:
            self._bus.end_of_interrupt(vector)

    def _send(self, low: int) -> None:
        """Writing the low half of ICR sends (§10.6.1)."""
        self.statistics["ipis_sent"] += 1
        wide = bool(self.base & X2APIC)
        high = self._registers[ICR_HIGH]
        message = Message(
            mode=low >> 8 & 7,
            vector=low & 0xFF,
            destination=high if wide else high >> 24,
            logical=bool(low >> 11 & 1),
            level=bool(low >> 15 & 1),
            asserted=bool(low >> 14 & 1),
            shorthand=low >> 18 & 3,
            wide=wide,
        )
        if message.mode in (FIXED, LOWEST):  # an IPI is an edge whatever its trigger bit says
            message = msgspec.structs.replace(message, level=False)
        self._bus.send(message, self)

    # --- Timer (§10.5.4) ---

    @property
    def _timer_mode(self) -> int:
        return self._registers[LVT_TIMER] >> 17 & 3

    @property
    def _divisor(self) -> int:
        code = self._registers[DIVIDE]
        exponent = (code & 3 | code >> 1 & 4) + 1
        return 1 << (exponent & 7)

    def _set_timer(self, value: int) -> None:
        changed = (value ^ self._registers[LVT_TIMER]) >> 17 & 3
        self._registers[LVT_TIMER] = value & 0x710FF
        if changed:
            self._registers[INITIAL] = 0
            self.tsc_deadline = 0
            self.deadline = None

    def _start_timer(self) -> None:
        if self._timer_mode == _DEADLINE:
            return
        self._start, count = self._clock(), self._registers[INITIAL]
        self.deadline = self._start + count * self._divisor if count else None

    def _arm_deadline(self, value: int) -> None:
        if self._timer_mode != _DEADLINE:
            return
        self.tsc_deadline = value
        self.deadline = max(value - self.tsc_offset, 1) if value else None  # 0 disarms; past: now

    def _current(self) -> int:
        if self.deadline is None or self._timer_mode == _DEADLINE:
            return 0
        return max(self.deadline - self._clock(), 0) // self._divisor

    def fire(self, now: int) -> None:
        """If the deadline has come. Periods that were missed are one tick, as on a sleeping processor."""
        if self.deadline is None or self.deadline > now:
            return
        period = self._registers[INITIAL] * self._divisor
        if self._timer_mode == _PERIODIC and period:
            self.deadline += (now - self.deadline) // period * period + period
        else:
            self.deadline = None
            self.tsc_deadline = 0
        self.statistics["timer"] += 1
        timer = self._registers[LVT_TIMER]
        if not timer & _MASKED:
            self._raise(timer & 0xFF)


_COMPUTED: dict[int, Callable[[Lapic], int]] = {
    ID: lambda apic: apic.id if apic.base & X2APIC else apic.id << 24,
    VERSION: lambda apic: 0x14 | (len(_LVTS) - 1) << 16,
    PPR: lambda apic: apic.ppr,
    LDR: lambda apic: apic._ldr,
    CURRENT: lambda apic: apic._current(),
}
