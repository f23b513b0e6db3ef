"""Run Python in a process of its own, to be killed with SIGKILL while it does something for us.

The script prints one line when it is where the test wants it; ``Victim.line`` is that line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType


class Victim:
    """A Python process. A context manager: it is gone at the end in any case."""

    def __init__(self, script: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        assert self._process.stdout is not None
        self.line = self._process.stdout.readline().strip()
        assert self.line, "the script ended early"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while lives(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
