"""A vCPU's thread on real KVM: dispatch, stop, endings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from guests.tiny import TinyGuest
from hostel.errors import GuestCrash, HostelError, HostError
from hostel.hypervisor import FailEntry, InternalError, MsrExit, UnknownExit
from hostel.vmm.bus import Bus
from hostel.vmm.vcpu_thread import VcpuThread, describe

pytestmark = pytest.mark.kvm


class Port:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.wake = threading.Event()

    def read(self, offset: int, size: int) -> bytes:
        return b"\x5a" * size

    def write(self, offset: int, data: bytes) -> None:
        self.written.append(data)
        self.wake.set()

    def reset(self) -> None: ...
    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None: ...


class Running:
    def __init__(self, guest: TinyGuest, device: Port, pcpu: int | None) -> None:
        self.device = device
        self.errors: list[HostelError] = []
        self.failed = threading.Event()
        ports = Bus()
        ports.add(0x10, 4, device, "port")
        self.thread = VcpuThread(
            guest.vcpu, ports, Bus(), on_event=lambda type: None, on_error=self._error, pcpu=pcpu
        )

    def _error(self, error: HostelError) -> None:
        self.errors.append(error)
        self.failed.set()


@contextmanager
def running(code: str, *, device: Port | None = None, pcpu: int | None = None) -> Iterator[Running]:
    with TinyGuest(code) as guest:
        run = Running(guest, device or Port(), pcpu)
        run.thread.start()
        try:
            yield run
        finally:
            assert run.thread.stop()


def test_reads_and_writes_reach_the_bus() -> None:
    with running("in $0x10, %al; out %al, $0x11; 0: jmp 0b") as run:
        assert run.device.wake.wait(5)
        assert run.device.written == [b"\x5a"]
        assert run.thread.exits["PioExit"] == 2


def test_stop_is_prompt_and_the_thread_can_be_stopped_twice() -> None:
    with running("0: jmp 0b") as run:
        time.sleep(0.05)
        start = time.monotonic()
        assert run.thread.stop()
        assert time.monotonic() - start < 1
        assert not run.errors


def test_a_thread_that_never_started_is_stopped() -> None:
    with TinyGuest("hlt") as guest:
        run = Running(guest, Port(), None)
        assert run.thread.stop()


def test_halt_without_an_interrupt_controller_is_a_crash() -> None:
    with running("mov $0xabc, %eax; hlt") as run:
        assert run.failed.wait(5)
    assert isinstance(run.errors[0], GuestCrash)
    assert "halted with no interrupt controller" in str(run.errors[0])
    assert "rax=0xabc" in str(run.errors[0])


def test_a_device_that_fails_ends_the_thread_with_one_line() -> None:
    class Broken(Port):
        def read(self, offset: int, size: int) -> bytes:
            return b""  # not what was asked for

    with running("in $0x10, %al; 0: jmp 0b", device=Broken()) as run:
        assert run.failed.wait(5)
    assert isinstance(run.errors[0], HostError)
    assert str(run.errors[0]).startswith("a bug in hostel: ValueError")
    assert "bus.py" in str(run.errors[0])


def test_a_pcpu_that_is_not_there() -> None:
    with running("0: jmp 0b", pcpu=4095) as run:
        assert run.failed.wait(5)
    assert "pCPU 4095" in str(run.errors[0])
    assert "choose among" in str(run.errors[0])


def test_fatal_exits_in_words() -> None:
    assert "cannot emulate (0x1 0x2)" in describe(InternalError(1, (1, 2)))
    assert "internal error 9" in describe(InternalError(9, ()))
    assert "reason 0x80000021" in describe(FailEntry(0x8000_0021))
    assert "exit 77" in describe(UnknownExit(77))
    assert "MsrExit" in describe(MsrExit(0x10, False, 0, 0))
