"""The host's side of a plan's disks, around an engine that attaches them.

::

    overlays(plan)   made with the machine, and kept over the guest's reboots
    daemons(plan)    one power-on: a qemu-storage-daemon for each disk with a socket
    resize(…)        by who serves the disk; then the guest is told
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from . import cache
from .errors import SpecError
from .plan import Drive, Engine, Plan

if TYPE_CHECKING:
    from .host.storage import Daemon

SECTOR = 512
FULL = 1 << 20
"""Bytes; a host's file system with less has refused some of the guest's writes, or soon will."""


@contextlib.contextmanager
def overlays(plan: Plan) -> Iterator[None]:
    with ExitStack() as stack:
        for drive in plan.disks:
            if drive.overlay is not None:
                from .host.storage import Overlay

                stack.callback(Overlay(drive.disk, drive.overlay).close)
        yield


@contextlib.contextmanager
def daemons(plan: Plan) -> Iterator[dict[int, Daemon]]:
    """By the number of their disk; started, and perhaps not up yet."""
    started: dict[int, Daemon] = {}
    with ExitStack() as stack:
        for index, drive in enumerate(plan.disks):
            if drive.socket is not None:
                from .host.storage import Daemon

                started[index] = Daemon(drive.disk, drive.socket, drive.overlay)
                stack.callback(started[index].stop)
        yield started


def resize(
    plan: Plan, engine: Engine, running: Mapping[int, Daemon], index: int, size: int
) -> None:
    """``SpecError`` for what cannot be; nothing has changed then."""
    if not 0 <= index < len(plan.spec.disks):
        raise SpecError(f"the machine has no disk {index}")
    drive = plan.disks[index]
    if drive.disk.read_only:
        raise SpecError(f"disk {index} is read-only: it keeps its size")
    if size <= 0 or size % SECTOR:
        raise SpecError(f"a disk's size is a multiple of {SECTOR} bytes, not {size}")
    if index in running:
        running[index].resize(size)
    engine.resize_disk(index, size)


def full(plan: Plan) -> list[str]:
    """A line for each disk whose file system on the host is full: the guest had I/O errors."""
    return [
        f"the file system of {_shown(drive)} is full: writes of the guest to disk {index} may have failed"
        for index, drive in enumerate(plan.disks)
        if not drive.disk.read_only and _room(drive.overlay or Path(drive.disk.path)) < FULL
    ]


def _shown(drive: Drive) -> Path:
    return Path(drive.disk.path) if drive.overlay is None else cache.directory("overlays")


def _room(path: Path) -> int:
    """Bytes free beside a file; a block device has its own."""
    if path.is_block_device():
        return FULL
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
