"""The runtime directory of a machine, and what is left of machines whose hostel was killed.

::

    $XDG_RUNTIME_DIR/hostel/            /run/hostel for root; else /tmp/hostel-UID, ours alone (0700)
        .lock                           held for a moment by whoever makes or sweeps a directory
        .net-…/                         a network that machines share (``net/client.py``)
        NAME/
            lock                        held (flock) as long as that machine's hostel lives
            *.pid                       a helper process: pid and start time (``process.py``)
            *.sock, *.log               sockets; what helpers wrote to standard error

The kernel gives up a dead process's locks. So a directory whose lock is free is a leftover, whatever
killed its owner: its recorded processes are killed and its files removed. Mounts there are none to
undo: helpers mount in namespaces of their own, which end with them (``launch.py``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hostel.errors import HostError, UserError

SOCKET_PATH_LIMIT = 107
"""``sun_path`` has 108 bytes, the last one zero (unix(7))."""


class Runtime:
    """One machine's directory, from ``Runtime(name)`` to ``close``. A context manager."""

    def __init__(self, name: str = "") -> None:
        """Make it and lock it. Without a name one is made up."""
        parent = base()
        with _lock(parent / ".lock"):
            self.name = name or _free_name(parent)
            self.path = parent / self.name
            _sweep_one(self.path)
            self._lock_fd = self._make()

    def close(self) -> None:
        """Remove it. Idempotent."""
        if self._lock_fd < 0:
            return
        from shutil import rmtree  # it brings compression with it: not before a machine starts

        rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> int:
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise UserError(
                f"a machine named {self.name} runs already", cure="choose another name, or stop it"
            ) from None
        except OSError as error:
            raise _refused(self.path, error) from None
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.path.rmdir()
            raise _refused(self.path, error) from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd


def base() -> Path:
    """The directory of all runtime directories of this user; made if need be, and only ours."""
    path = _choose()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise _refused(path, error) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise HostError(
            f"{path} is not a directory that only this user can enter",
            cost="its sockets could be used by others",
            cure=f"remove it, or set XDG_RUNTIME_DIR to a directory of mode 0700; uid {os.geteuid()}",
        )
    return path


def socket_path(runtime: Path, name: str) -> Path:
    """A path for a socket in a runtime directory, checked to be short enough for one."""
    path = runtime / f"{name}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise HostError(
            f"{path} is too long for a socket ({SOCKET_PATH_LIMIT} bytes)",
            cure="give the machine a shorter name, or set a shorter XDG_RUNTIME_DIR",
        )
    return path


def sweep() -> list[str]:
    """Clear away what killed hostels left; returns the names. Safe beside starts and other sweeps."""
    parent = base()
    with _lock(parent / ".lock"):
        machines = (path for path in sorted(parent.iterdir()) if not path.name.startswith("."))
        swept = [path.name for path in machines if _sweep_one(path)]
    if any(parent.glob(".net-*")):
        from .net import client

        swept += client.sweep()
    return swept


def _choose() -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given and Path(given).is_dir() and Path(given).stat().st_uid == os.geteuid():
        return Path(given, "hostel")
    return Path("/run/hostel") if os.geteuid() == 0 else Path(f"/tmp/hostel-{os.geteuid()}")


def _free_name(parent: Path) -> str:
    while (parent / (name := f"run-{os.urandom(3).hex()}")).exists():
        pass
    return name


def _sweep_one(path: Path) -> bool:
    """Remove one directory unless a live hostel holds it. The caller holds the parent's lock."""
    if not path.is_dir():
        return False
    from shutil import rmtree

    with _try_lock(path / "lock") as ours:
        if ours:
            from .process import RECORD_SUFFIX, kill_recorded

            with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
                for record in path.glob(f"*{RECORD_SUFFIX}"):
                    kill_recorded(record)
            rmtree(path, ignore_errors=True)
        return ours


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refused(path, error) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock was free, or there was none: its maker died before it could make it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _refused(path: Path, error: OSError) -> HostError:
    return HostError(
        f"cannot use {path}: {error.strerror}",
        cost="a machine has no place for its sockets",
        cure="set XDG_RUNTIME_DIR to a directory of yours with some room",
    )
