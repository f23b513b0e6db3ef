"""``/dev/kvm`` itself: opening it, what is said when it does not open, the probe, and leaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from guests.tiny import TinyGuest
from hostel import kvm
from hostel.abi import kvm as abi
from hostel.errors import KvmError
from hostel.hypervisor import HaltExit
from hostel.hypervisor import Vcpu as VcpuContract
from hostel.hypervisor import Vm as VmContract
from hostel.kvm.probe import KvmReport, probe
from hostel.kvm.system import System


def test_the_classes_keep_the_contract() -> None:
    """The type checker does the work: these assignments do not pass it otherwise."""
    vm: type[VmContract] = kvm.Vm
    vcpu: type[VcpuContract] = kvm.Vcpu
    assert (vm.__name__, vcpu.__name__) == ("Vm", "Vcpu")


def test_no_kvm_is_one_clear_line(tmp_path: Path) -> None:
    path = str(tmp_path / "kvm")
    with pytest.raises(KvmError) as caught:
        System(path)
    line = str(caught.value)
    assert f"there is no {path}; engine kvm cannot be used; load it (sudo modprobe" in line
    assert "\n" not in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_forbidden_kvm_names_the_cure(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "kvm"
    path.touch(mode=0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(KvmError, match=r"not be opened by this user.*group kvm"):
            System(str(path))
    finally:
        os.seteuid(0)


def test_something_else_at_its_place() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION failed"):
        System("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.kvm
def test_what_the_system_says() -> None:
    with System() as system:
        assert system.api_version() == abi.API_VERSION
        assert system.check(abi.CAP_USER_MEMORY) == 1
        assert system.max_vcpus() >= 1


@pytest.mark.kvm
def test_the_probe_is_quick_and_sure() -> None:
    report = min((timed_probe() for _ in range(3)), key=lambda pair: pair[0])
    seconds, found = report
    assert found.openable
    assert found.error == ""
    assert found.api_version == abi.API_VERSION
    assert found.loops_per_second > 10_000
    assert found.capabilities["ioeventfd"] == 1
    assert found.usable == found.ring0_at_speed
    assert seconds < (2.0 if os.environ.get("HOSTEL_TESTBED") else 0.1)


def timed_probe() -> tuple[float, KvmReport]:
    start = time.perf_counter()
    report = probe()
    return time.perf_counter() - start, report


@pytest.mark.linux_kvm
def test_the_probe_takes_real_hardware_for_what_it_is() -> None:
    report = probe()
    assert report.usable
    assert report.hardware in ("vmx", "svm")
    assert report.reason.startswith("KVM runs guests at speed (")


def test_the_probe_believes_its_measurement() -> None:
    slow = KvmReport(True, True, loops_per_second=900_000, ring0_at_speed=False)
    assert not slow.usable
    assert slow.reason == (
        "KVM is here but interprets the guest's kernel "
        "(0.9 million loops/s in ring 0, no CPU flag vmx or svm): Linux would not boot"
    )
    absent = KvmReport(False, False, "there is no /dev/kvm")
    assert not absent.usable
    assert absent.reason == "there is no /dev/kvm"


@pytest.mark.kvm
def test_many_guests_in_a_row_leave_nothing() -> None:
    def once() -> None:
        with TinyGuest("hlt") as guest:
            guest.add_vcpu()
            assert isinstance(guest.run(), HaltExit)
            guest.vcpu.open_stats().close()

    once()
    before = (open_files(), mappings())
    for _ in range(50):
        once()
    assert (open_files(), mappings()) == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    """Guest memory and vCPU pages are the only shared mappings here that can be written."""
    return Path("/proc/self/maps").read_text().count(" rw-s ")


@pytest.mark.kvm
def test_closing_twice_is_no_error() -> None:
    guest = TinyGuest("hlt")
    guest.close()
    guest.close()
    assert guest.vm.fd == guest.vcpu.fd == guest.system.fd == -1
