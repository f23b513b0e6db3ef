"""hostel as an ordinary user runs it: with the system's Python, a copy of our code, a home of its own.

A copy, because a checkout and its virtual environment may lie where nobody else can look.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hostel
from hostel.host import kernels

STRANGER = 54321
PACKAGES = ("click", "lz4", "msgspec", "zstandard", "qemu.qmp")


class Stranger:
    """Made by root in ``folder``, which all may enter."""

    def __init__(self, folder: Path) -> None:
        python = f"/usr/bin/python3.{sys.version_info.minor}"
        if os.geteuid() != 0:
            pytest.skip("plays another user: needs root")
        if not os.path.exists(python):
            pytest.skip(f"no {python}: nobody else may run {sys.executable}, perhaps")
        self._python, self._home = python, folder / "home"
        self._code = folder / "code"
        folder.chmod(0o711)
        _copy_code(self._code)
        self._copy_kernel()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """``hostel ARG…`` to its end."""
        with self.start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self._python, "-m", "hostel", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            user=STRANGER,
            group=STRANGER,
            extra_groups=[],
            cwd="/",
            env={
                **os.environ,
                "PYTHONPATH": str(self._code),
                "HOME": str(self._home),
                "XDG_CACHE_HOME": str(self._home / "cache"),
                "XDG_RUNTIME_DIR": str(self._home),
            },
        )

    def _copy_kernel(self) -> None:
        """The one that a machine gets, if it is in a cache of somebody else's."""
        kernel = kernels.find()
        cache = self._home / "cache/hostel/kernels"
        cache.mkdir(parents=True)
        if kernel.source == "fetched":
            name = kernel.image.relative_to(kernels.store()).parts[0]
            subprocess.run(["cp", "-a", str(kernels.store() / name), str(cache)], check=True)
        subprocess.run(["chown", "-R", f"{STRANGER}:{STRANGER}", str(self._home)], check=True)
        self._home.chmod(0o700)


def _copy_code(target: Path) -> None:
    shutil.copytree(Path(hostel.__file__).parent, target / "hostel")
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, target.joinpath(*package.split(".")))
