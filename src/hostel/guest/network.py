"""The guest's side of its NICs: which drivers it needs, and what the agent configures.

::

    Attachment.link    interface: MTU, up, addresses, default route    /etc/resolv.conf    /etc/hosts
    .dhcp              interface: up, and all else by DHCP             by DHCP             own name
    neither            interface: up                                   as it is            own name

On networks of hostel's own the host knows all of it beforehand: the guest asks nobody, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hostel.errors import AgentError
from hostel.host.interface import Attachment, GuestLink
from hostel.spec import MachineSpec

from .steps import Dhcp, Hostname, Link, MakeDirectory, Remove, Step, WriteFile

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
    asking = [attachment for attachment in attachments if attachment.dhcp]
    yield MakeDirectory("/etc")
    content = resolver(links)
    if content or asking:
        # It may be a link into /run or to a file of the host's resolver: that is not to be written.
        yield Remove("/etc/resolv.conf")
        yield WriteFile("/etc/resolv.conf", content)
    address = links[0].addresses[0].partition("/")[0] if links else OWN_ADDRESS
    name = hostname(spec)
    yield WriteFile("/etc/hosts", f"\n{address}\t{name}\n".encode(), append=True)
    yield Hostname(name)
    if asking:
        macs = tuple(attachment.interface.mac for attachment in asking)
        yield Dhcp(macs, max(attachment.dhcp for attachment in asking))


def answers(said: str, attachments: Sequence[Attachment]) -> dict[str, str]:
    """By MAC, what the step ``Dhcp`` got: an address with its prefix, or nothing."""
    found = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
    wanted = [one.interface.mac for one in attachments if one.dhcp]
    if sorted(found) != sorted(wanted) or not all(map(_is_address, found.values())):
        raise AgentError("the agent broke its protocol: addresses that are none, or nobody's")
    return found


def _is_address(text: str) -> bool:
    from ipaddress import IPv4Interface

    try:
        return not text or bool(IPv4Interface(text))
    except ValueError:
        return False


def unanswered(found: Mapping[str, str], attachments: Sequence[Attachment]) -> Iterator[str]:
    """A line for each NIC without an address, for the user."""
    for one in attachments:
        if one.dhcp and not found.get(one.interface.mac):
            where = f"{one.interface.backend} {one.interface.target}"
            yield (
                f"the guest has no IPv4 address on {where}: no DHCP server answered in {one.dhcp:g} s; "
                "it goes on asking; give it one with ip=ADDRESS/PREFIX, or say ip=none"
            )


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
