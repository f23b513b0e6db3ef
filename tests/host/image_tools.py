"""Images made by the tool that makes them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MIB = 1 << 20
QEMU_IMG = shutil.which("qemu-img")
needs_qemu_img = pytest.mark.skipif(QEMU_IMG is None, reason="no qemu-img (package qemu-utils)")


def qemu_img(*arguments: object) -> str:
    assert QEMU_IMG is not None
    command = [QEMU_IMG, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def create(path: Path, format: str, size: int = 64 * MIB, *options: object) -> Path:
    qemu_img("create", "-q", "-f", format, *options, path, size)
    return path
