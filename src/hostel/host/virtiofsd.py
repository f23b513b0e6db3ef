"""Shares: a directory or file of the host, served to a guest by a virtiofsd of its own.

The rules: a guest sees no more of the host's files than the caller may read, and cannot write a
read-only share whatever its kernel does. Both are kept outside virtiofsd, by ``launch.py``: it runs as
the caller, and in a mount namespace where there is only the share to see and, if read-only, nothing
to write.

::

    share() ── listens on the socket ──► launch.py ── namespaces, mounts ──► exec virtiofsd --fd N
                └─ may be connected to at once: whoever does waits until virtiofsd is up

So starting a share costs its caller nothing, and nobody polls for a socket. If virtiofsd ends before
that, the last listener closes and the connection breaks; ``Share.check`` then says why.

Submounts are not announced to the guest: an overlay does not cross from one mount of its lower layer
into another (overlayfs.rst), and would show them empty. The price: files of two host file systems may
show the same inode number.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import msgspec

from hostel.errors import HostError, UserError

from . import preload, toolbox
from .process import Helper
from .runtime import socket_path

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
C_VERSION = "/usr/lib/qemu/virtiofsd"
"""QEMU's own (up to 7.2) lies there; the others are the rewrite in Rust, with other options."""

THREADS = 0
"""The queue's own thread does the work: 1 and 4 more were no faster (find, tar, cat, under TCG)."""
SETTLE = 0.2
"""Seconds in which a daemon that has failed, and so broken a connection, has ended."""
_LAUNCH = Path(__file__).with_name("launch.py")


class Share(msgspec.Struct, frozen=True):
    """A running daemon. One machine may connect, once."""

    tag: str
    socket: Path
    helper: Helper

    def check(self) -> None:
        """HelperError if the daemon has failed. It ends well when its machine does."""
        if self.helper.wait(SETTLE):
            raise self.helper.failure()

    def stop(self) -> None:
        """End the daemon. Idempotent."""
        self.helper.stop()
        self.socket.unlink(missing_ok=True)


def share(runtime: Path, tag: str, source: Path, *, read_only: bool) -> Share:
    """Start a daemon that shows ``source`` (and what is mounted below it) under ``tag``.

    A file is shown under its name in an otherwise empty directory.
    """
    program = find()
    real = _checked(source)
    name = "" if real.is_dir() else source.name
    stage, path = runtime / f"{tag}.share", socket_path(runtime, tag)
    with contextlib.closing(_listen(path, stage)) as listener:
        fd = listener.fileno()
        launch = (sys.executable, "-IS", str(_LAUNCH), str(os.getpid()), _preload())
        what = (str(real), name, str(stage), "ro" if read_only else "rw")
        helper = Helper(
            f"virtiofsd-{tag}",
            (*launch, *what, program, *_options(program, stage, fd, read_only=read_only)),
            runtime=runtime,
            pass_fds=(fd,),
            guarded=True,
        )
    return Share(tag, path, helper)


def find() -> str:
    """The virtiofsd of this host."""
    return toolbox.find(
        "virtiofsd",
        package="virtiofsd (Debian 12: qemu-system-common)",
        cost="no file of the host can be shown in a machine: no root from the host, no volumes",
        places=PLACES,
    )


def _preload() -> str:
    """Root needs it only where a file is made on both sides at once; anyone else, for every file."""
    try:
        return str(preload.library())
    except HostError:
        if os.geteuid() != 0:
            raise
        return ""


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


def _options(program: str, stage: Path, fd: int, *, read_only: bool) -> list[str]:
    """A read-only share does not change under the guest as far as we care: it may cache for ever.

    No extended attributes: each look-up would ask for them, and file capabilities and ACLs of the host
    mean nothing in a guest. No POSIX locks: each would block a thread here.
    """
    cache = "always" if read_only else "auto"
    # its limit of open files is as high as it may be already
    common = [f"--fd={fd}", f"--thread-pool-size={THREADS}", "--rlimit-nofile=0"]
    if program == C_VERSION:
        place = stage if os.geteuid() == 0 else "/"  # anyone else: see openat.c
        settings = f"source={place},cache={cache},sandbox=chroot,no_xattr,no_posix_lock,no_flock"
        return ["-f", *common, "-o", settings, "-o", "log_level=err"]
    sandbox = "chroot" if os.geteuid() == 0 else "none"  # chroot is refused to anyone but uid 0
    return [
        *common,
        f"--shared-dir={stage}",
        f"--sandbox={sandbox}",
        f"--cache={cache}",
        "--no-announce-submounts",
        "--log-level=error",
    ]
