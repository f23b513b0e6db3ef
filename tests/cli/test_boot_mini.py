"""``hostel boot`` with small kernels of our own, on engines kvm and soft."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.hostel_command import Hostel
from hostel.soft import mini


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
    log = str(tmp_path / "log")
    machine = ("--engine", "soft", "--cpus", "2", "-m", "64M", "--kernel", str(mini.image("ipi")))
    first = hostel("boot", "-q", *machine, "--record", log)
    assert (first.returncode, first.stderr) == (1, b"")
    again = hostel("boot", "--replay", log, "--verbose")
    assert (again.returncode, again.stdout) == (1, first.stdout)
    assert again.stderr.endswith(
        f"hostel: the replay of {log} was the same, to the last register\n".encode()
    )
    with Path(log).open("ab") as file:
        file.write(b"more\n")
    cut = hostel("boot", "--replay", log)
    assert (cut.returncode, cut.stdout) == (125, b"")
    assert cut.stderr == (
        f"hostel: the log {log} has no end: its recording was cut off; record the machine anew\n".encode()
    )


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
