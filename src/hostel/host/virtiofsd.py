"""virtiofsd: the file server that hosts bring. There are two of that name.

::

    /usr/lib/qemu/virtiofsd                  in C, from QEMU up to 7.2 (Debian 12)
    /usr/libexec/virtiofsd, …/lib/virtiofsd  its successor in Rust, with other options

Both are started by ``launch.py``, which shows them the share and nothing else; ``shares`` says when. Both
keep a descriptor for each file that the guest remembers. The second serves root only: as an ordinary user
it takes its root by a path, and ``launch.py`` has none to give.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hostel.errors import HostError

from . import preload, toolbox

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
C_VERSION = "/usr/lib/qemu/virtiofsd"
THREADS = 0
"""The queue's own thread does the work: 1 and 4 more were no faster (find, tar, cat, under TCG)."""


def find() -> str:
    """The virtiofsd of this host."""
    return toolbox.find(
        "virtiofsd",
        package="virtiofsd (Debian 12: qemu-system-common)",
        cost="hostel serves files itself, which takes longer",
        places=PLACES,
    )


def preloaded() -> str:
    """Root needs it only where a file is made on both sides at once; anyone else, for every file."""
    try:
        return str(preload.library())
    except HostError:
        if os.geteuid() != 0:
            raise
        return ""


def options(program: str, stage: Path, fd: int, *, cache: str) -> Iterator[str]:
    """For a share that ``launch.py`` mounts at ``stage``.

    No extended attributes: each look-up would ask for them, and file capabilities and ACLs of the host
    mean nothing in a guest. No POSIX locks: each would block a thread here.
    """
    # its limit of open files is as high as it may be already
    yield from (f"--fd={fd}", f"--thread-pool-size={THREADS}", "--rlimit-nofile=0")
    if program == C_VERSION:
        place = stage if os.geteuid() == 0 else "/"  # see openat.c
        settings = f"source={place},cache={cache},sandbox=chroot,no_xattr,no_posix_lock,no_flock"
        yield from ("-f", "-o", settings, "-o", "log_level=err")
        return
    yield from (f"--shared-dir={stage}", "--sandbox=chroot", "--no-announce-submounts")
    yield from (f"--cache={'never' if cache == 'none' else cache}", "--log-level=error")
