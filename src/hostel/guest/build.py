"""The agent's binary: compiled on first use, then found in the user's cache by its content.

::

    $XDG_CACHE_HOME/hostel/agent/agent-<digest of the sources, the flags and the compiler>

A binary shipped with the package (``guest/hostel-agent``) is taken instead, where there is one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hostel.boot.initramfs import cache_directory
from hostel.errors import HostError, MissingTool

from .protocol import c_header

_HERE = Path(__file__).parent
_FLAGS = (
    *("-std=gnu17", "-Os", "-static", "-s"),
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
)
_CURE = "apt-get install gcc libc6-dev"


def agent_binary() -> Path:
    """The static agent, ready to be ``/init``."""
    shipped = _HERE / "hostel-agent"
    if shipped.exists():
        return shipped
    compiler = _find_compiler()
    target = cache_directory("agent") / f"agent-{_digest(compiler)}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as work:
            _compile(compiler, Path(work), target)
    return target


def _find_compiler() -> str:
    """musl's static programs are a tenth of the size of glibc's: less to unpack in each boot."""
    found = shutil.which("musl-gcc") or shutil.which("cc") or shutil.which("gcc")
    if found is None:
        raise MissingTool(
            "no C compiler found",
            cost="the agent that runs in the guest cannot be built",
            cure=_CURE,
        )
    return found


def _sources() -> list[Path]:
    return sorted((_HERE / "agent").glob("*.c"))


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(" ".join((compiler, *_FLAGS)).encode())
    digest.update(c_header().encode())
    for path in (_HERE / "agent" / "agent.h", *_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, work: Path, target: Path) -> None:
    import subprocess

    (work / "protocol.h").write_text(c_header())
    output = work / "agent"
    command = [compiler, *_FLAGS, f"-I{work}", "-o", str(output), *map(str, _sources())]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise HostError(
            f"the guest's agent cannot be compiled: {_first_complaint(done.stderr)}", cure=_CURE
        )
    os.replace(output, target)


def _first_complaint(output: str) -> str:
    lines = output.splitlines()
    telling = [line for line in lines if "error" in line or "cannot find" in line]
    return (telling or lines or ["the compiler failed without a word"])[0].strip()
