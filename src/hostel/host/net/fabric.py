"""A network of hostel's own, ``nat`` or ``isolated``: its bridge, taps, addresses and rules.

The bridge has no IPv6 and neither have its guests: nothing to get around a rule by.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any

from hostel.errors import HostError, UserError
from hostel.vmm.loop import EventLoop

from . import allow, firewall, flows, forwarding, kernel, rates
from .port import reserve
from .resolver import MAX_ADDRESSES, Resolver
from .rules import Guest, Port, View, render
from .state import State
from .subnet import PREFIX, Pool, Route, choose, routes
from .watch import Watch

DOMAIN = "hostel"
MTU = 1500

BRIDGE_SYSCTLS = {
    "ipv6/conf/{}/disable_ipv6": "1",
    "ipv4/conf/{}/forwarding": "1",
    "ipv4/conf/{}/route_localnet": "1",
    "ipv4/conf/{}/proxy_arp_pvlan": "1",
    "ipv4/neigh/{}/proxy_delay": "0",
    "ipv4/conf/{}/rp_filter": "1",
}
"""Of the bridge alone; they go with it. ``route_localnet``: ports published at 127.0.0.1."""


class Network:
    """Made by ``make``; what it changes on the host is noted for ``state.undo``."""

    def __init__(self, folder: str, kind: str, name: str) -> None:
        self._folder, self._name, self._world = folder, name or "default", kind == "nat"
        self.state = State(folder)
        self._routes = routes()
        self._pool = Pool(choose(self._name, self._routes))
        self._guests: dict[int, Guest] = {}
        self._reserved: dict[int, list[socket.socket]] = {}
        self._limits: dict[int, dict[str, Any]] = {}
        self._count = 0
        self.notes: list[str] = []
        self._bridge = _free_bridge()

    def make(self, loop: EventLoop) -> None:
        """Everything but guests. Names are answered on ``loop``."""
        bridge = self._bridge
        self._mtu = _mtu(self._routes)
        self.state.note("link", bridge)
        mac = ":".join(["02", *(f"{byte:02x}" for byte in os.urandom(5))])
        kernel.ip(
            [
                f"link add {bridge} address {mac} type bridge stp_state 0 forward_delay 0 "
                "mcast_snooping 0",
                f"link set {bridge} addrgenmode none alias hostel:{self._name}",
                f"addr add {self._pool.gateway}/{PREFIX} dev {bridge}",
                f"link set {bridge} up",
            ]
        )
        for path, value in BRIDGE_SYSCTLS.items():
            if kernel.sysctl(path.format(bridge)) is not None:
                kernel.set_sysctl(path.format(bridge), value)
        self._resolver = Resolver(self._pool.gateway, self, loop)
        self._view = View(
            bridge,
            mac,
            str(self._pool),
            self._pool.gateway,
            world=self._world,
            dns_port=self._resolver.port,
        )
        if self._world:
            self._open_uplinks()
        self._let_through()
        Watch(loop, self)

    def _open_uplinks(self) -> None:
        """Packets that arrive there are forwarded: answers, and what is for published ports."""
        uplinks = forwarding.uplinks(self._routes)
        if uplinks and kernel.sysctl("ipv4/ip_forward") != "1":
            self.state.note("forwarding", self._folder)
            self._view.opened = forwarding.join(self._folder, uplinks)

    def _let_through(self) -> None:
        self.reopen()
        for family in ("inet", "bridge"):
            self.state.note("table", f"{family}:{self._bridge}")

    def reopen(self) -> None:
        """The host's firewall may have been loaded anew, or only now."""
        ways, self.notes = firewall.look(self._bridge)
        if ways and not firewall.is_open(self._bridge, ways):
            self.state.note("accept", self._bridge)
            firewall.close(self._bridge)
            kernel.nft(ways)

    def restore(self) -> None:
        """What began while there were no rules is not taken for something that they have let pass."""
        self._load()
        for number, limits in self._limits.items():
            rates.hold(self.state, self._guests[number].tap, limits)
        for guest in self._guests.values():
            if self._is_limited(guest):
                flows.forget(guest.address)

    def _is_limited(self, guest: Guest) -> bool:
        return guest.allow is not None or not self._world

    # -- machines --------------------------------------------------------------------------------

    def attach(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A tap, an address and rules for one NIC; the number of its lease, and what to answer."""
        wanted = request["allow"]
        entries = None if wanted is None else [allow.parse(text) for text in wanted]
        if any(guest.mac == request["mac"] for guest in self._guests.values()):
            raise UserError(f"the MAC {request['mac']} is in use on this network")
        self._count += 1
        number, address = self._count, self._pool.take(request["address"])
        guest = Guest(number, f"{self._bridge}-{number}", request["mac"], address)
        guest.machine, guest.allow = request["machine"].lower(), entries
        guest.names = {entry.host: {} for entry in entries or () if entry.kind == "name"}
        self._guests[number] = guest
        try:
            self._reserved[number] = []
            if self._is_limited(guest):
                flows.forget(guest.address)  # whoever had it before may have been allowed more
            self._publish(guest, request["publish"])
            self._plug(guest, request["queues"], request["mtu"] or self._mtu)
        except BaseException:
            self.detach(number)
            raise
        return number, self._answer(guest, request)

    def _answer(self, guest: Guest, request: dict[str, Any]) -> dict[str, Any]:
        return {
            "target": guest.tap,
            "addresses": [f"{guest.address}/{PREFIX}"],
            "gateway": self._pool.gateway if self._world else "",
            "dns": [self._pool.gateway],
            "search": [DOMAIN],
            "mtu": request["mtu"] or self._mtu,
            "notes": self.notes,
        }

    def _publish(self, guest: Guest, wanted: list[list[Any]]) -> None:
        for address, host, port, protocol in wanted:
            self._reserved[guest.number].append(reserve(address, host, protocol))
            guest.ports.append(Port(address, host, port, protocol))
            if not (self._world or self._view.opened or address.startswith("127.")):
                self._open_uplinks()

    def _plug(self, guest: Guest, queues: int, mtu: int) -> None:
        tap, several = guest.tap, "multi_queue" if queues > 1 else ""
        self.state.note("link", tap)
        kernel.ip(
            [
                f"tuntap add dev {tap} mode tap vnet_hdr {several}",
                f"link set {tap} arp off addrgenmode none",  # before an MTU below 1280: no IPv6 there
                f"link set {tap} mtu {mtu} master {self._bridge} up",
                f"link set {tap} type bridge_slave hairpin on",  # its own published port
                f"neigh replace {guest.address} lladdr {guest.mac} dev {self._bridge} nud permanent",
            ]
        )
        kernel.silence(tap)
        self._load()  # nobody has the tap open before we have answered

    def limit(self, number: int, limits: dict[str, Any]) -> None:
        """Keep one NIC's rates."""
        rates.hold(self.state, self._guests[number].tap, limits)
        self._limits[number] = limits

    def detach(self, number: int) -> None:
        """Take everything of one NIC away."""
        guest = self._guests.pop(number)
        self._limits.pop(number, None)
        for sock in self._reserved.pop(number, []):
            sock.close()
        self._pool.give_back(guest.address)
        for line in (f"neigh del {guest.address} dev {self._bridge}", f"link del {guest.tap}"):
            with contextlib.suppress(HostError):  # not made yet, or taken away by someone else
                kernel.ip([line])
        self.state.forget("link", guest.tap)
        rates.release(self.state, guest.tap)
        self._load()
        with contextlib.suppress(
            HostError
        ):  # who must not inherit any makes sure of it on attaching
            flows.forget(guest.address)

    def _load(self) -> None:
        self._view.guests = list(self._guests.values())
        kernel.nft(render(self._view, time.monotonic()))

    # -- what the resolver asks ------------------------------------------------------------------

    def guest_at(self, address: str) -> Guest | None:
        return next((g for g in self._guests.values() if g.address == address), None)

    def machine(self, name: str) -> list[str]:
        """The addresses of a machine, by ``NAME`` or ``NAME.hostel``."""
        short = name.removesuffix(f".{DOMAIN}")
        return [g.address for g in self._guests.values() if g.machine and g.machine == short]

    def has(self, address: str) -> bool:
        """Whether an address is of the network's own subnet."""
        return self._pool.has(address)

    def reaches_world(self) -> bool:
        return self._world

    def admit(self, guest: Guest, name: str, addresses: list[str], seconds: int) -> None:
        """DNS has told a guest the addresses of a name that it may reach."""
        now = time.monotonic()
        known = {a: end for a, end in guest.names[name].items() if end > now}
        room = max(MAX_ADDRESSES - len(known), 0)
        fresh = [a for a in addresses if a not in known][:room]
        fresh += [a for a in addresses if a in known and known[a] - now < seconds / 2]
        if not fresh:
            return
        guest.names[name] = {**known, **dict.fromkeys(fresh, now + seconds)}
        items = ", ".join(f"{address} timeout {seconds}s" for address in fresh)
        which = f"inet {self._bridge} {guest.set_of(name)}"
        plain = ", ".join(fresh)
        kernel.nft(
            f"add element {which} {{ {items} }}\n"
            f"delete element {which} {{ {plain} }}\n"  # an element's time cannot be prolonged
            f"add element {which} {{ {items} }}\n"
        )


def _free_bridge() -> str:
    present = kernel.interfaces()
    return next(name for n in range(10000) if (name := f"hostel{n}") not in present)


def _mtu(found_routes: list[Route]) -> int:
    """No more than the ways to the world take: a guest need not learn it packet by packet."""
    found = [kernel.mtu(route.device) for route in found_routes if route.size == 0]
    return min([MTU, *(mtu for mtu in found if mtu >= 1280)])


def foreseen(kind: str, name: str, address: str, mtu: int) -> dict[str, Any]:
    """What the first machine of a network would be answered."""
    pool = Pool(choose(name or "default", routes()))
    return {
        "target": f"{_free_bridge()}-1",
        "addresses": [f"{pool.take(address)}/{PREFIX}"],
        "gateway": pool.gateway if kind == "nat" else "",
        "dns": [pool.gateway],
        "search": [DOMAIN],
        "mtu": mtu or MTU,
    }
