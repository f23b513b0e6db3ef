"""The nftables rules of one network: text from what the network is, loaded in one transaction.

::

    guest ─► tap ─► bridge table, prerouting: the guest's own MAC and address, ARP and IPv4, or nothing
                     │ and to the bridge's own MAC: frames go to the host's IP layer only
                     ▼
    inet table    early      nothing of a tap's own: see there; nothing to 127.0.0.0/8 (route_localnet
                             is on for published ports)
                  inward     DNS of the bridge's address to the keeper; published ports to guests
                  to_host    what a guest may ask of the host
                  through    what it may reach; what may reach it
                  outward    masquerade

So all that a guest sends is routed, also to its neighbours (the host answers their ARP: proxy_arp_pvlan),
and connection tracking sees both directions of everything, on kernels without it for bridges too. An
allow-list is then one place in ``to_host`` and one in ``through``.

``accept`` here ends these chains only: the host's own firewall still has its say (``firewall``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .allow import Allowed


class Port:
    """A published port."""

    def __init__(self, address: str, host: int, guest: int, protocol: str) -> None:
        self.address, self.host, self.guest, self.protocol = address, host, guest, protocol


class Guest:
    """One NIC on the network, as the rules see it. ``allow`` None: anything."""

    def __init__(self, number: int, tap: str, mac: str, address: str) -> None:
        self.number, self.tap, self.mac, self.address = number, tap, mac, address
        self.machine = ""
        self.allow: list[Allowed] | None = None
        self.ports: list[Port] = []
        self.names: dict[str, dict[str, float]] = {}
        """Of each allowed name the addresses that DNS gave, and until when (monotonic)."""

    def names_machine(self, name: str) -> list[str]:
        """The allowed names that mean this machine: with the domain or without."""
        short = name.removesuffix(".hostel")
        return [entry for entry in self.names if entry.removesuffix(".hostel") == short]

    def set_of(self, name: str) -> str:
        """The nft set of an allowed name's addresses."""
        return f"name{self.number}_{list(self.names).index(name)}"


class View:
    """What the rules are made from."""

    def __init__(
        self, bridge: str, mac: str, subnet: str, gateway: str, *, world: bool, dns_port: int
    ) -> None:
        self.bridge, self.mac, self.subnet, self.gateway = bridge, mac, subnet, gateway
        self.world, self.dns_port = world, dns_port
        self.opened: list[str] = []
        """Uplinks that forward only because of us."""
        self.guests: list[Guest] = []


def render(view: View, now: float) -> str:
    """Both tables, new: what was there before goes in the same transaction."""
    name = view.bridge
    return "\n".join(
        (
            *(
                f"table {family} {name}\ndelete table {family} {name}"
                for family in ("inet", "bridge")
            ),
            f"table bridge {name} {{",
            *_bridge(view),
            "}",
            f"table inet {name} {{",
            *_opened(view),
            *_sets(view.guests, now),
            *_lists(view),
            *_translation(view),
            *_input(view),
            *_forward(view),
            "}\n",
        )
    )


def chain(name: str, hook: str, rules: Iterable[str]) -> Iterator[str]:
    yield f"chain {name} {{ {hook}"
    yield from rules
    yield "}"


def _bridge(view: View) -> Iterator[str]:
    """Before the bridge learns or forwards anything, and before br_netfilter (priority 0).

    All that goes from port to port is what br_netfilter, where a host has it on, has given a new address
    (a published port that another guest asks for): it went through the inet table on its way.
    """
    for guest in view.guests:
        yield from chain(f"guest{guest.number}", "", _identity(guest, view))
    jumps = ", ".join(f'"{guest.tap}" : goto guest{guest.number}' for guest in view.guests)
    taps = ", ".join(f'"{guest.tap}"' for guest in view.guests)
    rules = [f"iifname vmap {{ {jumps} }}"] if jumps else []
    yield from chain("guests", "type filter hook prerouting priority -250;", rules)
    rules = [f"iifname {{ {taps} }} ether type != ip drop"] if taps else []
    yield from chain("across", "type filter hook forward priority filter;", rules)


def _identity(guest: Guest, view: View) -> Iterator[str]:
    """Its own MAC and address, in the frame and in ARP; an address that it probes for is 0.0.0.0."""
    yield f"ether saddr != {guest.mac} drop"
    yield f"ether type ip ether daddr {view.mac} ip saddr {guest.address} accept"
    yield (
        f"ether type arp ether daddr {{ ff:ff:ff:ff:ff:ff, {view.mac} }} "
        f"arp saddr ether {guest.mac} arp saddr ip {{ 0.0.0.0, {guest.address} }} "
        f"arp daddr ip {view.subnet} arp daddr ip != {guest.address} accept"
    )
    yield "drop"


def _opened(view: View) -> Iterator[str]:
    """Uplinks forward for our guests, not for anybody else who sends packets there."""
    elements = ", ".join(f'"{name}"' for name in view.opened)
    rules = []
    if elements:
        ours = f'iifname {{ {elements} }} oifname != "hostel*"'
        rules = [f"{ours} ct state new ct status & dnat == 0 drop"]
    yield from chain("guard", "type filter hook forward priority filter - 1;", rules)


