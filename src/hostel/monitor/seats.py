"""The devices at fixed addresses. To add one: its file in ``devices/``, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from hostel.abi import acpi
from hostel.devices import i8042
from hostel.devices.debug import DebugConsole, DebugExit
from hostel.devices.i8042 import I8042
from hostel.devices.power import Power, ResetControl
from hostel.devices.rtc import Rtc
from hostel.devices.serial import REGISTERS, Serial
from hostel.vmm import layout
from hostel.vmm.bus import Device

if TYPE_CHECKING:
    from .board import Board


FLUSH_SECONDS = 0.01
"""How long a piece of a line may wait in the serial port."""


class Seat(msgspec.Struct, frozen=True):
    """``width``: the widest access that the device takes at once, in bytes."""

    name: str
    port: int
    size: int
    width: int
    make: Callable[[Board], Device]


def _serial(board: Board) -> Serial:
    return Serial(
        board.interrupts.line(layout.GSI_COM1),
        board.console.feed,
        source=board.take_input,
        later=lambda port: board.enter_later(FLUSH_SECONDS, port, port.flush),
    )


def _power(board: Board) -> Power:
    return Power(board.owner.poweroff, clock=board.timer)


SEATS = (
    Seat("serial", layout.PORT_COM1, REGISTERS, 1, _serial),
    Seat("i8042", layout.PORT_I8042_DATA, i8042.SIZE, 1, lambda b: I8042(b.owner.reset)),
    Seat("rtc", layout.PORT_RTC, 2, 1, lambda b: Rtc(b.clock)),
    Seat("power", layout.PORT_ACPI_PM, acpi.PM_BLOCK_SIZE, 4, _power),
    Seat("reset", layout.PORT_RESET, 1, 1, lambda b: ResetControl(b.owner.reset)),
    Seat("debug console", layout.PORT_DEBUG_CONSOLE, 1, 1, lambda b: DebugConsole(b.console.feed)),
    Seat("debug exit", layout.PORT_DEBUG_EXIT, 4, 4, lambda b: DebugExit(b.owner.debug_exit)),
)
