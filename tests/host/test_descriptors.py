"""How many files a machine needs: too few are said at once, and what is said to be enough is enough."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from guests.namespaces import missing
from hostel.host.descriptors import needed
from hostel.spec import Disk, MachineSpec, Nic, Volume

COMMAND = [sys.executable, "-m", "hostel", "run", "-q"]


def limited(limit: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    prlimit = ["prlimit", f"--nofile={limit}", "--"]
    return subprocess.run(
        [*prlimit, *COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("limit", [16, 24, 60])
def test_too_few_are_said_before_anything_starts(limit: int) -> None:
    begun = time.monotonic()
    result = limited(f"{limit}:{limit}", "--engine", "qemu", "--", "true")
    assert result.returncode == 125
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"hostel: this process may open {limit} files; the machine would need up to"
    )
    assert "ulimit -n" in line
    assert time.monotonic() - begun < 30, "no deadline of a start has passed"


def test_the_limit_is_raised_where_it_may_be() -> None:
    program = (
        "import resource; from hostel.host.descriptors import ensure, needed\n"
        "from hostel.spec import MachineSpec\n"
        "ensure(MachineSpec()); soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "assert (soft, hard) == (needed(MachineSpec()), 500), (soft, hard)\n"
        "ensure(MachineSpec()); resource.setrlimit(resource.RLIMIT_NOFILE, (300, 500))\n"
        "ensure(MachineSpec()); assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 500)\n"
    )
    command = ["prlimit", "--nofile=30:500", "--", sys.executable, "-c", program]
    subprocess.run(command, check=True)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("qemu", marks=pytest.mark.qemu),
        pytest.param("kvm", marks=pytest.mark.linux_kvm),
    ],
)
def test_what_is_asked_for_is_enough(engine: str, tmp_path: Path) -> None:
    image, base = tmp_path / "disk.img", tmp_path / "base.img"
    for path in (image, base):
        path.write_bytes(bytes(1 << 20))
    spec = MachineSpec(
        cpus=2,
        disks=(Disk(path=str(image), queues=2), Disk(path=str(base), overlay=True)),
        nics=(Nic(),),
        volumes=(Volume(source=str(tmp_path), target="/mnt"),),
    )
    limit = needed(spec)
    words = ["--engine", engine, "--cpus", "2", "--disk", f"{image},queues=2"]
    words += ["--disk", f"{base},overlay", "--net", "nat", "-v", f"{tmp_path}:/mnt"]
    result = limited(f"{limit}:{limit}", *words, "--", "ls", "/mnt")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["base.img", "disk.img"]
