"""Images of the mini guests, assembled and linked on first use and kept in the user's cache.

::

    NAME.s ── as, with the parameters as symbols ── ld ──► $XDG_CACHE_HOME/hostel/mini/NAME-<digest>

The digest is of all sources, the parameters and the tools' version: what runs is what was read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from hostel import cache
from hostel.errors import HostError, MissingTool

HERE = Path(__file__).parent
Mode = Literal["sector", "protected", "long"]

_COST = "mini guests cannot be built"
_CURE = "apt-get install binutils (as root)"
_EMULATION = {"sector": "elf_x86_64", "protected": "elf_i386", "long": "elf_x86_64"}


def built(name: str, mode: Mode, parameters: Mapping[str, int]) -> Path:
    """The image of ``NAME.s``; a sector is its 512 bytes, anything else an ELF file with a PVH note."""
    target = cache.directory("mini") / f"{name}-{_digest(name, mode, parameters)}"
    if not target.exists():
        with cache.workshop(target.parent) as work:
            output = Path(work, name)
            _assemble(name, mode, parameters, output)
            os.replace(output, target)
    return target


def _digest(name: str, mode: Mode, parameters: Mapping[str, int]) -> str:
    digest = hashlib.sha256(f"{name} {mode} {sorted(parameters.items())} {_tools()}".encode())
    digest.update(_sources(name))
    return digest.hexdigest()[:16]


def _sources(name: str) -> bytes:
    files = (HERE / f"{name}.s", *sorted((HERE / "lib").iterdir()))
    return b"".join(path.read_bytes() for path in files)


@functools.cache
def _tools() -> str:
    """Which assembler and linker: their paths, sizes and times."""
    found = []
    for tool in ("as", "ld"):
        path = shutil.which(tool)
        if path is None:
            raise MissingTool(f"no {tool} found", cost=_COST, cure=_CURE)
        status = os.stat(path)
        found.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return " ".join(found)


def _assemble(name: str, mode: Mode, parameters: Mapping[str, int], output: Path) -> None:
    thing = output.with_suffix(".o")
    symbols = [f"--defsym={key.upper()}={value}" for key, value in parameters.items()]
    width = "--32" if mode == "protected" else "--64"
    source, script = HERE / f"{name}.s", HERE / "lib" / f"{_script(mode)}.ld"
    _do("as", width, f"-I{HERE / 'lib'}", *symbols, "-o", str(thing), str(source))
    flags = ("-n", "-z", "noexecstack", "--no-warn-rwx-segments", "--build-id=none")
    _do("ld", "-m", _EMULATION[mode], *flags, "-T", str(script), "-o", str(output), str(thing))


def _script(mode: Mode) -> str:
    return "sector" if mode == "sector" else "mini"


def _do(*command: str) -> None:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        cache.check_room(cache.directory("mini"))  # else the tool's words say nothing of it
        complaint = next(iter(done.stderr.splitlines()[-1:]), "it failed without a word")
        raise HostError(f"{command[0]}: {complaint}", cost=_COST, cure=_CURE)
