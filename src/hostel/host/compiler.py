"""The two small C programs of ours, compiled on first use and kept in the user's cache.

::

    $XDG_CACHE_HOME/hostel/agent/NAME-<digest of the sources, the flags and the compiler>

They are compiled here and not shipped, so that what runs is what was read, on any architecture.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hostel import cache
from hostel.errors import HostError, MissingTool

CURE = "apt-get install gcc libc6-dev (as root)"


def find(*, static: bool) -> str | None:
    """A C compiler. musl's static programs are a tenth of the size of glibc's."""
    names = ("musl-gcc", "cc", "gcc") if static else ("cc", "gcc")
    return next((found for name in names if (found := shutil.which(name))), None)


def compiled(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    *,
    cost: str,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """The program. ``sources``: the C files, and what they include from beside them; ``headers``:
    further ones, by name, as text; ``cost``: what there cannot be without it."""
    compiler = find(static="-static" in flags)
    if compiler is None:
        raise MissingTool("no C compiler found", cost=cost, cure=CURE)
    digest = _digest(compiler, sources, flags, headers or {})
    target = cache.directory("agent") / f"{name}-{digest}"
    if not target.exists():
        with cache.workshop(target.parent) as work:
            for header, text in (headers or {}).items():
                Path(work, header).write_text(text)
            output = Path(work, name)
            _compile([compiler, *flags, f"-I{work}", "-o", str(output)], sources, cost)
            os.replace(output, target)
    return target


def _digest(
    compiler: str, sources: Sequence[Path], flags: Sequence[str], headers: Mapping[str, str]
) -> str:
    digest = hashlib.sha256(" ".join((compiler, *flags, *headers.values())).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], sources: Sequence[Path], cost: str) -> None:
    import subprocess

    files = [str(path) for path in sources if path.suffix == ".c"]
    done = subprocess.run(
        [*command, *files], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        cache.check_room(Path(command[-1]).parent)  # else the compiler's words say nothing of it
        complaint = _first_complaint(done.stderr)
        raise HostError(
            f"{Path(files[0]).name} cannot be compiled: {complaint}", cost=cost, cure=CURE
        )


def _first_complaint(output: str) -> str:
    lines = output.splitlines()
    telling = [line for line in lines if "error" in line or "cannot find" in line]
    return (telling or lines or ["the compiler failed without a word"])[0].strip()
