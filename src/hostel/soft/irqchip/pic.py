"""Two 8259A in cascade (Intel 8259A data sheet): the interrupts of a machine that has not met its APICs."""

from __future__ import annotations

MASTER, SLAVE, EDGES = 0x20, 0xA0, 0x4D0
"""Ports: two at each; the edge/level registers."""
_CASCADE = 2


class Chip:
    """One 8259A. ``irr`` is what was asked, ``isr`` what is in service, bit by pin."""

    def __init__(self) -> None:
        self.elcr = 0
        self.reset()

    def reset(self) -> None:
        self.irr = self.isr = self.lines = 0
        self.mask = 0xFF
        self.base = 0
        self._step = 0
        self._needs_icw4 = self._auto_eoi = self._read_isr = self._special_mask = False
        self._rotate_on_auto_eoi = False
        self._lowest = 7

    def set(self, pin: int, level: bool) -> None:
        bit = 1 << pin
        if level and (self.elcr & bit or not self.lines & bit):
            self.irr |= bit
        elif not level and self.elcr & bit:
            self.irr &= ~bit
        self.lines = self.lines | bit if level else self.lines & ~bit

    @property
    def asking(self) -> int | None:
        """The pin that would interrupt now, by priority; lower ones wait for its EOI."""
        if not self.irr & ~self.mask:
            return None
        for step in range(1, 9):
            pin = self._lowest + step & 7
            bit = 1 << pin
            if self.isr & bit and not (self._special_mask and self.mask & bit):
                return None
            if self.irr & ~self.mask & bit:
                return pin
        return None

    def acknowledge(self, pin: int) -> int:
        """The vector."""
        bit = 1 << pin
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self._auto_eoi:
            self.isr |= bit
        elif self._rotate_on_auto_eoi:
            self._lowest = pin
        return self.base + pin

    def read(self, port: int) -> int:
        if port:
            return self.mask
        return self.isr if self._read_isr else self.irr

    def write(self, port: int, value: int) -> None:
        if port:
            self._write_data(value)
        elif value & 0x10:  # ICW1
            lines = self.lines
            self.reset()
            self.lines, self.mask = lines, 0
            self._step, self._needs_icw4 = 2, bool(value & 1)
        elif value & 0x08:  # OCW3
            if value & 2:
                self._read_isr = bool(value & 1)
            if value & 0x40:
                self._special_mask = bool(value & 0x20)
        else:
            self._command(value >> 5, value & 7)

    def _write_data(self, value: int) -> None:
        match self._step:
            case 2:
                self.base, self._step = value & 0xF8, 3
            case 3:
                self._step = 4 if self._needs_icw4 else 0
            case 4:
                self._auto_eoi, self._step = bool(value & 2), 0
            case _:
                self.mask = value

    def _command(self, command: int, pin: int) -> None:
        """OCW2: bit 0 of ``command`` is EOI, bit 1 specific, bit 2 rotate."""
        if command in (0, 4):
            self._rotate_on_auto_eoi = command == 4
            return
        if not command & 2:
            pins = [self._lowest + step & 7 for step in range(1, 9)]
            served = [one for one in pins if self.isr >> one & 1]
            if not served:
                return
            pin = served[0]
        if command & 1:
            self.isr &= ~(1 << pin)
        if command & 4:
            self._lowest = pin


class Pic:
    """The pair."""

    def __init__(self) -> None:
        self._master, self._slave = Chip(), Chip()

    def set(self, pin: int, level: bool) -> None:
        """Pins 0–7 are the master's, 8–15 the slave's."""
        chip = self._slave if pin & 8 else self._master
        chip.set(pin & 7, level)
        self._settle()

    def _settle(self) -> None:
        asking = self._slave.asking is not None
        self._master.set(_CASCADE, asking)
        if not asking:  # withdrawn before it was taken: an edge would stay, and be spurious
            self._master.irr &= ~(1 << _CASCADE)

    @property
    def asking(self) -> bool:
        return self._master.asking is not None

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector. Spurious ones are pin 7's (data sheet, "IR7")."""
        pin = self._master.asking
        if pin is None:
            return self._master.base + 7
        vector = self._master.acknowledge(pin)
        if pin == _CASCADE:
            inner = self._slave.asking
            vector = self._slave.base + 7 if inner is None else self._slave.acknowledge(inner)
        self._settle()
        return vector

    def read(self, port: int) -> int:
        if port & ~1 == EDGES:
            return (self._slave if port & 1 else self._master).elcr
        return (self._slave if port & 0x80 else self._master).read(port & 1)

    def write(self, port: int, value: int) -> None:
        if port & ~1 == EDGES:
            chip, allowed = (self._slave, 0xDE) if port & 1 else (self._master, 0xF8)
            chip.elcr = value & allowed
        else:
            (self._slave if port & 0x80 else self._master).write(port & 1, value)
        self._settle()
