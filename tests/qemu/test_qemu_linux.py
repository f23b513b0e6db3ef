"""Linux on the QEMU engine: both transports find their devices, and the host's root is there to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.errors import HostelError
from hostel.machine import Machine
from hostel.spec import Disk, MachineSpec, Transport

pytestmark = [pytest.mark.qemu, pytest.mark.slow]


@pytest.mark.parametrize(("transport", "bus"), [("pci", "/pci0000:00/"), ("mmio", "/LNRO0005:")])
def test_devices_on_each_transport(transport: Transport, bus: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk, with a comma.img"
    disk.write_bytes(b"first sector".ljust(1 << 20, b"\0"))
    script = "readlink -f /sys/bus/virtio/devices/*; head -c 12 /dev/vda; cat /etc/hostname"
    disks = (Disk(path=str(disk), read_only=True),)
    spec = MachineSpec(engine="qemu", transport=transport, cpus=2, disks=disks)
    with Machine(spec) as machine:
        result = machine.exec(["sh", "-c", script + "; echo no > /etc/hostname"], user="root")
        assert machine.statistics()["accel"] in ("tcg", "kvm")
    devices = [line for line in result.stdout.decode().splitlines() if "/virtio" in line]
    assert len(devices) >= 4  # console, disk, entropy, file system
    assert all(bus in device for device in devices)
    assert b"first sector" + Path("/etc/hostname").read_bytes() in result.stdout
    assert Path("/etc/hostname").read_text() != "no\n"


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_reboot_is_no_crash(transport: Transport) -> None:
    spec = MachineSpec(engine="qemu", transport=transport, on_reboot="stop")
    command = ["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"]
    with Machine(spec) as machine, pytest.raises(HostelError, match="the guest rebooted"):
        machine.exec(command, user="root")
