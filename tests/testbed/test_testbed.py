"""The testbed, from outside: streams, exit codes, signals, and that nothing of it outlives us.

One boot takes ten seconds, so each test here asks several things of one.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
TESTBED = [str(TOP / "dev"), "testbed"]

pytestmark = [pytest.mark.qemu, pytest.mark.slow]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    found = [int(n) for task in tasks.iterdir() for n in (task / "children").read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


def start_until_ready(*command: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*TESTBED, "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_streams_are_exact_and_kept_apart() -> None:
    data = os.urandom(5_000_000)
    program = "cat; echo on stderr >&2; touch /testbed-was-here; exit 7"
    result = subprocess.run(
        [*TESTBED, "--", "sh", "-c", program], input=data, capture_output=True, check=False
    )
    assert result.returncode == 7
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
    assert result.stderr == b"on stderr\n"
    assert not Path("/testbed-was-here").exists()


def test_options_reach_the_machine() -> None:
    program = "nproc; cat /sys/module/kvm_amd/parameters/npt; pwd; echo $HOSTEL_TESTBED; kill -9 $$"
    result = subprocess.run(
        [*TESTBED, "--smp", "3", "--npt", "0", "--", "sh", "-c", program],
        cwd=TOP / "tests",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["3", "N", str(TOP / "tests"), "1"], result.stderr
    assert result.returncode == 128 + signal.SIGKILL


def test_a_command_that_falls_silent_is_ended() -> None:
    program = "trap 'echo where it stands >&2' ABRT; echo up; sleep 600 & wait; sleep 600"
    result = subprocess.run(
        [*TESTBED, "--patience", "5", "--", "sh", "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (125, "up\n")
    assert "where it stands\n" in result.stderr
    assert "the command wrote nothing for 5 s" in result.stderr
    for number in (0, 1):
        assert re.search(rf"CPU {number}: RIP=\w+ RFL=\w+ HLT=\d; ISR .*; IRR ", result.stderr)


def test_an_interrupt_reaches_the_command() -> None:
    process = start_until_ready(
        "sh", "-c", "trap 'echo caught; exit 9' INT; echo ready; sleep 60 & wait"
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (9, b"caught\n"), errors


def test_killed_it_leaves_no_process() -> None:
    process = start_until_ready("sh", "-c", "echo ready; sleep 600")
    family = children(process.pid)
    assert len(family) >= 2
    process.kill()
    process.communicate()
    assert gone(family)


def test_bad_usage_is_said_at_once() -> None:
    result = subprocess.run(
        TESTBED, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no command" in result.stderr


def test_without_a_kernel_it_says_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [*TESTBED, "--", "true"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 125
    assert "./dev setup" in result.stderr
