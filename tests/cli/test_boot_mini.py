"""``hostel boot`` with small kernels of our own, on engines kvm and soft."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.hostel_command import HOSTEL, Hostel
from guests.machine import SPIN, kernel, say
from hostel.soft import mini
from hostel.soft.record import log


@pytest.mark.parametrize("name", ["hello", "sector"])
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(("--engine", "kvm"), marks=pytest.mark.kvm, id="kvm"),
        pytest.param(("--engine", "soft"), id="soft"),
    ],
)
def test_a_mini_guest(hostel: Hostel, engine: tuple[str, ...], name: str) -> None:
    """Also where KVM interprets the guest's kernel: that is no place for Linux, but this is none."""
    if "soft" in engine:
        pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    result = hostel("boot", *engine, "-q", "--timeout", "60", "--kernel", str(mini.image(name)))
    assert (result.returncode, result.stderr) == (1, b"")
    assert result.stdout.decode() == mini.guest(name).console


@pytest.mark.qemu
def test_engine_qemu_boots_no_sectors(hostel: Hostel) -> None:
    result = hostel("boot", "-q", "--engine", "qemu", "--kernel", str(mini.image("sector")))
    assert (result.returncode, result.stdout) == (125, b"")
    assert result.stderr == b"hostel: engine qemu boots no boot sectors; use --engine kvm or soft\n"


def test_record_and_replay(hostel: Hostel, tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    path = str(tmp_path / "log")
    machine = ("--engine", "soft", "--cpus", "2", "-m", "64M", "--kernel", str(mini.image("ipi")))
    first = hostel("boot", "-q", *machine, "--record", path)
    assert (first.returncode, first.stderr) == (1, b"")
    again = hostel("boot", "--replay", path, "--verbose")
    assert (again.returncode, again.stdout) == (1, first.stdout)
    assert again.stderr.endswith(
        f"hostel: the replay of {path} was the same, to the last register\n".encode()
    )
    with Path(path).open("ab") as file:
        file.write(b"more\n")
    cut = hostel("boot", "--replay", path)
    assert (cut.returncode, cut.stdout) == (125, b"")
    assert cut.stderr == (
        f"hostel: the log {path} has no end: its recording was cut off; record the machine anew\n".encode()
    )


def test_a_second_interrupt_leaves_the_recording_whole(tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    path = tmp_path / "log"
    kernel = str(mini.image("compute", rounds=mini.guests.MOST))
    machine = [HOSTEL, "boot", "--engine", "soft", "-m", "256M", "--kernel", kernel]
    with subprocess.Popen(
        [*machine, "--record", path], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 60
        while not path.exists() or b'"mark"' not in path.read_bytes():
            assert time.monotonic() < end
            time.sleep(0.02)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(rb"(hostel: the machine was stopped: vCPU 0 .*\n)?", said)
    assert log.read(path).entries[-1].kind == "off"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--replay", "x", "--cpus", "2"), b"give --replay without --cpus"),
        (("--replay", "x", "--engine", "kvm"), b"give --replay without --engine"),
        (("--replay", "/nonexistent"), b"the log /nonexistent cannot be read: No such file"),
        (("--engine", "kvm", "--record", "x"), b"words of engine soft; add --engine soft"),
        (
            ("--engine", "soft", "--record", "x", "--net", "user"),
            b"a machine with a network interface cannot be recorded",
        ),
    ],
)
def test_wrong_words_of_record_and_replay(
    hostel: Hostel, arguments: tuple[str, ...], words: bytes
) -> None:
    result = hostel("boot", *arguments)
    assert (result.returncode, result.stdout) == (125, b"")
    assert words in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("source", "cpus", "where"),
    [
        (
            "cli; hlt",
            1,
            "vCPU 0 is halted at RIP 0x10000e with interrupts off: nothing can wake it",
        ),
        ("cli; 1: jmp 1b", 1, "vCPU 0 runs at RIP 0x10000d, interrupts off"),
        (
            "cli; hlt",
            2,
            "vCPU 0 is halted at RIP 0x10000e with interrupts off: only an NMI or INIT can wake it; "
            "vCPU 1 waits for its start-up message",
        ),
    ],
)
def test_where_it_was_when_its_time_was_over(
    hostel: Hostel, tmp_path: Path, source: str, cpus: int, where: str
) -> None:
    """And a replay's exit code and words are the recorded machine's."""
    pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    image, log = tmp_path / "kernel", str(tmp_path / "log")
    image.write_bytes(kernel(source))
    machine = ("--engine", "soft", "--cpus", str(cpus), "-m", "64M", "--kernel", str(image))
    first = hostel("boot", "-q", *machine, "--record", log, "--timeout", "1")
    assert first.returncode == 124
    assert first.stderr == f"hostel: the machine's time is over (--timeout): {where}\n".encode()
    again = hostel("boot", "-q", "--replay", log)
    assert (again.returncode, again.stderr) == (first.returncode, first.stderr)


def test_where_it_was_at_ctrl_c(tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    image = tmp_path / "kernel"
    image.write_bytes(kernel(say("x") + SPIN))
    arguments = ("boot", "--engine", "soft", "-m", "64M", "--kernel", str(image))
    with subprocess.Popen(
        [HOSTEL, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"the machine was stopped: vCPU 0 runs at RIP 0x100" in said
