"""A person at a terminal: a real pseudo-terminal, a real guest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

from cli.hostel_command import HOSTEL
from hostel.cli import terminal

PATIENCE = 90.0


class Person:
    """Sits at the master's side."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(33, 101)
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", HOSTEL, *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**os.environ, "TERM": "xterm"},
        )

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, text: bytes, seconds: float = PATIENCE) -> None:
        """Read until ``text`` is seen, and forget what was seen up to there."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen.partition(text)[2]

    def end(self) -> int:
        """hostel's exit code; what it still writes is read, so that it can end."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.wait(1)

    @property
    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)


@contextlib.contextmanager
def person(*arguments: str) -> Iterator[Person]:
    someone = Person(*arguments)
    try:
        yield someone
    finally:
        someone.process.kill()
        someone.process.wait()
        os.close(someone.master)
        os.close(someone.slave)


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
def test_no_command_is_a_shell_and_progress_goes_away() -> None:
    with person("run") as someone:
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
