"""A stock Linux on these tables: what it finds, and that it ends at once when it wants to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guests.kernels import HERE
from hostel.boot import cmdline
from hostel.boot.initramfs import archive
from hostel.errors import ImageError
from hostel.host import kernels
from hostel.monitor import Monitor
from hostel.plan import Ending, Plan
from hostel.spec import MachineSpec, Transport

pytestmark = [pytest.mark.linux_kvm, pytest.mark.slow, pytest.mark.timeout(200)]
PATIENCE = 120


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("initrd")
    program = directory / "look"
    subprocess.run(["gcc", "-static", "-O1", "-o", program, HERE / "look.c"], check=True)
    path = directory / "initrd"
    path.write_bytes(archive(program.read_bytes(), {}))
    return path


def boot(
    initrd: Path,
    directory: Path,
    how: str,
    *,
    cpus: int = 1,
    memory: int = 256 << 20,
    transport: Transport = "pci",
) -> tuple[str, Ending, dict[str, int]]:
    """What it said, how it ended, and how often each kind of exit came to us."""
    try:
        kernel = kernels.find()
    except ImageError as error:
        pytest.skip(str(error))
    plan = Plan(
        spec=MachineSpec(cpus=cpus, memory=memory, on_reboot="stop", transport=transport),
        engine="kvm",
        reason="a test",
        kernel=kernel.image,
        release=kernel.release,
        initrd=initrd,
        cmdline=cmdline.build("run", engine="kvm", append=how),
        disks=(),
        shares=(),
        runtime=directory,
        agent=False,
    )
    monitor = Monitor(plan)
    try:
        monitor.start()
        ending = monitor.wait(PATIENCE)
        said = monitor.console.history().decode(errors="replace").replace("\r", "")
        assert ending is not None, said
        exits: dict[str, int] = {}
        for vcpu in monitor.statistics()["exits"]:
            for kind, count in vcpu.items():
                exits[kind] = exits.get(kind, 0) + count
        return said, ending, exits
    finally:
        monitor.stop()


def test_linux_finds_the_machine_and_powers_off(initrd: Path, tmp_path: Path) -> None:
    said, ending, exits = boot(initrd, tmp_path, "poweroff", cpus=2, memory=3584 << 20)
    assert ending.kind == "poweroff", said
    assert "PCI MMCONFIG 0000 [bus 00-00]" in said, "ECAM is used"
    assert "c0000000-dfffffff : PCI Bus 0000:00" in said
    assert "100000000-11fffffff : System RAM" in said
    assert "e0000-000effff : ACPI Tables" in said
    assert "ACPI PM1a_CNT_BLK" in said
    assert "/online\n0-1\n" in said
    assert "current_clocksource\nkvm-clock\n" in said
    assert {"PNP0A08:00", "PNP0C02:00", "PNP0501:00", "ACPI0007:01"} <= set(said.split())
    # A PC without tables takes 50,000; this one is mostly the console, byte by byte.
    assert exits["PioExit"] < 2 * len(said) + 1000
    assert exits["MmioExit"] < 1000


def test_linux_reboots(initrd: Path, tmp_path: Path) -> None:
    said, ending, _ = boot(initrd, tmp_path, "reboot")
    assert ending.kind == "reset", said


def test_a_panic_is_seen_and_ends_the_machine(initrd: Path, tmp_path: Path) -> None:
    said, ending, _ = boot(initrd, tmp_path, "panic")
    assert ending.kind == "panic", said
    assert "Kernel panic - not syncing: Attempted to kill init!" in said


def test_virtio_mmio_slots_are_found(initrd: Path, tmp_path: Path) -> None:
    said, ending, _ = boot(initrd, tmp_path, "poweroff", transport="mmio")
    assert ending.kind == "poweroff", said
    assert "LNRO0005:00" in said.split()
    assert "e8000000-e8000fff : LNRO0005:00" in said
    assert "PCI Bus" not in said
