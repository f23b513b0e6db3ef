"""The EEPROM: 64 words with the MAC address and identity, read by bit-banging or through EERD.

::

    driver ─ EECD: CS, SK (clock), DI ──► start bit 1, opcode, 6 address bits
           ◄ EECD: DO ──────────────────  0, then 16 data bits, high first, then the next word

8254x SDM §5.3 (Microwire) and §5.6 (the map of words). Bits are taken and given at the clock's rise.
It cannot be written: writes are clocked in like any command and change nothing.
"""

from __future__ import annotations

import struct

from hostel.abi import e1000 as abi

_READ = 0b110
_COMMAND_BITS = 3 + 6
"""Start bit and opcode, and the address of one of 64 words."""
_SUBSYSTEM = 0x001E
_INIT_CONTROL_1 = 0x4000 | 0x3
"""Signature 01 in the high bits; load both pairs of identifiers (§5.6.7)."""
_INIT_CONTROL_2 = 0x0000
"""No pause frames (§5.6.12)."""


def image(mac: bytes) -> tuple[int, ...]:
    """The words, with the sum that all drivers check (§5.6.35)."""
    words = [0] * abi.EEPROM_WORDS
    words[0:3] = struct.unpack("<3H", mac)
    words[4] = 0xFFFF  # LED settings: the default
    words[0x0A:0x10] = (
        _INIT_CONTROL_1,
        _SUBSYSTEM,
        abi.VENDOR,
        abi.DEVICE,
        abi.VENDOR,
        _INIT_CONTROL_2,
    )
    words[0x3F] = (abi.EEPROM_SUM - sum(words)) & 0xFFFF
    return tuple(words)


class Eeprom:
    def __init__(self, mac: bytes) -> None:
        self.words = image(mac)
        self._pins = 0
        self._command = 0
        self._received = 0
        """Bits of the command so far; 0 until the start bit."""
        self._sent = 0
        """Bits of data so far."""

    # -- EERD (§13.4.4) -----------------------------------------------------------------------

    def read_word(self, eerd: int) -> int:
        """What EERD holds after this was written to it."""
        if not eerd & abi.EERD_START:
            return eerd
        address = eerd >> 8 & (abi.EEPROM_WORDS - 1)
        return self.words[address] << 16 | address << 8 | abi.EERD_DONE

    # -- EECD (§13.4.3) -----------------------------------------------------------------------

    @property
    def pins(self) -> int:
        granted = abi.EECD_GNT if self._pins & abi.EECD_REQ else 0
        out = abi.EECD_DO if self._out() else 0
        return self._pins | granted | out | abi.EECD_PRES | abi.EECD_FWE_DISABLED

    def set_pins(self, value: int) -> None:
        before = self._pins
        self._pins = value & (abi.EECD_SK | abi.EECD_CS | abi.EECD_DI | abi.EECD_REQ)
        if not value & abi.EECD_CS:
            self._command = self._received = self._sent = 0
        elif value & ~before & abi.EECD_SK:
            self._clock(bool(value & abi.EECD_DI))

    def _clock(self, bit: bool) -> None:
        if self._received < _COMMAND_BITS:
            if self._received or bit:  # zeros before the start bit do not count
                self._command = self._command << 1 | bit
                self._received += 1
        else:
            self._sent += 1

    def _out(self) -> bool:
        """Between commands the pin is high: ready. A 0 comes before the first data bit."""
        if self._received < _COMMAND_BITS:
            return True
        if self._command >> 6 != _READ or not self._sent:
            return False
        word, bit = divmod(self._sent - 1, 16)
        address = (self._command + word) % abi.EEPROM_WORDS
        return bool(self.words[address] >> (15 - bit) & 1)
