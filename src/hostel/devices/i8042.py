"""The keyboard controller: an Intel 8042 with neither keyboard nor mouse, and the reset line.

::

    offset 0 (port 0x60)   data
    offset 1–3             not ours: read as all ones
    offset 4 (port 0x64)   status, and commands

It is here for two things. Old and small kernels reset the machine with command 0xFE. And a kernel
that looks for a keyboard polls an absent controller ten thousand times: this one answers every
command at once, passes its self-test, and reports for each device that nobody answers (status bit 6),
so the kernel moves on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZE = 5
DATA, COMMAND = 0, 4

STATUS_OUTPUT_FULL, STATUS_SYSTEM, STATUS_COMMAND = 0x01, 0x04, 0x08
STATUS_UNLOCKED, STATUS_TIMEOUT = 0x10, 0x40
CONFIG_DEFAULT = 0x34  # self-test passed, both ports off
RESEND = 0xFE

_ANSWERS = {
    0xA9: 0x02,  # test of the second port: its clock line is stuck, there is none
    0xAA: 0x55,  # self-test: good
    0xAB: 0x00,  # test of the first port: good
    0xC0: 0x80,  # input port: keyboard not locked
    0xD0: 0x03,  # output port: A20 on, no reset
}
_WITH_PARAMETER = frozenset({0x60, 0xD1, 0xD2, 0xD3, 0xD4})


class I8042:
    """The controller. ``reset_machine`` is called when the guest pulses the reset line."""

    def __init__(self, reset_machine: Callable[[], None]) -> None:
        self._reset_machine = reset_machine
        self.reset()

    def reset(self) -> None:
        self._config = CONFIG_DEFAULT
        self._output = 0
        self._status = STATUS_SYSTEM | STATUS_UNLOCKED
        self._pending = 0

    def read(self, offset: int, size: int) -> bytes:
        if offset == COMMAND:
            return bytes((self._status,))
        if offset != DATA:
            return b"\xff"
        self._status &= ~(STATUS_OUTPUT_FULL | STATUS_TIMEOUT)
        return bytes((self._output,))

    def write(self, offset: int, data: bytes) -> None:
        if offset == COMMAND:
            self._status |= STATUS_COMMAND
            self._command(data[0])
        elif offset == DATA:
            self._status &= ~STATUS_COMMAND
            self._parameter(data[0])

    def _command(self, command: int) -> None:
        self._pending = command if command in _WITH_PARAMETER else 0
        if command == 0x20:
            self._answer(self._config)
        elif command in _ANSWERS:
            self._answer(_ANSWERS[command])
        elif command in (0xA7, 0xA8):
            self._config = self._config & ~0x20 | (0x20 if command == 0xA7 else 0)
        elif command in (0xAD, 0xAE):
            self._config = self._config & ~0x10 | (0x10 if command == 0xAD else 0)
        elif command >= 0xF0 and not command & 1:  # pulses the output port's bits that are 0
            self._reset_machine()

    def _parameter(self, value: int) -> None:
        pending, self._pending = self._pending, 0
        if pending == 0x60:
            self._config = value
        elif pending == 0xD1:
            if not value & 1:
                self._reset_machine()
        elif pending == 0xD2:
            self._answer(value)
        elif pending == 0xD3:  # the second port's loop gives something else back: there is none
            self._answer(value ^ 0xFF)
        else:  # for a keyboard or a mouse: nobody answers
            self._answer(RESEND, STATUS_TIMEOUT)

    def _answer(self, value: int, flags: int = 0) -> None:
        self._output = value
        self._status |= STATUS_OUTPUT_FULL | flags

    def save(self) -> dict[str, Any]:
        return {
            "config": self._config,
            "output": self._output,
            "status": self._status,
            "pending": self._pending,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._config = state["config"]
        self._output = state["output"]
        self._status = state["status"]
        self._pending = state["pending"]
