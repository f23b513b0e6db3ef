"""The guest's side of its NICs: which drivers it needs, and what the agent configures.

::

    Attachment.link    interface: MTU, up, addresses, default route    /etc/resolv.conf    /etc/hosts
    None               interface: up                                   as it is            own name

The host knows all of it beforehand, so the guest asks nobody and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hostel.host.interface import Attachment, GuestLink
from hostel.spec import MachineSpec

from .steps import Hostname, Link, MakeDirectory, Remove, Step, WriteFile

DRIVERS = {"virtio": "virtio_net", "e1000": "e1000"}
DEFAULT_HOSTNAME = "hostel"
OWN_ADDRESS = "127.0.1.1"
"""What a name stands for that has no address on a network (Debian Policy's choice; hosts(5))."""
MAX_E1000_MTU = 1500
"""Larger frames need settings of the NIC that only a larger MTU of the caller's is worth."""


def modules(spec: MachineSpec) -> list[str]:
    """Names of the drivers of its NICs."""
    return sorted({DRIVERS[nic.model] for nic in spec.nics})


def hostname(spec: MachineSpec) -> str:
    return spec.hostname or spec.name or DEFAULT_HOSTNAME


def network_steps(spec: MachineSpec, attachments: Sequence[Attachment]) -> Iterator[Step]:
    """Interfaces, name servers, the machine's own name. In the guest's root, while it can be written."""
    for attachment, nic in zip(attachments, spec.nics, strict=True):
        yield _interface(attachment, nic.mtu)
    links = [attachment.link for attachment in attachments if attachment.link]
    yield MakeDirectory("/etc")
    if content := resolver(links):
        # It may be a link into /run or to a file of the host's resolver: that is not to be written.
        yield Remove("/etc/resolv.conf")
        yield WriteFile("/etc/resolv.conf", content)
    address = links[0].addresses[0].partition("/")[0] if links else OWN_ADDRESS
    name = hostname(spec)
    yield WriteFile("/etc/hosts", f"\n{address}\t{name}\n".encode(), append=True)
    yield Hostname(name)


def _interface(attachment: Attachment, asked: int) -> Link:
    interface, link = attachment.interface, attachment.link
    if link is None:
        return Link(interface.mac, mtu=interface.mtu)
    mtu = link.mtu
    if interface.model == "e1000" and not asked:
        mtu = min(mtu, MAX_E1000_MTU)
    gateways = [link.gateway] if link.gateway else []
    return Link(interface.mac, mtu=mtu, addresses=link.addresses, gateways=gateways)


def resolver(links: Sequence[GuestLink]) -> bytes:
    """resolv.conf(5): the name servers of all networks, the first network's first; empty if none."""
    servers = list(dict.fromkeys(server for link in links for server in link.dns))
    domains = list(dict.fromkeys(domain for link in links for domain in link.search))
    lines = [f"nameserver {server}\n" for server in servers]
    if servers and domains:
        lines.append(f"search {' '.join(domains)}\n")
    return "".join(lines).encode()
