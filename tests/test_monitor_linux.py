"""Debian's kernel on our monitor: how it ends, what it believes its CPUs to be, what its boot costs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from hostel.boot.cmdline import build
from hostel.boot.initramfs import archive
from hostel.host import kernels
from hostel.monitor import Monitor
from hostel.plan import Ending, Plan
from hostel.spec import MachineSpec

pytestmark = [pytest.mark.linux_kvm, pytest.mark.slow]
PATIENCE = 120.0


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initramfs of ``guests/init.c``."""
    folder = tmp_path_factory.mktemp("initrd")
    program = folder / "init"
    source = Path(__file__).parent / "guests" / "init.c"
    subprocess.run(["gcc", "-O1", "-static", "-s", "-o", program, source], check=True)
    image = folder / "initrd"
    image.write_bytes(archive(program.read_bytes(), {}))
    return image


def boot(
    initrd: Path, folder: Path, append: str = "", **spec: Any
) -> tuple[Ending, str, dict[str, Any]]:
    """How it ended, its console, its statistics."""
    kernel = kernels.find()
    plan = Plan(
        spec=MachineSpec(memory=256 << 20, on_reboot="stop").replace(**spec),
        engine="kvm",
        reason="a test",
        kernel=kernel.image,
        release=kernel.release,
        initrd=initrd,
        cmdline=build("run", engine="kvm", append=append),
        disks=(),
        shares=(),
        runtime=folder,
        agent=False,
    )
    monitor = Monitor(plan)
    try:
        monitor.start()
        ending = monitor.wait(PATIENCE)
        assert ending is not None, monitor.console.tail()
        return ending, monitor.console.history().decode().replace("\r", ""), monitor.statistics()
    finally:
        monitor.stop()


def test_one_cpu_and_few_exits(initrd: Path, tmp_path: Path) -> None:
    ending, console, statistics = boot(initrd, tmp_path)
    assert ending == Ending("poweroff")
    assert "clock=kvm-clock\ncpus=1\n" in console
    assert "x2apic=1\ndeadline=1\ndone\n" in console
    exits = statistics["exits"][0]
    # Measured: 302 + 100 for this program's lines, and 48. QEMU's microvm takes 600 and more.
    assert exits["PioExit"] < 650, statistics
    assert exits["MmioExit"] < 100, statistics
    assert statistics["devices"]["i8042"]["reads"] == 0
    assert statistics["devices"]["rtc"]["reads"] == 0
    # Measured: 3,100, of which 700 are the host's own timer; a boot in 4 KiB pages takes 20,000.
    assert statistics["kvm"]["vcpus"][0]["exits"] < 8000


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_four_cpus(initrd: Path, tmp_path: Path, transport: str) -> None:
    ending, console, statistics = boot(initrd, tmp_path, cpus=4, transport=transport)
    assert ending == Ending("poweroff")
    assert "cpus=4\nsiblings=0-3\nthreads=0\n" in console
    assert len(statistics["kvm"]["vcpus"]) == 4


def test_reboot_is_a_reset(initrd: Path, tmp_path: Path) -> None:
    ending, console, _ = boot(initrd, tmp_path, "test.reboot")
    assert ending == Ending("reset")
    assert "done\n" in console


def test_panic(initrd: Path, tmp_path: Path) -> None:
    ending, console, _ = boot(initrd, tmp_path, "test.panic")
    assert ending.kind == "panic"
    assert "Attempted to kill init!" in ending.detail
    assert "Call Trace:" in console
