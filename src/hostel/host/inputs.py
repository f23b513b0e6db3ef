"""Files that the user named: looked at before anything is started, so that what is wrong is one line."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hostel.errors import ImageError
from hostel.spec import Disk


def checked_disks(disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
    """The same with absolute paths and known formats; ``ImageError`` for what cannot be a disk."""
    return tuple(_checked(disk) for disk in disks)


def _checked(disk: Disk) -> Disk:
    from .images import format_of

    path = readable(disk.path, "disk")
    if not (path.is_file() or path.is_block_device()):
        kind = "a directory" if path.is_dir() else "neither a file nor a block device"
        raise ImageError(f"disk {path} is {kind}", cure="give an image or a block device")
    if not (disk.read_only or disk.overlay or os.access(path, os.W_OK)):
        raise ImageError(
            f"disk {path} cannot be written", cure=f"give {disk.path}:ro, or {disk.path},overlay"
        )
    return msgspec.structs.replace(disk, path=str(path), format=format_of(path, disk.format))


def readable(text: str, what: str) -> Path:
    """The absolute path of a file or directory that the caller may read."""
    path = Path(os.path.abspath(text))
    if not os.access(path, os.R_OK):
        raise ImageError(f"{what} {text}: {_why_not(path)}")
    return path


def _why_not(path: Path) -> str:
    try:
        path.lstat()
    except FileNotFoundError:
        return "no such file or directory"
    except OSError as error:  # it may be there: a folder on the way lets the caller not in
        return str(error.strerror)
    return "cannot be read"
