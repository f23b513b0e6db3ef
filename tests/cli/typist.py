"""A person at a terminal: ``hostel`` on a real pseudo-terminal, as its controlling one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

from cli.hostel_command import HOSTEL

PATIENCE = 90.0


class Person:
    """Sits at the master's side."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = os.openpty()
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

    def leave(self) -> int:
        """Close the terminal, as a connection that is lost does; hostel's exit code."""
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self.master)
        os.close(null)
        return self.process.wait(PATIENCE)

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
