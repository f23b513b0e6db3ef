"""Shares: a directory or file of the host, served to a guest by a process of its own.

The rules: a guest sees no more of the host's files than the caller may read, and cannot write a
read-only share whatever its kernel does. Both are kept outside the server, by ``launch.py``: it runs as
the caller, where there is only the share to see and, if read-only, nothing to write.

::

    share() ── listens on the socket ──► launch.py ── namespaces, mounts ──► virtiofsd, or fileserver.py
                └─ may be connected to at once: whoever does waits until the server is up

So starting a share costs its caller nothing, and nobody polls for a socket. If the server ends before
that, the last listener closes and the connection breaks; ``Share.check`` then says why.

Submounts are not announced to the guest: an overlay does not cross from one mount of its lower layer
into another (overlayfs.rst), and would show them empty. The price: files of two host file systems may
show the same inode number.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Literal

import msgspec

from hostel.errors import HostError, MissingTool, UserError
from hostel.spec import Cache, FileServer

from . import virtiofsd
from .process import Helper
from .runtime import socket_path

SETTLE = 0.2
"""Seconds in which a server that has failed, and so broken a connection, has ended."""
BYTES_OF_AN_INODE = 1024
"""What a Linux guest's kernel takes for each file that it remembers, about."""
ENOUGH_FILES = 200_000
"""A limit of open files that a walk over most hosts does not reach."""
CAP_SYS_RESOURCE = 24
_LAUNCH = Path(__file__).with_name("launch.py")


class Served(msgspec.Struct, frozen=True):
    """What a file server has to serve."""

    tag: str
    source: Path
    read_only: bool
    cache: Cache = "auto"
    owner: tuple[int, int] | None = None
    """Uid and gid in the guest that stand for the caller's."""
    server: FileServer = "auto"
    is_root: bool = False


class Choice(msgspec.Struct, frozen=True):
    server: Literal["virtiofsd", "python"]
    reason: str


class Share(msgspec.Struct, frozen=True):
    """A running server. One machine may connect, once."""

    tag: str
    socket: Path
    helper: Helper

    def check(self) -> None:
        """HelperError if the server has failed. It ends well when its machine does."""
        if self.helper.wait(SETTLE):
            raise self.helper.failure()

    def stop(self) -> None:
        """End the server. Idempotent."""
        self.helper.stop()
        self.socket.unlink(missing_ok=True)


def choose(wanted: Served, memory: int) -> Choice:
    """Who serves it; ``memory`` is the guest's. UserError for what the one asked for cannot do.

    virtiofsd is faster. But it keeps a descriptor for each file that the guest remembers, maps no owners,
    and the newer one shows an ordinary user the files of others as nobody's.
    """
    why_not = _why_not_virtiofsd(wanted, memory)
    if wanted.server == "python":
        return Choice("python", "as asked")
    if wanted.server == "virtiofsd":
        if why_not and (wanted.owner or not _serves_us(virtiofsd.find())):
            raise UserError(f"virtiofsd cannot serve {wanted.source}: {why_not}", cure=_CURE)
        virtiofsd.find()
        return Choice("virtiofsd", "as asked")
    return Choice("python", why_not) if why_not else Choice("virtiofsd", "it is the fastest")


_CURE = "leave server=virtiofsd out"


def _why_not_virtiofsd(wanted: Served, memory: int) -> str:
    if wanted.owner:
        return "virtiofsd maps no owners"
    try:
        program = virtiofsd.find()
    except MissingTool as error:
        return error.message
    if not _serves_us(program):
        return "this virtiofsd would show an ordinary user the files of others as nobody's"
    most, need = most_open_files(), min(memory // BYTES_OF_AN_INODE, ENOUGH_FILES)
    if most < need:
        return (
            f"virtiofsd needs a descriptor for each file that the guest remembers: {most} are too few;"
            f" {more_files(need)}"
        )
    return ""


def _serves_us(program: str) -> bool:
    return program == virtiofsd.C_VERSION or os.geteuid() == 0


def most_open_files() -> int:
    """As far as ``launch.py`` can raise the limit."""
    if _may_raise_limits():
        with contextlib.suppress(OSError, ValueError):
            return int(Path("/proc/sys/fs/nr_open").read_text())
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def more_files(need: int) -> str:
    """What to do for as many."""
    if _may_raise_limits():
        return f"sysctl fs.nr_open={need}"
    return f"have your limit of open files (ulimit -Hn) raised to {need}"


def _may_raise_limits() -> bool:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        capable = next(line.split()[1] for line in status if line.startswith("CapEff:"))
        return bool(int(capable, 16) >> CAP_SYS_RESOURCE & 1)
    return False


def share(runtime: Path, wanted: Served, *, memory: int) -> Share:
    """Start a server that shows ``source`` (and what is mounted below it) under its tag.

    A file is shown under its name in an otherwise empty directory.
    """
    choice = choose(wanted, memory)
    real = _checked(wanted.source)
    name = "" if real.is_dir() else wanted.source.name
    stage, path = runtime / f"{wanted.tag}.share", socket_path(runtime, wanted.tag)
    with contextlib.closing(_listen(path, stage)) as listener:
        fd = listener.fileno()
        if choice.server == "python":
            preload, command = "", _python(wanted, fd, memory)
        else:
            preload, command = virtiofsd.preloaded(), _virtiofsd(wanted, fd, stage)
        mode = "ro" if wanted.read_only else "rw"
        launch = (sys.executable, "-IS", str(_LAUNCH), str(os.getpid()), preload)
        helper = Helper(
            f"{choice.server}-{wanted.tag}"
            if choice.server == "virtiofsd"
            else f"files-{wanted.tag}",
            (*launch, str(real), name, str(stage), mode, *command),
            runtime=runtime,
            pass_fds=(fd,),
            guarded=True,
        )
    return Share(wanted.tag, path, helper)


def _virtiofsd(wanted: Served, fd: int, stage: Path) -> tuple[str, ...]:
    """A read-only root does not change under the guest as far as we care: it may cache for ever."""
    program = virtiofsd.find()
    return (program, *virtiofsd.options(program, stage, fd, cache=wanted.cache))


def _python(wanted: Served, fd: int, memory: int) -> tuple[str, ...]:
    """The arguments of ``launch.py`` for a server in the same process."""
    from .fileserver import Options

    options = Options(
        listener=fd,
        memory=memory,
        read_only=wanted.read_only,
        cache=wanted.cache,
        owner=wanted.owner,
        xattr=not wanted.is_root,
    )
    places = os.pathsep.join(place for place in map(os.path.abspath, filter(None, sys.path)))
    return ("python", msgspec.json.encode(options).decode(), places)


def _checked(source: Path) -> Path:
    """Absolute, and there for the caller."""
    try:
        source = source.resolve(strict=True)
        if not source.is_dir():
            source.open("rb").close()
        elif not os.access(source, os.R_OK | os.X_OK, effective_ids=True):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"cannot share {source}: {error.strerror}") from None
    return source


def _listen(path: Path, stage: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stage.mkdir(exist_ok=True)
        listener.bind(os.fspath(path))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error.strerror}") from None
    return listener
