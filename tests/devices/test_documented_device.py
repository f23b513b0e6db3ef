"""The device of docs/add-a-device.md, taken from the page: its registers, and a guest that uses it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from guests.machine import PATIENCE, machine
from hostel.monitor.seats import SEATS
from hostel.plan import Ending

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-device.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``hostel.devices.alarm``, as if the page had been followed."""
    module = ModuleType("hostel.devices.alarm")
    exec(compile(blocks("python")[0], str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class Wire:
    level = False

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        raise AssertionError("the alarm is a level")


def test_registers(alarm: ModuleType) -> None:
    calls: list[tuple[float, Callable[[], None]]] = []
    wire = Wire()
    device = alarm.Alarm(wire, lambda seconds, call: calls.append((seconds, call)))
    device.write(0, (1500).to_bytes(4, "little"))
    device.write(0, (20).to_bytes(4, "little"))
    assert [seconds for seconds, _ in calls] == [1.5, 0.02]
    calls[0][1]()  # set anew in the meantime
    assert not wire.level
    calls[1][1]()
    assert wire.level
    other = alarm.Alarm(wire, lambda seconds, call: None)
    other.load(device.save())
    assert wire.level
    assert device.read(0, 4) == b"\1\0\0\0"
    assert not wire.level
    assert device.read(0, 2) == b"\0\0"


@pytest.mark.kvm
def test_guest(alarm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("py")[0], str(PAGE), "exec"), names)
    monkeypatch.setattr("hostel.monitor.seats.SEATS", (*SEATS, names["seat"]))
    with machine(blocks("asm")[0]) as monitor:
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=1)
        assert monitor.console.history() == b"10"
        assert monitor.statistics()["devices"]["alarm"] == {"reads": 2, "writes": 1}
