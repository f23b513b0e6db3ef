from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtio.rig import Rig
from virtio.vsock_guest import Guest, Program
from virtio.wire import StreamNics


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def guest(rig: Rig, tmp_path: Path) -> Guest:
    """A driver of the socket device."""
    return Guest(rig, tmp_path)


@pytest.fixture
def program(guest: Guest) -> Iterator[Program]:
    """A program of the host that talks to it."""
    program = Program(guest)
    yield program
    program.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture
def stream_nic(rig: Rig) -> Iterator[StreamNics]:
    nics = StreamNics(rig)
    yield nics
    nics.close()


@pytest.fixture
def loop_device(image: Path) -> Iterator[str]:
    """``image``, a fixture of the test's module, as a block device."""
    yield from _looped(image)


@pytest.fixture
def loop_device_of_4k(image: Path) -> Iterator[str]:
    """The same, with blocks of 4 KiB."""
    yield from _looped(image, "--sector-size", "4096")


def _looped(image: Path, *options: str) -> Iterator[str]:
    command = ["losetup", "-f", "--show", *options, str(image)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
