"""The host's side of a machine's NICs: what is made for each, and what the guest is to configure.

::

    Nic.mode                 made on the host                              the guest is told
    nat, isolated            a tap on a bridge of ours (``net/``)          address, gateway, names
    bridge, macvtap          a tap or macvtap on an interface of the host  its address, or to ask (DHCP)
    tap, vhost-user          nothing: it is there                          the same
    user                     a passt process                               address, gateway, names

All of it goes with the machine, also if that is killed: taps are leased from a keeper (``net/keeper``),
passt dies with its parent.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from hostel.errors import HostError, SpecError, UserError
from hostel.spec import Limits, Nic, Publish

from .interface import Attachment, GuestLink, Interface
from .networks import Networks
from .runtime import socket_path
from .tap import tun_missing

if TYPE_CHECKING:
    from .net.client import Lease

OWN = ("nat", "isolated")
BRIDGED = (*OWN, "bridge")
KEPT = (*BRIDGED, "macvtap")
"""Modes with a keeper; all need root."""
_OTHERS = {"bridge": "bridge", "macvtap": "", "tap": "tun"}
"""Modes that use an interface of the host's, and the driver that it must have."""

_BY_NETWORK = ("dhcp", "none")
"""Words in the place of an address."""

EVERY_ADDRESS, FIRST_GROUP = "0.0.0.0", 224
"""Of IPv4; from 224.0.0.0 on there are groups, and no host's address."""
_LOCALLY_ADMINISTERED, _MULTICAST = 2, 1
DHCP_SECONDS = 10.0
"""How long a start waits for a server's answer. One on the same wire takes milliseconds, one that first
looks whether an address is free, two seconds or three."""


class _Place(NamedTuple):
    """Where the files of the NIC with this number go."""

    runtime: Path
    number: int


def attach(
    nics: Sequence[Nic], publish: Sequence[Publish], runtime: Path, name: str, *, cpus: int
) -> Networks:
    """Make the host's side of all NICs. Ports are published on the first.

    ``name`` is the machine's, empty if it has none: by it others find it and its MACs stay the same.
    """
    checked = check(nics, publish, name, cpus=cpus)
    networks = Networks()
    try:
        for index, nic in enumerate(checked):
            ports = publish if index == 0 else ()
            _attach(networks, nic, ports, name, _Place(runtime, index))
    except BaseException:
        networks.close()
        raise
    return networks


def preview(
    nics: Sequence[Nic], publish: Sequence[Publish], runtime: Path, name: str, *, cpus: int
) -> Networks:
    """The same, as far as it can be known with nothing made: as if all networks were new."""
    networks = Networks()
    for index, nic in enumerate(check(nics, publish, name, cpus=cpus)):
        networks._pending.append(partial(_foreseen, nic, runtime, index))
    return networks


def check(nics: Sequence[Nic], publish: Sequence[Publish], name: str, *, cpus: int) -> list[Nic]:
    """Every NIC with its MAC, and no more queues than vCPUs; ``SpecError`` for what cannot be."""
    if publish and not nics:
        raise SpecError("a port is published and there is no network", cure="add --net nat")
    if publish and nics[0].mode not in (*OWN, "user"):
        raise SpecError(
            f"ports cannot be published on a network of mode {nics[0].mode}: the guest has an "
            "address of its own there",
            cure="use nat or user for the first network, or reach the guest at its own address",
        )
    for port in publish:
        _check_port(port)
    return [_checked(nic, index, name, cpus) for index, nic in enumerate(nics)]


