"""Our own file server as a process: ``virtio/fuse`` behind a vhost-user socket, confined.

::

    launch.py (namespaces, mounts) ── the share's root, a descriptor ──► serve()
        accept ─► Landlock: the share and nothing else ─► capabilities dropped ─► fuse.serve
                                                                     until the machine hangs up

A process for each share, not a thread of the monitor: one server for both engines (QEMU speaks
vhost-user too), an interpreter lock of its own, and rights that the monitor has but this need not.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import sys
from typing import Literal

import msgspec

from hostel.errors import HostelError

from . import jail

CAPABILITIES = (0, 1, 3, 4, 6, 7)
"""chown, dac_override, fowner, fsetid, setgid, setuid: to be whom a file belongs to."""


class Options(msgspec.Struct, frozen=True):
    """What ``serve`` is told, as JSON."""

    listener: int
    memory: int
    read_only: bool
    cache: Literal["auto", "always", "none"]
    owner: tuple[int, int] | None
    xattr: bool


def serve(root: int, text: str) -> None:
    """Serve the directory ``root``, a descriptor, to one machine, until it hangs up."""
    from hostel.virtio import fuse

    options = msgspec.json.decode(text, type=Options)
    os.umask(0)  # the guest's kernel applies that of its process
    with contextlib.closing(socket.socket(fileno=options.listener)) as listener:
        connection, _ = listener.accept()
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = fuse.Settings(options.read_only, options.cache, options.owner, options.xattr)
    fs = fuse.FileSystem(root, settings, memory=options.memory, descriptors=descriptors)
    session = fuse.Session(fs)
    _confine(root, read_only=options.read_only)
    gc.freeze()
    try:
        fuse.serve(connection, session)
    except HostelError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    finally:
        session.close()


def _confine(root: int, *, read_only: bool) -> None:
    from hostel.virtio.fuse import host

    if os.geteuid() == 0:
        host.keep_capabilities(CAPABILITIES)
    jail.no_new_privileges()
    jail.confine(root, read_only=read_only)
