"""The public machine on engine qemu: what a user of the library sees when things end."""

from __future__ import annotations

from pathlib import Path

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
