"""Opening what a NIC's frames come from: a tap by its name, a macvtap by its device file.

One descriptor for each pair of queues, non-blocking, with a virtio header before each frame. What is opened
is there already: a NIC's set-up or the administrator made it. The kernel would make a tap that does not
exist; so the name is looked up first, and a wrong one is an error and not a new interface.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket

from hostel.abi import tun
from hostel.errors import HostError

from .interface import Interface

TUN = "/dev/net/tun"
FLAGS = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR

_REASONS = {
    errno.EINVAL: (
        "is no tap, or has no several queues",
        "ip tuntap add dev {} mode tap multi_queue",
    ),
    errno.EBUSY: ("is in use", "stop the machine or program that has it, or use another one"),
    errno.EPERM: (
        "may not be used by this user",
        "ip tuntap add dev {} mode tap user NAME, or be root",
    ),
    errno.EACCES: ("may not be used by this user", "become root, or its owner"),
    errno.E2BIG: ("has no more queues", "ask for fewer"),
    errno.ENOENT: ("does not exist", "modprobe tun (or macvtap)"),
}


def tun_missing() -> str:
    """Why this process can make no tap; empty if it can."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{TUN}: {error.strerror}"
    return ""


def open_queues(nic: Interface) -> list[int]:
    """What a NIC on a tap or a macvtap needs."""
    opener = open_tap if nic.backend == "tap" else open_macvtap
    return opener(nic.target, nic.queues)


def open_tap(name: str, queues: int = 1) -> list[int]:
    """Descriptors of the tap ``name``; for several queues it must have been made with ``multi_queue``."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        raise HostError(
            f"there is no interface {name}",
            cost="the NIC has no network",
            cure=f"ip tuntap add dev {name} mode tap",
        ) from None
    # A tap with several queues wants the flag even of who takes only one.
    several = FLAGS | tun.IFF_MULTI_QUEUE
    if queues == 1:
        try:
            return [_open(TUN, name, FLAGS)]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _refused(f"tap {name}", name, error) from None
    return _open_all(TUN, name, several, queues)


def open_macvtap(device: str, queues: int = 1) -> list[int]:
    """Descriptors of the macvtap with this device (``/dev/tapN``): each one opened is a queue."""
    return _open_all(device, "", FLAGS | tun.IFF_MULTI_QUEUE, queues)


def _open_all(path: str, name: str, flags: int, queues: int) -> list[int]:
    fds: list[int] = []
    try:
        while len(fds) < queues:
            fds.append(_open(path, name, flags))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise _refused(f"tap {name}" if name else path, name, error) from None
    return fds


def _open(path: str, name: str, flags: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ.pack(name.encode(), flags, b""))
    except OSError:
        os.close(fd)
        raise
    return fd


def _refused(what: str, name: str, error: OSError) -> HostError:
    reason, cure = _REASONS.get(error.errno or 0, (f"cannot be opened: {error.strerror}", ""))
    return HostError(
        f"{what} {reason}", cost="the NIC has no network", cure=cure.format(name or "NAME")
    )
