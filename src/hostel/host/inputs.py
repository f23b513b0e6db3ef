"""Files that the user named: looked at before anything is started, so that what is wrong is one line."""

from __future__ import annotations

import os
from pathlib import Path

from hostel.errors import ImageError
from hostel.spec import Disk


def checked_disks(disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
    """The same with absolute paths; ``ImageError`` for one that cannot be a machine's disk."""
    return tuple(_checked(disk) for disk in disks)


def _checked(disk: Disk) -> Disk:
    from .filesystem import image_format

    path = readable(disk.path, "disk")
    if path.is_dir():
        raise ImageError(f"disk {path} is a directory", cure="give a raw image or a block device")
    if not disk.read_only and not os.access(path, os.W_OK):
        raise ImageError(f"disk {path} cannot be written", cure=f"give {disk.path}:ro")
    found = image_format(path)
    if found != "raw":
        raise ImageError(
            f"disk {path} is a {found} image; only raw ones are taken",
            cure=f"qemu-img convert -O raw {path} {path.stem}.raw",
        )
    return Disk(path=str(path), read_only=disk.read_only, serial=disk.serial)


def readable(text: str, what: str) -> Path:
    """The absolute path of a file or directory that the caller may read."""
    path = Path(os.path.abspath(text))
    if not os.access(path, os.R_OK):
        reason = "cannot be read" if os.path.lexists(path) else "no such file or directory"
        raise ImageError(f"{what} {text}: {reason}")
    return path