def _checked(nic: Nic, index: int, name: str, cpus: int) -> Nic:
    from .net import allow

    if nic.address in _BY_NETWORK and nic.mode in (*OWN, "user"):
        raise SpecError(
            f"a network of mode {nic.mode} gives the guest its address without DHCP",
            cure="leave ip= out, or name an address",
        )
    address = _address(nic)
    if address and nic.mode == "user":
        raise SpecError(
            f"an address is for networks of hostel's own, not for {nic.mode}",
            cure="use nat or isolated",
        )
    if address and nic.mode not in OWN and "/" not in address:
        raise SpecError(
            f"how large the network of {address} is, is not known here",
            cure=f"write its prefix too, such as {address}/24",
        )
    for entry in nic.allow or ():
        allow.parse(entry)
    mac = nic.mac.lower() or _default_mac(name, index)
    return msgspec.structs.replace(nic, mac=mac, queues=min(nic.queues, cpus))


def _address(nic: Nic) -> str:
    """The one that was named, if one was."""
    return "" if nic.address in _BY_NETWORK else nic.address


def _default_mac(name: str, index: int) -> str:
    """Locally administered; the same each time for a machine with a name."""
    from hashlib import sha256

    digest = sha256(f"{name}/{index}".encode()).digest() if name else os.urandom(8)
    first = digest[0] & ~_MULTICAST | _LOCALLY_ADMINISTERED
    return ":".join(f"{byte:02x}" for byte in (first, *digest[1:6]))


def _attach(
    networks: Networks, nic: Nic, publish: Sequence[Publish], name: str, place: _Place
) -> None:
    if nic.mode in KEPT:
        lease = _lease(nic, publish, name)
        networks._undo.callback(lease.close)
        networks._pending.append(lambda: _leased(networks, nic, lease))
    elif nic.mode == "user":
        from .net import passt

        path = socket_path(place.runtime, f"passt{place.number}")
        helper, link = passt.start(nic, publish, path)
        networks._undo.callback(helper.stop)
        interface = _interface(nic, "stream", str(path), nic.mtu)
        networks._pending.append(lambda: passt.ready(helper, path, Attachment(interface, link)))
    else:
        given = _given(nic)
        networks._pending.append(lambda: given)


def _lease(nic: Nic, publish: Sequence[Publish], name: str) -> Lease:
    from .net.client import Lease

    _need_privileges(nic)
    request = {
        "machine": name,
        "mac": nic.mac,
        "address": _address(nic),
        "mtu": nic.mtu,
        "queues": nic.queues,
        "allow": nic.allow,
        "publish": [_port(port) for port in publish],
    }
    return Lease(nic.mode, nic.target, request)


def _leased(networks: Networks, nic: Nic, lease: Lease) -> Attachment:
    answer = lease.answer()
    backend: Literal["tap", "macvtap"] = "macvtap" if nic.mode == "macvtap" else "tap"
    mtu = nic.mtu or (answer["mtu"] if answer["mtu"] != 1500 else 0)
    networks.notes += tuple(n for n in answer.get("notes", ()) if n not in networks.notes)
    interface = _interface(nic, backend, answer["target"], mtu)
    if interface.bridged and nic.limits != Limits():
        networks._rates.append(partial(lease.limit, msgspec.to_builtins(nic.limits)))
    if nic.mode in OWN:
        return Attachment(interface, _link(nic, answer))
    return _foreign(nic, interface, mtu=answer["mtu"], delay=answer.get("delay", 0))


def _foreign(nic: Nic, interface: Interface, *, mtu: int = 0, delay: float = 0) -> Attachment:
    """On a network that is not ours: the address that was named, or the guest asks. ``delay``: seconds until
    the network carries anything."""
    if address := _address(nic):
        link = GuestLink(mac=nic.mac, addresses=(address,), mtu=nic.mtu or mtu or 1500)
        return Attachment(interface, link)
    asks = nic.address == "dhcp" or (not nic.address and nic.mode != "vhost-user")
    return Attachment(interface, None, dhcp=DHCP_SECONDS + delay if asks else 0)


def _link(nic: Nic, answer: dict[str, Any]) -> GuestLink:
    return GuestLink(
        mac=nic.mac,
        addresses=tuple(answer["addresses"]),
        gateway=answer["gateway"],
        dns=tuple(answer["dns"]),
        mtu=answer["mtu"],
        search=tuple(answer["search"]),
    )


