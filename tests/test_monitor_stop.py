"""A machine whose threads hang: stopping it takes a bounded time, and says where they are."""

from __future__ import annotations

import threading
import time

import pytest

from guests.machine import POWEROFF, planned, say
from hostel.errors import HostError
from hostel.monitor import Monitor, monitor

pytestmark = pytest.mark.kvm


class Hanging:
    """A console's subscriber that does what it must not: it blocks, with the serial port's lock held."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, data: bytes) -> None:
        self.entered.set()
        self.go_on.wait(30)


def settled(machine: Monitor) -> None:
    """All threads of a machine that was left behind have gone."""
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("hostel-vcpu") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert machine.wait(10) is not None


def test_a_vcpu_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostel.monitor.board.JOIN_SECONDS", 0.5)
    hanging = Hanging()
    with planned(say("x") + "; 0: in %dx, %al; jmp 0b") as plan:
        machine = Monitor(plan)
        machine.console.subscribe(hanging)
        machine.start()
        assert hanging.entered.wait(10)
        begin = time.monotonic()
        for _ in range(2):
            with pytest.raises(HostError, match=r"hostel-vcpu0 is in read, bus\.py:") as error:
                machine.stop()
        assert time.monotonic() - begin < 5
        assert "its memory stays taken" in str(error.value)
        assert machine.wait(0) is not None
        hanging.go_on.set()
        settled(machine)


def test_a_machine_that_hangs_while_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another thread than a vCPU's: here the one that takes it down."""
    monkeypatch.setattr(monitor, "STOP_SECONDS", 0.5)
    held = threading.Event()
    with planned(say("x") + POWEROFF) as plan:
        machine = Monitor(plan)
        machine._undo.callback(held.wait, 30)
        machine.start()
        begin = time.monotonic()
        with pytest.raises(HostError, match="does not stop: hostel-settle is in wait"):
            machine.stop()
        assert time.monotonic() - begin < 5
        held.set()
        settled(machine)
