"""The real-time clock: a Motorola MC146818A with its CMOS memory.

::

    port 0x70   index (bit 7, the NMI mask, is of no interest)
    port 0x71   registers 0–9 time and date · 0x0A–0x0D control · 0x0E–0x7F memory · 0x32 century

The guest reads the host's UTC, moved by whatever the guest has set. The update-in-progress flag is
always clear: each register is read from the time of the moment. A kernel that reads seconds, then
minutes, reads the seconds again to be sure. There is no alarm and no periodic interrupt: a guest has
better timers, and ACPI says so to those who ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
SIZE = 128

A_DIVIDER = 0x26  # 32,768 Hz, the rate that a PC's firmware sets
B_SET, B_BINARY, B_24_HOURS = 0x80, 0x04, 0x02
D_VALID = 0x80  # the battery is good
PM = 0x80

_TIME = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})


class Rtc:
    """The clock. ``clock`` gives seconds since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._memory = bytearray(SIZE)
        self._memory[REG_A] = A_DIVIDER
        self._memory[REG_B] = B_24_HOURS
        self._offset = timedelta()
        self._index = 0

    def reset(self) -> None:
        """The battery keeps time and memory; a reset only turns the interrupts off."""
        self._index = 0
        self._memory[REG_B] &= ~0x78

    def read(self, offset: int, size: int) -> bytes:
        if offset == 0:
            return b"\xff"  # the index is write-only
        return bytes((self._read_register(self._index),))

    def write(self, offset: int, data: bytes) -> None:
        if offset == 0:
            self._index = data[0] & 0x7F
        else:
            self._write_register(self._index, data[0])

    def _read_register(self, index: int) -> int:
        if index in _TIME and not self._memory[REG_B] & B_SET:
            return self._fields()[index]
        if index == REG_C:
            return 0  # nothing pending
        if index == REG_D:
            return D_VALID
        return self._memory[index]

    def _write_register(self, index: int, value: int) -> None:
        if index in _TIME:
            self._write_time({index: value})
        elif index == REG_A:
            self._memory[REG_A] = value & 0x7F
        elif index == REG_B:
            self._write_mode(value)
        elif index not in (REG_C, REG_D):
            self._memory[index] = value

    def _write_mode(self, value: int) -> None:
        """SET stops the clock for as long as the guest writes a new time."""
        before, self._memory[REG_B] = self._memory[REG_B], value
        if value & ~before & B_SET:
            self._memory[REG_B] = before
            for index, field in self._fields().items():
                self._memory[index] = field
            self._memory[REG_B] = value
        elif before & ~value & B_SET:
            self._set_clock({index: self._memory[index] for index in _TIME})

    def _write_time(self, fields: dict[int, int]) -> None:
        if self._memory[REG_B] & B_SET:
            for index, value in fields.items():
                self._memory[index] = value
        else:
            self._set_clock(self._fields() | fields)

    # -- time and its registers ---------------------------------------------------------------

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC) + self._offset

    def _fields(self) -> dict[int, int]:
        now = self._now()
        hour, flag = now.hour, 0
        if not self._memory[REG_B] & B_24_HOURS:
            hour, flag = (now.hour + 11) % 12 + 1, PM if now.hour >= 12 else 0
        encode = self._encode
        return {
            SECONDS: encode(now.second),
            MINUTES: encode(now.minute),
            HOURS: encode(hour) | flag,
            WEEKDAY: encode(now.isoweekday() % 7 + 1),  # 1 is Sunday
            DAY: encode(now.day),
            MONTH: encode(now.month),
            YEAR: encode(now.year % 100),
            CENTURY: encode(now.year // 100),
        }

    def _set_clock(self, fields: dict[int, int]) -> None:
        """A date that does not exist is ignored, as is the day of the week."""
        decode = self._decode
        hour = decode(fields[HOURS] & ~PM)
        if not self._memory[REG_B] & B_24_HOURS:
            hour = hour % 12 + (12 if fields[HOURS] & PM else 0)
        try:
            wanted = datetime(
                decode(fields[CENTURY]) * 100 + decode(fields[YEAR]),
                decode(fields[MONTH]),
                decode(fields[DAY]),
                hour,
                decode(fields[MINUTES]),
                decode(fields[SECONDS]),
                tzinfo=UTC,
            )
            self._offset = wanted - datetime.fromtimestamp(self._clock(), UTC)
            self._now()
        except (ValueError, OverflowError):
            self._offset = timedelta()

    def _encode(self, value: int) -> int:
        return value if self._memory[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._memory[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    # -- state --------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {
            "memory": bytes(self._memory),
            "offset": self._offset.total_seconds(),
            "index": self._index,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._memory = bytearray(state["memory"])
        self._offset = timedelta(seconds=state["offset"])
        self._index = state["index"]
