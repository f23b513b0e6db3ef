"""A NIC between host and guest, as values: what the engine attaches, and what the guest is to configure.

Here and not in ``plan.py``, which shows ``Interface`` too: the host's side of a NIC is made in this room.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hostel.spec import Limits


class Interface(msgspec.Struct, frozen=True):
    """A NIC as an engine is to make it: every name resolved, the host's side there already."""

    model: Literal["virtio", "e1000"]
    plane: Literal["python", "vhost", "vhost-user"]
    backend: Literal["tap", "macvtap", "stream", "vhost-user"]
    target: str
    """A tap's name, a macvtap's ``/dev/tapN``, or the path of a socket: passt's stream of frames, each
    with its length before it in 4 bytes, or a vhost-user-net backend's. A tap of ours has several queues
    (IFF_MULTI_QUEUE) exactly if ``queues`` is more than one."""
    mac: str
    mtu: int = 0
    """0: not announced."""
    queues: int = 1
    limits: Limits = Limits()
    bridged: bool = False
    """The target is a tap of ours on a bridge: the host's kernel can keep its rates."""
    reason: str = ""
    """Why this plane, for a person."""

    @property
    def summary(self) -> str:
        where = f"{self.backend} {self.target}"
        return f"{self.model} {self.mac} on {where}, plane {self.plane} ({self.reason})"


class GuestLink(msgspec.Struct, frozen=True):
    """What the guest sets up on the interface with this MAC: on networks of ours nobody is asked."""

    mac: str
    addresses: tuple[str, ...]
    """With their prefix: ``10.213.0.2/24``."""
    gateway: str = ""
    """Empty: nothing beyond the network."""
    dns: tuple[str, ...] = ()
    mtu: int = 1500
    search: tuple[str, ...] = ()
    """Domains to search for a short name: ``NAME`` of another machine is ``NAME.hostel``."""


class Attachment(msgspec.Struct, frozen=True):
    """One NIC of a machine; ``link`` is None where nothing is known beforehand."""

    interface: Interface
    link: GuestLink | None
    dhcp: float = 0
    """Seconds that a start waits until somebody has given the guest an address; 0: nobody is asked."""