def _interface(
    nic: Nic, backend: Literal["tap", "macvtap", "stream", "vhost-user"], target: str, mtu: int
) -> Interface:
    from .net_plane import choose

    plane, reason = choose(nic, backend)
    return Interface(
        model=nic.model,
        plane=plane,
        backend=backend,
        target=target,
        mac=nic.mac,
        mtu=mtu,
        queues=nic.queues,
        limits=nic.limits,
        bridged=nic.mode in BRIDGED,
        reason=reason,
    )


def _given(nic: Nic) -> Attachment:
    """A tap or a socket that somebody else made."""
    if nic.mode == "tap":
        _check_interface(nic)
        return _foreign(nic, _interface(nic, "tap", nic.target, nic.mtu))
    path = Path(nic.target)
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        raise UserError(
            f"{path} is no socket", cure="start the vhost-user backend first, as a server"
        )
    return _foreign(nic, _interface(nic, "vhost-user", str(path.resolve()), nic.mtu))


def _foreseen(nic: Nic, runtime: Path, index: int) -> Attachment:
    from .net import fabric, passt, subnet

    _check_interface(nic)
    if nic.mode in OWN:
        answer = fabric.foreseen(nic.mode, nic.target, _address(nic), nic.mtu)
        return Attachment(_interface(nic, "tap", answer["target"], nic.mtu), _link(nic, answer))
    if nic.mode == "user":
        target = str(runtime / f"passt{index}.sock")
        return Attachment(
            _interface(nic, "stream", target, nic.mtu), passt.link(nic, subnet.routes())
        )
    if nic.mode == "bridge":
        return _foreign(nic, _interface(nic, "tap", "hostel-t0", nic.mtu))
    if nic.mode == "macvtap":
        return _foreign(nic, _interface(nic, "macvtap", "/dev/tap0", nic.mtu))
    return _given(nic)


def _need_privileges(nic: Nic) -> None:
    if os.geteuid() != 0:
        raise HostError(
            f"a network of mode {nic.mode} needs root",
            cost="no bridge, tap or rule can be made",
            cure="run as root, or use --net user",
        )
    if missing := tun_missing():
        raise HostError(missing, cost="no tap can be made", cure="modprobe tun, or use --net user")
    _check_interface(nic)


def _check_interface(nic: Nic) -> None:
    """That what a NIC is to be attached to is there, and is what its mode says."""
    if nic.mode not in _OTHERS:
        return
    from .net import kernel

    make = f"ip tuntap add dev {nic.target} mode tap vnet_hdr user $USER (as root)"
    if nic.target not in kernel.interfaces():
        cure = make if nic.mode == "tap" else "see: ip link"
        raise UserError(f"there is no interface {nic.target}", cure=cure)
    if nic.mode == "macvtap":
        if not kernel.is_ethernet(nic.target):
            raise UserError(f"{nic.target} carries no Ethernet frames", cure="see: ip link")
    elif kernel.driver(nic.target) != _OTHERS[nic.mode]:
        cure = f"see `ip link show type bridge`, or use macvtap={nic.target}"
        if nic.mode == "tap":
            cure = make.replace(nic.target, "NAME")
        raise UserError(f"{nic.target} is no {nic.mode}", cost="it carries no guest", cure=cure)


def _port(port: Publish) -> tuple[str, int, int, str]:
    """For a keeper, to whom every address is an empty one."""
    address = "" if port.address == EVERY_ADDRESS else port.address
    return address, port.host, port.guest, port.protocol


def _check_port(port: Publish) -> None:
    first, dot, _ = port.address.partition(".")
    if port.address and not (dot and first.isdecimal() and int(first) < FIRST_GROUP):
        raise SpecError(
            f"{port.address} is no IPv4 address to publish at", cure="networks of ours carry IPv4"
        )
