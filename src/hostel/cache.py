"""The user's cache: what can be made again, and is not, because it takes time.

::

    $XDG_CACHE_HOME/hostel/     ~/.cache/hostel
        .lock                   held for a moment by who makes a workshop
        kernels/                fetched guest kernels        host/fetch.py
        vmlinux/                unpacked kernels             boot/decompress.py
        initramfs/              boot/initramfs.py
        agent/                  compiled programs            guest/build.py, host/preload.py
        mini/                   assembled mini guests        soft/mini/build.py

Everything here may be deleted at any time. A file appears whole or not at all (``store``), so any number
of hostels may share it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import HostError

_WORKSHOP = ".work-"
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


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """An empty directory beside the entries of a folder, to make one in and move it out (``os.replace``).

    Each has a lock that its maker holds, and the kernel drops the locks of the dead (flock(2)): those of
    killed hostels are cleared away here.
    """
    import tempfile
    from shutil import rmtree

    with contextlib.ExitStack() as stack:
        try:
            with _locked(
                folder.parent / ".lock"
            ):  # nobody meets one that is made and not yet locked
                for left in folder.glob(f"{_WORKSHOP}*"):
                    _clear(left)
                work = Path(tempfile.mkdtemp(prefix=_WORKSHOP, dir=folder))
                stack.callback(rmtree, work, ignore_errors=True)
                stack.enter_context(_locked(work / "lock"))
        except OSError as error:
            raise _unwritable(folder, error) from None
        yield work


def _clear(left: Path) -> None:
    from shutil import rmtree

    with contextlib.suppress(OSError), _locked(left / "lock", wait=False):
        rmtree(left)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """BlockingIOError if another holds it and we do not wait."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _unwritable(path: Path, error: OSError) -> HostError:
    return HostError(f"{path} cannot be written: {error.strerror}", cure=_CURE_FULL)


def store(target: Path, data: bytes) -> None:
    """Write a file of the cache, whole or not at all."""
    with workshop(target.parent) as work:
        try:
            Path(work, target.name).write_bytes(data)
            Path(work, target.name).replace(target)
        except OSError as error:
            raise _unwritable(target, error) from None
