"""Who serves a NIC's queues: the kernel (vhost), this process (python) or another one (vhost-user).

::

    backend           model    can be                    auto takes
    tap, macvtap      virtio   vhost, python             vhost, if /dev/vhost-net opens
    stream (passt)    virtio   python                    python
    vhost-user        virtio   vhost-user                vhost-user
    any but the last  e1000    python                    python

A plane that was asked for by name is taken or refused, never replaced.
"""

from __future__ import annotations

import os
from typing import Literal

from hostel.errors import HostError, SpecError
from hostel.spec import Limits, Nic

Plane = Literal["python", "vhost", "vhost-user"]
Backend = Literal["tap", "macvtap", "stream", "vhost-user"]

VHOST_NET = "/dev/vhost-net"


def choose(nic: Nic, backend: Backend) -> tuple[Plane, str]:
    """The plane of a NIC on this backend, and why, for a person.

    ``SpecError`` where a plane that was named cannot be with this NIC, ``HostError`` where it cannot be
    on this host.
    """
    wanted = nic.plane
    possible, reason = _possible(nic, backend)
    if wanted == "auto":
        return _best(possible, reason)
    if wanted not in possible:
        raise SpecError(
            f"the data plane {wanted} cannot serve this network interface: {reason}",
            cure=f"leave the plane out, or name {' or '.join(possible)}",
        )
    if wanted == "vhost" and (missing := vhost_missing()):
        raise HostError(
            missing,
            cost="the kernel cannot serve the network interface",
            cure="modprobe vhost_net (as root), or leave the plane out",
        )
    return wanted, "asked for"


def vhost_missing() -> str:
    """Why ``/dev/vhost-net`` cannot be used; empty if it can. Opening it loads the module."""
    try:
        os.close(os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{VHOST_NET}: {error.strerror}"
    return ""


def _possible(nic: Nic, backend: Backend) -> tuple[tuple[Plane, ...], str]:
    """The planes that can be, and what excludes the others."""
    if backend == "vhost-user":
        if nic.model != "virtio":
            raise SpecError(
                f"a vhost-user backend has no {nic.model}", cure="use the model virtio with it"
            )
        return ("vhost-user",), "another process serves its queues"
    if nic.model != "virtio":
        return ("python",), f"{nic.model} is emulated by this process"
    if backend == "stream":
        return ("python",), "its frames come through a socket"
    if nic.limits != Limits():
        return ("python",), "this process keeps its rate limits"
    return ("vhost", "python"), "no other process is behind a tap"


def _best(possible: tuple[Plane, ...], reason: str) -> tuple[Plane, str]:
    if "vhost" not in possible:
        return possible[0], reason
    if missing := vhost_missing():
        return "python", missing
    return "vhost", f"{VHOST_NET} is there"
