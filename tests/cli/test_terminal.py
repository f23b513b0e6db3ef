"""A person at a terminal: a real pseudo-terminal, a real guest."""

from __future__ import annotations

import os
import signal
import time

import pytest

from cli.typist import person
from hostel.cli import terminal


@pytest.mark.qemu
def test_a_shell_for_a_person() -> None:
    with person("run", "-q", "-e", "PS1=READY>", "-e", "ENV=", "--", "sh", "-i") as someone:
        someone.expect(b"READY>")
        assert someone.is_raw
        someone.type(b"stty size; echo $TERM\r")
        someone.expect(b"33 101\r\nxterm\r\n")
        someone.resize(44, 55)
        os.kill(someone.process.pid, signal.SIGWINCH)
        someone.expect(b"READY>")
        someone.type(b"sleep 1; stty size\r")
        someone.expect(b"44 55\r\n")
        someone.type(b"sleep 100\r")
        time.sleep(1)
        someone.type(b"\x03")
        someone.expect(b"READY>")
        someone.type(b"exit 5\r")
        assert someone.end() == 5
        assert someone.restored


@pytest.mark.qemu
def test_terminal_is_restored_when_hostel_is_told_to_end() -> None:
    script = "trap '' TERM; echo rea''dy; while :; do sleep 1; done"
    with person("run", "-q", "--stop-timeout", "1", "sh", "-c", script) as someone:
        someone.expect(b"ready")
        assert someone.is_raw
        someone.process.terminate()
        assert someone.end() == 128 + signal.SIGTERM
        assert someone.restored


@pytest.mark.qemu
@pytest.mark.parametrize("pause", ["60", "0.01"])
def test_a_terminal_that_vanishes_is_a_hangup(pause: str) -> None:
    """Also for a command that just writes: EIO is seen before SIGHUP is."""
    script = f"echo rea''dy; while :; do echo on; sleep {pause}; done"
    with person("run", "-q", "--net", "none", "--", "sh", "-c", script) as someone:
        someone.expect(b"ready")
        assert someone.leave() == 128 + signal.SIGHUP


@pytest.mark.qemu
def test_three_interrupts_at_once_force_the_end() -> None:
    script = "trap '' INT; stty -echo; echo rea''dy; while read line; do echo \"<$line>\"; done"
    with person("run", "-q", "sh", "-c", script) as someone:
        someone.expect(b"ready")
        for keys in (b"\x03", b"\x03", b"x\x03", b"\x03\r"):  # four, but never three in a row
            someone.type(keys)
        someone.expect(b"<")
        someone.expect(b">")
        assert someone.process.poll() is None
        for _ in range(3):
            someone.type(b"\x03")
            time.sleep(0.1)
        assert someone.end() == 128 + signal.SIGINT
        assert someone.restored


@pytest.mark.qemu
def test_no_command_is_a_shell_and_progress_goes_away() -> None:
    with person("run", "-e", "HOME=/nonexistent") as someone:
        someone.expect(b"engine ")
        someone.expect(b"booting Linux")
        someone.expect(b"\r\x1b[K")
        someone.type(b"echo $((6*7))''x; exit\r")
        someone.expect(b"42x")
        assert someone.end() == 0
        assert someone.restored


def test_terminal_is_restored_after_an_error() -> None:
    with person("run", "--kernel", "/no/such/kernel", "true") as someone:
        assert someone.end() == 125
        assert b"\x1b[31mhostel:\x1b[0m kernel /no/such/kernel" in someone.seen
        assert someone.restored


def test_size_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(terminal, "STDIN", reader)
    monkeypatch.setattr(terminal, "STDOUT", writer)
    try:
        assert terminal.size() == (24, 80)
        assert not terminal.interactive()
        with terminal.raw():
            pass
    finally:
        os.close(reader)
        os.close(writer)
