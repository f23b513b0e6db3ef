"""The IOAPIC (82093AA data sheet): 24 pins to messages. Programmed at boot, it then only forwards."""

from __future__ import annotations

from .lapic import ApicBus, Message

BASE = 0xFEC0_0000
PINS = 24
_SELECT, _WINDOW, _EOI = 0x00, 0x10, 0x40
_LEVEL, _REMOTE_IRR, _MASKED, _LOGICAL = 1 << 15, 1 << 14, 1 << 16, 1 << 11
_READ_ONLY = _REMOTE_IRR | 1 << 12


class Ioapic:
    """A ``Device`` of 4 KiB at ``BASE``, and the target of wires (``set``)."""

    def __init__(self, bus: ApicBus) -> None:
        self._bus = bus
        self.reset()

    def reset(self) -> None:
        self.entries = [_MASKED] * PINS
        self.levels = [False] * PINS
        self._selected = 0
        self._id = 0

    # --- Wires and messages ---

    def set(self, pin: int, level: bool) -> None:
        """A wire changes. An edge that meets a masked pin is lost; a level is seen when unmasked."""
        risen = level and not self.levels[pin]
        self.levels[pin] = level
        if risen or (level and self.entries[pin] & _LEVEL):
            self._forward(pin)

    def _forward(self, pin: int) -> None:
        entry = self.entries[pin]
        if entry & _MASKED or entry & _REMOTE_IRR:
            return
        message = Message(
            mode=entry >> 8 & 7,
            vector=entry & 0xFF,
            destination=entry >> 56,
            logical=bool(entry & _LOGICAL),
            level=bool(entry & _LEVEL),
        )
        if self._bus.send(message) and entry & _LEVEL:
            self.entries[pin] |= _REMOTE_IRR

    def end_of_interrupt(self, vector: int) -> None:
        """From a local APIC: a wire that is still high interrupts again."""
        for pin, entry in enumerate(self.entries):
            if entry & 0xFF == vector and entry & _LEVEL and entry & _REMOTE_IRR:
                self.entries[pin] &= ~_REMOTE_IRR
                if self.levels[pin]:
                    self._forward(pin)

    # --- Registers ---

    def read(self, offset: int, size: int) -> bytes:
        value = {_SELECT: self._selected, _WINDOW: self._read()}.get(offset & ~3, 0)
        return value.to_bytes(8, "little")[offset & 3 :][:size].ljust(size, b"\0")

    def _read(self) -> int:
        if self._selected == 0:
            return self._id
        if self._selected == 1:
            return 0x20 | (PINS - 1) << 16
        pin, half = divmod(self._selected - 0x10, 2)
        return self.entries[pin] >> 32 * half & 0xFFFF_FFFF if 0 <= pin < PINS else 0

    def write(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data[:4], "little")
        if offset == _SELECT:
            self._selected = value & 0xFF
        elif offset == _WINDOW:
            self._write(value)
        elif offset == _EOI:
            self.end_of_interrupt(value & 0xFF)

    def _write(self, value: int) -> None:
        if self._selected == 0:
            self._id = value & 0x0F00_0000
        pin, half = divmod(self._selected - 0x10, 2)
        if not 0 <= pin < PINS:
            return
        old = self.entries[pin]
        if half:
            self.entries[pin] = value << 32 | old & 0xFFFF_FFFF
            return
        self.entries[pin] = old & ~0xFFFF_FFFF | value & 0x1_FFFF & ~_READ_ONLY | old & _READ_ONLY
        if not value & _LEVEL:  # as an edge it owes no EOI
            self.entries[pin] &= ~_REMOTE_IRR
        elif self.levels[pin]:
            self._forward(pin)