def _sets(guests: Iterable[Guest], now: float) -> Iterator[str]:
    for guest in guests:
        for name, addresses in guest.names.items():
            alive = [(a, int(end - now)) for a, end in addresses.items() if end - now >= 1]
            items = ", ".join(f"{a} timeout {seconds}s" for a, seconds in alive)
            elements = f"elements = {{ {items} }};" if items else ""
            yield f"set {guest.set_of(name)} {{ type ipv4_addr; flags timeout; {elements} }}"


def _lists(view: View) -> Iterator[str]:
    """For each guest with an allow-list, what it may ask of the host, and what it may reach elsewhere."""
    for guest in view.guests:
        if guest.allow is not None:
            at_home = [_allowed(guest, entry) for entry in guest.allow if entry.kind == "address"]
            single = [_allowed(guest, entry) for entry in guest.allow if entry.kind != "prefix"]
            wide = [_allowed(guest, entry) for entry in guest.allow if entry.kind == "prefix"]
            yield from chain(f"host{guest.number}", "", (*at_home, "drop"))
            beyond = ('oifname "hostel*" drop', *wide) if view.world else ()
            near = single if view.world else [f'oifname "{view.bridge}" {rule}' for rule in single]
            yield from chain(f"reach{guest.number}", "", (*near, *beyond, "drop"))


def _allowed(guest: Guest, entry: Allowed) -> str:
    target = f"@{guest.set_of(entry.host)}" if entry.kind == "name" else entry.host
    return " ".join(("ip daddr", target, entry.service(), "accept")).replace("  ", " ")


def _limited(view: View, prefix: str) -> Iterator[str]:
    listed = [guest for guest in view.guests if guest.allow is not None]
    if listed:
        jumps = ", ".join(f"{guest.address} : goto {prefix}{guest.number}" for guest in listed)
        yield f"ip saddr vmap {{ {jumps} }}"


def _early(view: View) -> Iterator[str]:
    """A bridge hands frames to 01:80:c2:00:00:02 and following (IEEE 802.1D §7.12.6) to the IP layer of the
    port itself, past its own table: IPv4, and IPv6 with router advertisements that the host would believe."""
    yield f'iifname "{view.bridge}-*" drop'
    yield f'iifname "{view.bridge}" ip daddr 127.0.0.0/8 drop'


def _translation(view: View) -> Iterator[str]:
    bridge, gateway = f'"{view.bridge}"', view.gateway
    yield from chain("early", "type filter hook prerouting priority raw;", _early(view))
    dns = f"iifname {bridge} ip daddr {gateway}"
    listed = [guest.address for guest in view.guests if guest.allow is not None]
    yield from chain(
        "inward",
        "type nat hook prerouting priority dstnat;",
        (
            f"{dns} meta l4proto {{ tcp, udp }} th dport 53 redirect to :{view.dns_port}",
            *([f"ip saddr {{ {', '.join(listed)} }} accept"] if listed else []),
            *_published(view),
        ),
    )
    yield from chain("inward_local", "type nat hook output priority -100;", _published(view))
    world = [f"ip saddr {view.subnet} oifname != {bridge} masquerade"] if view.world else []
    inside = f"oifname {bridge} ct status dnat"
    if view.world:  # else a guest has no way to who is elsewhere, but to the bridge
        inside += f" ip saddr {{ 127.0.0.0/8, {view.subnet} }}"
    yield from chain(
        "outward", "type nat hook postrouting priority srcnat;", (*world, f"{inside} masquerade")
    )


def _published(view: View) -> Iterator[str]:
    for guest in view.guests:
        for port in guest.ports:
            where = f"ip daddr {port.address}" if port.address else "fib daddr type local"
            what = f"{port.protocol} dport {port.host}"
            yield f"meta nfproto ipv4 {where} {what} dnat ip to {guest.address}:{port.guest}"


def _input(view: View) -> Iterator[str]:
    """Any machine may ask for names; a limited one, what it names; on an isolated network, no more."""
    rest = "accept" if view.world else "icmp type echo-request accept"
    rules = [
        f'iifname != "{view.bridge}" accept',
        "ct state established,related accept",
        f"ct status dnat meta l4proto {{ tcp, udp }} th dport {view.dns_port} accept",
        *_limited(view, "host"),
        rest,
        "drop",
    ]
    yield from chain("to_host", "type filter hook input priority filter;", rules)
    # all our routes back lead through the same bridge: redirects would only make noise
    quiet = f'oifname "{view.bridge}" icmp type redirect drop'
    yield from chain("from_host", "type filter hook output priority filter;", [quiet])


def _forward(view: View) -> Iterator[str]:
    bridge = f'"{view.bridge}"'
    onward = ["drop"]  # also what the host leads elsewhere: other networks' ports, containers'
    if view.world:
        onward = ["ct status dnat accept", 'oifname "hostel*" drop', "accept"]
    yield from chain(
        "from_guests", "", (*_limited(view, "reach"), f"oifname {bridge} accept", *onward)
    )
    rules = [
        "ct state established,related accept",
        f"iifname {bridge} goto from_guests",
        f"oifname {bridge} ct status dnat accept",
        f"oifname {bridge} drop",
    ]
    yield from chain("through", "type filter hook forward priority filter;", rules)
