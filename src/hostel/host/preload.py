"""``openat.c``, compiled on first use and kept in the user's cache: what virtiofsd needs preloaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hostel.boot.initramfs import cache_directory
from hostel.errors import HostError, MissingTool

_SOURCE = Path(__file__).with_name("openat.c")
_FLAGS = ("-shared", "-fPIC", "-Os", "-nostdlib", "-s")
_COST = "in a machine of an ordinary user no file of others can be read, not even a program"
_CURE = "apt-get install gcc libc6-dev (as root)"


def library() -> Path:
    """The shared object. It is linked with nothing, and so takes the libc that is there."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_directory("agent") / f"openat-{digest}.so"
    if not target.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise MissingTool("no C compiler found", cost=_COST, cure=_CURE)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
            _compile(compiler, Path(work) / "openat.so", target)
    return target


def _compile(compiler: str, output: Path, target: Path) -> None:
    import subprocess

    command = [compiler, *_FLAGS, "-o", str(output), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        complaint = (done.stderr.splitlines() or ["no word why"])[0]
        raise HostError(f"{_SOURCE.name} cannot be compiled: {complaint}", cost=_COST, cure=_CURE)
    os.replace(output, target)
