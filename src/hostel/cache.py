"""The user's cache: what can be made again, and is not, because it takes time.

::

    $XDG_CACHE_HOME/hostel/     ~/.cache/hostel
        kernels/                fetched guest kernels        host/fetch.py
        vmlinux/                unpacked kernels             boot/decompress.py
        initramfs/              boot/initramfs.py
        agent/                  compiled programs            guest/build.py, host/preload.py
        mini/                   assembled mini guests        soft/mini/build.py

Everything here may be deleted at any time. A file appears whole or not at all (``store``), so any number
of hostels may share it.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import HostError

_CURE_FULL = "make room, or set XDG_CACHE_HOME to another disk"


def home() -> Path:
    """hostel's folder; it need not exist. A relative path in the variable is to be ignored (XDG Base
    Directory Specification, "Environment variables")."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "hostel"
    except RuntimeError:
        raise HostError(
            "there is no home directory for a cache", cure="set XDG_CACHE_HOME"
        ) from None


def directory(name: str) -> Path:
    """A folder in it; it exists."""
    path = home() / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"{path} cannot be made: {error.strerror}",
            cure="set XDG_CACHE_HOME to a folder of yours",
        ) from None
    return path


ROOM = 4 << 20
"""What a compiler needs for one of our programs, and then some."""


def check_room(path: Path) -> None:
    """HostError if the disk under ``path`` is full."""
    disk = os.statvfs(path)
    if disk.f_bavail * disk.f_frsize < ROOM:
        raise HostError(f"the disk of {path} is full", cure=_CURE_FULL)


def store(target: Path, data: bytes) -> None:
    """Write a file of the cache, whole or not at all."""
    import tempfile

    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise HostError(
            f"{target} cannot be written: {error.strerror}",
            cure=_CURE_FULL,
        ) from None
