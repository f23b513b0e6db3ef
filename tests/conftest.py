"""What all tests share: marks that ask the host for something, and the check that nothing is left behind.

A test that needs what this host lacks is skipped with the reason. In the testbed (HOSTEL_TESTBED=1) KVM
that runs Linux is what the place is for: there a test marked linux_kvm that skips itself is a failure.

Every process that a test starts inherits HOSTEL_TEST_SESSION, however far down; by this the check at the
end knows its own from those of anybody else on this host.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from guests.namespaces import leave_network

IN_TESTBED = os.environ.get("HOSTEL_TESTBED") == "1"
SESSION = "HOSTEL_TEST_SESSION"
PATIENCE = 30.0
"""Seconds that a process may take to notice that its machine is gone, and to clear up: in the testbed a
network's rules take some."""


def kvm_missing() -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return ""


def linux_kvm_missing() -> str:
    """Hardware virtualization shows as a CPU flag. A KVM without it interprets the guest's ring 0."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None or not {"vmx", "svm"} & set(flags[1].split()):
        return (
            "no KVM that runs Linux at speed: this CPU shows neither vmx nor svm (use ./dev test)"
        )
    return kvm_missing()


def qemu_missing() -> str:
    daemons = ("virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 is not installed"
    if not any(map(shutil.which, daemons)):
        return "virtiofsd is not installed"
    return ""


def nat_missing() -> str:
    if os.geteuid() != 0:
        return "networks of hostel's own need root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    return "" if shutil.which("nft") else "nft is not installed"


NEEDS: dict[str, Callable[[], str]] = {
    "kvm": kvm_missing,
    "linux_kvm": linux_kvm_missing,
    "qemu": qemu_missing,
    "nat": nat_missing,
}
"""A mark, and what its tests lack here ("" for nothing)."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark, missing in NEEDS.items():
        if item.get_closest_marker(mark) and (reason := missing()):
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected = hasattr(report, "wasxfail")
    if IN_TESTBED and report.skipped and not expected and item.get_closest_marker("linux_kvm"):
        report.outcome = "failed"
        report.longrepr = f"skipped in the testbed, which has what it takes: {report.longrepr}"
    return report


def processes_of(session: str) -> list[str]:
    """The command lines of living processes that a test of this session started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if f"{SESSION}={session}".encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"{entry.name}: {command}")
        except OSError:
            continue  # it has just ended, or is another user's
    return found


@pytest.fixture(scope="session", autouse=True)
def own_network() -> None:
    """All tests are in a network namespace of their own, if root runs them: machines with a network make
    bridges and rules, and this host's are not theirs to touch. Only a loopback interface is there."""
    if os.geteuid() != 0:
        return
    leave_network()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(own_network: None) -> Iterator[None]:
    """After the last test: no process of ours lives, and no machine's runtime directory is left."""
    session = uuid.uuid4().hex
    # Not pytest's own folder: its long paths would not leave room in a socket's address.
    with (
        tempfile.TemporaryDirectory(prefix="hostel-test-") as runtime,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(SESSION, session)
        patch.setenv("XDG_RUNTIME_DIR", runtime)
        yield
        deadline = time.monotonic() + PATIENCE
        while (processes := processes_of(session)) and time.monotonic() < deadline:
            time.sleep(0.1)
        machines = [path for path in Path(runtime).glob("hostel/*") if path.is_dir()]
    assert not processes, "processes left behind by tests: " + "; ".join(processes)
    assert not machines, f"runtime directories left behind: {machines}"
