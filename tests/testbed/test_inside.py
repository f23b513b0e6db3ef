"""What the testbed promises to tests that run in it: KVM that is hardware to it, vhost, VFIO, an IOMMU."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

IN_TESTBED = os.environ.get("HOSTEL_TESTBED") == "1"

pytestmark = [
    pytest.mark.linux_kvm,
    pytest.mark.skipif(not IN_TESTBED, reason="asks about the testbed, and this is not it"),
]

KVM_GET_API_VERSION = 0xAE00


def test_kvm_is_hardware_to_it() -> None:
    with open("/dev/kvm", "rb") as kvm:
        assert fcntl.ioctl(kvm, KVM_GET_API_VERSION) == 12
    assert " svm " in Path("/proc/cpuinfo").read_text()
    assert Path("/sys/module/kvm_amd/parameters/nested").read_text().strip() in ("1", "Y")


@pytest.mark.parametrize(
    "name", ["vhost-net", "vhost-vsock", "net/tun", "vfio/vfio", "loop-control"]
)
def test_device_opens(name: str) -> None:
    os.close(os.open(f"/dev/{name}", os.O_RDWR))


def test_devices_to_pass_through_have_groups_of_their_own() -> None:
    functions = [path.resolve() for path in Path("/sys/bus/pci/devices").iterdir()]
    spare = [path for path in functions if (path / "class").read_text()[2:6] in ("0200", "0108")]
    groups = {os.readlink(path / "iommu_group"): path for path in spare}
    assert len(spare) == len(groups) == 2
    for path in spare:
        assert len(list((path / "iommu_group" / "devices").iterdir())) == 1


def test_what_is_written_stays_inside_but_can_be_written() -> None:
    target = Path("/usr/lib/testbed-write-test")
    target.write_text("x")
    assert target.read_text() == "x"
    target.unlink()


def test_loopback_is_up() -> None:
    assert int(Path("/sys/class/net/lo/flags").read_text(), 16) & 1
