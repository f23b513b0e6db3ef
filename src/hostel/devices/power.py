"""Power: ACPI's PM1 registers, the PM timer and the reset register.

::

    Power          offset 0 PM1 status · 2 PM1 enable · 4 PM1 control · 8 PM timer     (abi/acpi.py)
    ResetControl   port 0xCF9, Intel's RST_CNT

``SLP_EN`` written with the type of S5 powers off; the write does not return to the guest's program.
No fixed event ever happens (no button, no timer overflow), so there is nothing to interrupt for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hostel.abi import acpi


class Power:
    """The PM register block."""

    def __init__(
        self, poweroff: Callable[[], None], *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._poweroff = poweroff
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        self._registers = bytearray(acpi.PM_TIMER)
        self._registers[acpi.PM1_CONTROL] = acpi.SCI_EN

    def read(self, offset: int, size: int) -> bytes:
        timer = (self._clock() * acpi.PM_TIMER_HZ // 1_000_000_000) & acpi.PM_TIMER_MASK
        block = self._registers + timer.to_bytes(acpi.PM_TIMER_SIZE, "little")
        return bytes(block[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        for at, value in enumerate(data, offset):
            if acpi.PM1_STATUS <= at < acpi.PM1_ENABLE:
                self._registers[at] &= ~value  # write one to clear (ACPI 6.4 §4.8.3.1.1)
            elif at < acpi.PM1_CONTROL:
                self._registers[at] = value
            elif at < acpi.PM1_CONTROL + acpi.PM1_CONTROL_SIZE:
                self._write_control(at, value)

    def _write_control(self, at: int, value: int) -> None:
        """SLP_EN reads as zero; SCI_EN is not ours to change (§4.8.3.2.1)."""
        shift = 8 * (at - acpi.PM1_CONTROL)
        word = value << shift
        self._registers[at] = (word & ~acpi.SLP_EN | acpi.SCI_EN) >> shift & 0xFF
        if (
            word & acpi.SLP_EN
            and (word & acpi.SLP_TYP_MASK) >> acpi.SLP_TYP_SHIFT == acpi.SLP_TYP_S5
        ):
            self._poweroff()

    def save(self) -> dict[str, Any]:
        return {"registers": bytes(self._registers)}

    def load(self, state: dict[str, Any]) -> None:
        self._registers = bytearray(state["registers"])


class ResetControl:
    """Intel's reset control register: a reset when bit 2 rises."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._value = 0

    def reset(self) -> None:
        self._value = 0

    def read(self, offset: int, size: int) -> bytes:
        return bytes((self._value,))

    def write(self, offset: int, data: bytes) -> None:
        rising = data[0] & ~self._value & acpi.RESET_DO
        self._value = data[0] & ~acpi.RESET_DO
        if rising:
            self._reset()

    def save(self) -> dict[str, Any]:
        return {"value": self._value}

    def load(self, state: dict[str, Any]) -> None:
        self._value = state["value"]
