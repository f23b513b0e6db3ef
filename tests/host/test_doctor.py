"""The report on the host: true on this one, and right about ones that lack things."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from hostel.host import doctor, shares, virtiofsd
from hostel.host.doctor import Finding, Report


@pytest.fixture(scope="module")
def report() -> Report:
    return doctor.examine()


def finding(report: Report, name: str) -> Finding:
    return next(f for f in report.findings if f.name == name)


def opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def test_every_lack_has_its_cost_and_its_cure(report: Report) -> None:
    lacking = [f for f in report.findings if f.state != "ok"]
    assert [f.name for f in lacking if not f.cost or not f.cure] == []
    assert all(f.found and "\n" not in f.found + f.cost + f.cure for f in report.findings)


def test_names_are_unique(report: Report) -> None:
    names = [f.name for f in report.findings]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("vhost-net", "/dev/vhost-net"),
        ("vhost-vsock", "/dev/vhost-vsock"),
        ("tun", "/dev/net/tun"),
        ("VFIO", "/dev/vfio/vfio"),
    ],
)
def test_devices_are_opened(report: Report, name: str, path: str) -> None:
    assert (finding(report, name).state == "ok") == opens(path)


def test_the_host_is_named(report: Report) -> None:
    assert report.host.kernel == os.uname().release
    assert report.host.cpus == len(os.sched_getaffinity(0))
    assert report.host.memory > 1 << 28


def test_an_engine_needs_what_it_needs(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(**states: doctor.State) -> Report:
        rows = [
            msgspec.structs.replace(f, state=states.get(f.name.replace(" ", "_"), "ok"))
            for f in report.findings
        ]
        monkeypatch.setattr(doctor, "CHECKS", [lambda row=row: row for row in rows])
        return doctor.examine()

    assert (judged().engine, judged().works) == ("kvm", True)
    slow = judged(KVM="limited")
    assert (slow.engine, slow.works) == ("qemu", True)
    neither = judged(KVM="limited", QEMU="missing")
    assert (neither.engine, neither.obstacles) == ("", ("KVM", "QEMU"))
    assert judged(guest_kernel="missing").obstacles == ("guest kernel",)
    assert judged(guest_kernel="limited").works
    assert judged(passt="missing", apt="missing").works


def test_a_host_without_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._qemu().state == "missing"
    assert doctor._compiler().state == "missing"
    assert doctor._apt().state == "missing"
    assert "distribution" in doctor._qemu().cure, "no apt, so no apt command"


def test_a_program_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / doctor.QEMU
    fake.write_text("#!/bin/sh\necho libfoo.so: cannot open shared object file; exit 127\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor._qemu().state == "missing"
    assert "libfoo.so" in doctor._qemu().found


@pytest.mark.skipif(not doctor._which(*virtiofsd.PLACES), reason="no virtiofsd")
def test_virtiofsd_needs_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "most_open_files", lambda: 4096)
    row = doctor._virtiofsd()
    assert row.state == "limited"
    assert row.found.endswith(", but 4096 open files at most")
    assert str(shares.ENOUGH_FILES) in row.cure
    monkeypatch.setattr(shares, "most_open_files", lambda: 1 << 20)
    assert doctor._virtiofsd().state == "ok"


def test_a_device_without_permission(tmp_path: Path) -> None:
    """Seen by another user, where this one is root and may open everything."""
    device = tmp_path / "device"
    device.touch(0o600)
    error = PermissionError(13, "Permission denied")
    row = doctor._closed_device("tun", str(device), "cost", "tun", error)
    assert row.state == "limited"
    assert str(device) in row.cure or "usermod" in row.cure


def test_a_full_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor._cache().state == "ok"
    monkeypatch.setattr(doctor, "ENOUGH_SPACE", 1 << 60)
    assert doctor._cache().state == "limited"


def test_switches_with_a_chosen_word() -> None:
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not Path(path).exists():
        pytest.skip("no transparent hugepages in this kernel")
    expected = subprocess.run(["grep", "-o", r"\[.*\]", path], capture_output=True, check=True)
    assert f"[{doctor._word(path)}]" == expected.stdout.decode().strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_networks_are_tried() -> None:
    """In a namespace of their own: what works, what the kernel refuses, and a program that is not there."""
    cost = "no networks"
    link = ("ip", "link", "add", "try0", "type")
    works = doctor._tried("bridge", (*link, "bridge"), "iproute2", cost, "modprobe bridge")
    assert works.state == "ok"
    refused = doctor._tried("x", (*link, "nothing"), "iproute2", cost, "modprobe x")
    assert (refused.state, refused.cost) == ("limited", cost)
    missing = doctor._tried("x", ("nothere",), "some-package", cost, "modprobe x")
    assert missing.state == "missing"
    assert missing.cure.endswith("some-package")
