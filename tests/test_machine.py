"""The public machine on engine qemu: what a user of the library sees when things end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hostel
from hostel.spec import MachineSpec, Root, Volume


def test_nothing_is_mounted_over_the_root() -> None:
    with pytest.raises(hostel.SpecError, match="over the guest's root"):
        MachineSpec(volumes=(Volume(source="/srv", target="/"),))


@pytest.mark.parametrize("argv", ["echo hi", [], [""]])
def test_no_machine_for_what_is_no_command(argv: list[str]) -> None:
    with pytest.raises(hostel.SpecError):
        hostel.run(argv, kernel="/nonexistent")


def test_a_machine_that_was_not_started() -> None:
    machine = hostel.Machine()
    with pytest.raises(hostel.MachineStopped):
        machine.console  # noqa: B018
    machine.stop()


@pytest.mark.qemu
def test_a_guest_that_reboots_comes_up_anew(tmp_path: Path) -> None:
    with hostel.Machine(engine="qemu", root=Root(), memory=256 << 20) as vm:
        vm.exec(["touch", "/before"])
        with pytest.raises(hostel.MachineStopped, match="the guest rebooted"):
            vm.exec(["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"], user="root")
        assert vm.exec(["test", "-e", "/before"]).exit_code == 1
        assert vm.restarts == 1
        with pytest.raises(hostel.GuestCrash, match="panic"):
            vm.exec(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60"], user="root")
        assert vm.ending is not None
        assert vm.ending.kind == "panic"


@pytest.mark.qemu
def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    volume = Volume(source=str(tmp_path), target="/proc/nowhere")
    with (
        hostel.Machine(engine="qemu", volumes=(volume,), memory=256 << 20) as vm,
        pytest.raises(hostel.BootError, match="/proc/nowhere"),
    ):
        vm.exec(["true"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"argv": ["true", 1]}, "argv must be a list of strings: .* not int"),
        ({"argv": "true"}, "not a string"),
        ({"argv": ["true"], "input": "text"}, "input must be bytes, not str"),
        ({"argv": ["true"], "env": ["A=1"]}, "env must map names to values, .* be a list"),
        ({"argv": ["true"], "env": {"A": 1}}, "not 'A' to 1"),
        ({"argv": ["true"], "env": {"A=B": "1"}}, "not the name of a variable: 'A=B'"),
        ({"argv": ["true"], "env": {"A": "1\0"}}, "NUL"),
        ({"argv": ["a\0b"]}, "NUL"),
    ],
)
def test_what_no_command_can_have_is_said_before_a_boot(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(hostel.SpecError, match=message):
        hostel.run(**wrong, kernel="/nonexistent")


@pytest.mark.qemu
def test_a_command_as_python_starts_them(tmp_path: Path) -> None:
    with hostel.Machine(engine="qemu", memory=256 << 20) as vm:
        pwd = vm.exec([Path("/bin/sh"), "-c", 'pwd; echo "$PATH $A"'], cwd=tmp_path, env={"A": "1"})
        assert pwd.stdout.decode().splitlines()[0] == str(tmp_path)
        assert "/usr/bin" in pwd.stdout.decode()
        assert pwd.stdout.endswith(b" 1\n")
        with pytest.raises(hostel.SpecError, match="input must be bytes"):
            vm.exec(["cat"], input="text")  # type: ignore[arg-type]
        assert vm.exec(["cat"], input=memoryview(b"bytes")).stdout == b"bytes"
        assert _in_a_fork(vm) == "the machine is of the process that this one was forked from"
        with pytest.raises(KeyboardInterrupt), _interrupt(0.5):
            vm.exec(["sleep", "1234"])
        assert vm.exec(["pgrep", "-f", "^sleep 1234"]).exit_code == 1


def _in_a_fork(vm: hostel.Machine) -> str:
    """What a forked child is told that uses the machine and then leaves its ``with``."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            vm.exec(["true"])
        except hostel.MachineStopped as error:
            os.write(writer, str(error).encode())
        finally:
            vm.stop()
            os._exit(0)
    os.close(writer)
    with open(reader) as told:
        answer = told.read()
    os.waitpid(child, 0)
    return answer


@contextlib.contextmanager
def _interrupt(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
