"""``hostel run`` in real machines. Every boot takes seconds, so each test asks one machine many things."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.hostel_command import HOSTEL, Hostel

pytestmark = pytest.mark.qemu

READY = b"ready\n"


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """``hostel run -q ARG…`` with its streams on pipes; killed at the end if it is still there."""
    process = subprocess.Popen(
        [HOSTEL, "run", "-q", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found == line:
            return
    assert process.stderr is not None
    pytest.fail(f"hostel ended without {line!r}: {process.stderr.read().decode()}")


SURVEY = r"""
echo "arguments: $#"; for one; do printf '[%s]' "$one"; done; echo
echo "directory: $(pwd)"
echo "user: $(id -u):$(id -g):$(id -G)"
echo "host: $(hostname)"
echo "cpus: $(nproc)"
echo "kernel: $(uname -r)"
echo "input: $(cat)"
echo "volume: $(cat /mnt/volume/file)"
echo changed > /mnt/volume/written
echo x > /mnt/fixed/file 2> /dev/null && echo "a read-only volume was written"
echo "tmpfs: $(stat -f -c %T /scratch)"; echo x > /scratch/file || exit 1
tty > /dev/null && echo "a terminal that nobody asked for"
env | sed 's/^/env: /'
echo words for people >&2
exit 7
"""


def test_one_machine_and_everything_about_it(tmp_path: Path) -> None:
    volume, fixed = tmp_path / "volume", tmp_path / "fixed"
    volume.mkdir()
    fixed.mkdir()
    (volume / "file").write_text("shared")
    (fixed / "file").write_text("fixed")
    output = tmp_path / "output"
    output.write_text("before\n")
    arguments = ["a  b", "", "*", "$HOME", "--", "-x", "ä\n"]
    options = ["--json", "--cpus", "2", "-H", "guest-1", "--tmpfs", "/scratch"]
    volumes = ["-v", f"{volume}:/mnt/volume", "-v", f"{fixed}:/mnt/fixed:ro"]
    variables = ["-e", "GIVEN=a b", "-e", "COPIED", "-e", "ABSENT"]
    with output.open("ab") as stdout:
        result = subprocess.run(
            [HOSTEL, "run", *options, *volumes, *variables, "sh", "-c", SURVEY, "sh", *arguments],
            input=b"typed",
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "COPIED": "from the host", "SECRET": "stays"},
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
    text = output.read_text()
    lines = text.splitlines()
    assert result.returncode == 7, result.stderr.decode()
    assert lines[0] == "before", "appended, not truncated"
    assert lines[1] == "arguments: 7"
    assert "[a  b][][*][$HOME][--][-x][ä\n]\n" in text
    groups = " ".join(map(str, dict.fromkeys((os.getgid(), *os.getgroups()))))
    expected = {
        f"directory: {tmp_path}",
        f"user: {os.getuid()}:{os.getgid()}:{groups}",
        "host: guest-1",
        "cpus: 2",
        "input: typed",
        "volume: shared",
        "tmpfs: tmpfs",
        "env: GIVEN=a b",
        "env: COPIED=from the host",
        f"env: HOME={Path.home()}",
    }
    assert expected - set(lines) == set()
    assert not any("SECRET" in line or "ABSENT" in line for line in lines)
    assert not any("written" in line or "nobody" in line for line in lines)
    assert (volume / "written").read_text() == "changed\n"
    assert (fixed / "file").read_text() == "fixed"

    said = result.stderr.decode().splitlines()
    assert "words for people" in said
    assert any(line.startswith("hostel: engine ") for line in said)
    record = json.loads(said[-1])
    assert record["exit_code"] == 7
    assert f"kernel: {record['release']}" in lines
    assert set(record["timings"]) == {"prepare", "start", "boot", "setup", "command"}
    assert all(0 <= seconds < 120 for seconds in record["timings"].values())


def test_read_only_root_as_another_user(hostel: Hostel) -> None:
    script = "touch /etc/x || id -un; pwd; echo $HOME $USER"
    result = hostel("run", "-q", "--read-only", "-w", "/", "-u", "nobody", "sh", "-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [b"nobody", b"/", b"/nonexistent", b"nobody"]
    assert b"Read-only file system" in result.stderr or b"Permission denied" in result.stderr


def test_what_is_written_does_not_reach_the_host(hostel: Hostel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    script = "echo new > file; echo new > other; cat file"
    result = hostel("run", "-q", "sh", "-c", script, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"new\n", b"")
    assert (tmp_path / "file").read_text() == "old"
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_hundred_megabytes_arrive_as_they_were(hostel: Hostel) -> None:
    data = os.urandom(1 << 20) * 100
    result = hostel("run", "-q", "cat", input=data, timeout=280)
    assert result.returncode == 0, result.stderr
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["no-such-program"], 127, "no-such-program: No such file or directory"),
        (["/etc/passwd"], 126, "/etc/passwd: Permission denied"),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
    ],
)
def test_exit_codes(hostel: Hostel, command: list[str], code: int, message: str) -> None:
    result = hostel("run", "-q", "--", *command)
    expected = f"hostel: {message}\n" if message else ""
    assert (result.returncode, result.stdout, result.stderr.decode()) == (code, b"", expected)


def test_timeout_ends_even_who_ignores_it(hostel: Hostel) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    limits = ["--timeout", "1", "--stop-timeout", "1"]
    result = hostel("run", "-q", *limits, "sh", "-c", script)
    assert (result.returncode, result.stdout) == (124, READY)
    assert result.stderr == b"hostel: sh did not end within 1 s (--timeout)\n"


def test_signals_reach_the_command() -> None:
    script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    with started("sh", "-c", script) as process:
        wait_for(process, READY)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (3, b"told\n")


def test_second_interrupt_forces_the_end() -> None:
    with started("sh", "-c", "trap '' INT; echo ready; while :; do sleep 1; done") as process:
        wait_for(process, READY)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_interrupt_during_the_boot() -> None:
    with started("true") as process:
        time.sleep(1.0)
        for _ in range(5):  # an impatient person
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert process.wait(20) == 130
        assert process.communicate() == (b"", b"")


def test_killed_hostel_leaves_nothing(hostel: Hostel) -> None:
    """What it started is checked at the end of all tests; what it left on disk, here."""
    runtime = Path(os.environ["XDG_RUNTIME_DIR"], "hostel")
    with started("--name", "victim", "sh", "-c", "echo ready; sleep 100") as process:
        wait_for(process, READY)
        assert (runtime / "victim").is_dir()
        process.kill()
        process.wait()
    hostel("doctor")
    assert not (runtime / "victim").exists()


def test_reader_that_leaves(hostel: Hostel) -> None:
    script = f"{HOSTEL} run -q -- yes | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.stdout == b"y\n141\n"
    assert result.stderr == b""


def test_output_on_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [HOSTEL, "run", "-q", "--", "seq", "1", "5"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert result.returncode == 125
    assert result.stderr == b"hostel: cannot write to standard output: No space left on device\n"


def test_dry_run_starts_nothing(hostel: Hostel) -> None:
    before = time.monotonic()
    words = ("--engine", "qemu", "--cpus", "3", "--balloon", "true")
    result = hostel("run", "--dry-run", "--json", *words)
    plan = json.loads(result.stdout)
    assert plan["balloon"] == "on"
    assert (plan["engine"], plan["cpus"]) == ("qemu", 3)
    assert Path(plan["kernel"]).is_file()
    assert plan["release"] in plan["kernel"]
    assert time.monotonic() - before < 20


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("not a kernel\n" * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "elf").write_bytes(Path("/bin/true").read_bytes())
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    return tmp_path


BAD = [
    (["--kernel", "{}/none"], "no such file"),
    (["--kernel", "{}/empty"], "empty"),
    (["--kernel", "{}/text"], "kernel"),
    (["--kernel", "{}/elf"], "kernel"),
    (["--kernel", "{}"], "not a regular file"),
    (["--kernel", "5.0.0-none"], "no kernel '5.0.0-none' on this host"),
    (["--initrd", "{}/none"], "initrd"),
    (["--append", "two\nlines"], "one printable line"),
    (["--disk", "{}/none"], "disk"),
    (["--disk", "{}"], "is a directory"),
    (["--disk", "/dev/null"], "is neither a file nor a block device"),
    (["--disk", "{}/disk.qcow2"], "qcow2"),
    (["--root", "{}/text"], "root"),
    (["-v", "{}/none:/mnt"], "volume"),
    (["-u", "no-such-user"], "no-such-user"),
    (["-w", "/no/such/directory"], "/no/such/directory"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(hostel: Hostel, files: Path, options: list[str], message: str) -> None:
    options = [option.format(files) for option in options]
    result = hostel("run", "-q", "--engine", "qemu", *options, "true")
    stderr = result.stderr.decode()
    assert result.returncode == 125, stderr
    assert result.stdout == b""
    first, *rest = stderr.splitlines()
    assert first.startswith("hostel: ")
    assert "a bug in hostel" not in first
    assert message in first
    assert all(line.startswith(("  | ", "hostel: log: ")) for line in rest)
    runtime = Path(os.environ["XDG_RUNTIME_DIR"], "hostel")
    assert not [path for path in runtime.glob("[!.]*") if path.is_dir()]  # hidden: networks


def test_an_error_is_json_too(hostel: Hostel) -> None:
    missing = ("--kernel", "/nonexistent/kernel")
    result = hostel("run", "-q", "--json", "--engine", "qemu", *missing, "--", "true")
    line, record = result.stderr.decode().splitlines()
    told = json.loads(record)
    assert (result.returncode, told["exit_code"]) == (125, 125)
    assert line == f"hostel: {told['error']}"


def test_named_engine_that_cannot_work_fails_at_once(hostel: Hostel) -> None:
    from hostel.kvm.probe import probe

    if probe().usable:
        pytest.skip("this host's KVM runs Linux")
    before = time.monotonic()
    result = hostel("run", "--engine", "kvm", "true")
    assert (result.returncode, result.stdout) == (125, b"")
    assert result.stderr.startswith(b"hostel: engine kvm cannot run Linux here: ")
    assert b"--engine qemu" in result.stderr
    assert time.monotonic() - before < 20
