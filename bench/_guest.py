"""The guest that boot benchmarks share: an /init that prints a marker, and the wait for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARKER = b"user space is here"
DEADLINE = 180.0
"""Seconds that a boot may take; then the benchmark ends."""

_INIT = f"""
#include <unistd.h>
int main(void)
{{
	(void)!write(1, "{MARKER.decode()}\\n", {len(MARKER) + 1});
	pause();
}}
"""


def build_init() -> bytes:
    """The static program."""
    with tempfile.TemporaryDirectory(prefix="hostel-bench-") as work:
        source, init = Path(work, "init.c"), Path(work, "init")
        source.write_text(_INIT)
        subprocess.run(["cc", "-static", "-Os", "-s", "-o", init, source], check=True)
        return init.read_bytes()


@contextlib.contextmanager
def at_user_space(argv: list[str]) -> Iterator[int]:
    """Start a machine whose console is its standard output; in the block it has said the marker. Its pid.
    It is killed at the block's end."""
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    signal.alarm(int(DEADLINE))
    try:
        assert child.stdout is not None
        seen = b""
        while MARKER not in seen:
            data = os.read(child.stdout.fileno(), 4096)
            if not data:
                raise SystemExit(f"{argv[0]} ended: {child.communicate()[1].decode()} {seen!r}")
            seen += data
        yield child.pid
    finally:
        signal.alarm(0)
        child.kill()
        child.communicate()
