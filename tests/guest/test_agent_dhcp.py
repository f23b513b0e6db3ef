"""The agent's DHCP client, against servers that are right, wrong, silent and dnsmasq.

::

    namespace of the agent: w0 ── veth ── w1: namespace of the server
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from guests.dhcp import (
    ACK,
    DISCOVER,
    DOMAIN,
    MASK,
    MTU,
    NAK,
    REBINDING,
    RENEWAL,
    REQUEST,
    ROUTER,
    ROUTES,
    SECONDS,
    SERVER,
    SERVERS,
    TYPE,
    DhcpServer,
    Request,
    dnsmasq,
    ip,
    message,
    no_dnsmasq,
    option,
    reply,
)
from guests.namespaces import Namespace, missing
from hostel.guest.client import AgentClient
from hostel.guest.steps import Dhcp, Link, WriteFile

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MAC, OTHER_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
HERE, GIVEN = "10.9.8.1", "10.9.8.77"
GOOD = (
    *(option(MASK, ip("255.255.255.0")), option(SECONDS, (600).to_bytes(4))),
    option(ROUTER, ip(HERE)),
)


class Wire:
    """A guest's interface and who is at the other end."""

    def __init__(self, client: AgentClient, guest: Namespace, other: Namespace) -> None:
        self.client, self.guest, self.other = client, guest, other

    def ask(self, seconds: float = 8) -> str:
        return self.client.setup([Link(MAC), Dhcp([MAC], seconds)])

    def addresses(self) -> list[dict[str, Any]]:
        found = json.loads(self.guest.run("ip -4 -j addr show dev w0"))
        return [] if not found else list(found[0].get("addr_info", []))

    def routes(self) -> list[dict[str, Any]]:
        return list(json.loads(self.guest.run("ip -4 -j route show dev w0")))

    def resolver(self) -> str:
        return self.client.get("/etc/resolv.conf").decode()

    def wait(self, ready: Callable[[], object], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, (self.addresses(), self.routes())
            time.sleep(0.05)


@pytest.fixture
def wire(start_agent: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> Iterator[Wire]:
    """The agent has an /etc of its own."""
    with Namespace() as guest, Namespace() as other:
        guest.run(
            f"ip link add w0 address {MAC} type veth peer name w1",
            f"ip link add w8 address {OTHER_MAC} type veth peer name w9",
        )
        guest.give("w1", other)
        other.run(f"ip addr add {HERE}/24 dev w1", "ip link set w1 up")
        with guest.inside():
            agent = start_agent(["unshare", "--mount", "--propagation", "private"])
            with agent as started:
                client = AgentClient(started.socket)
                client.wait_hello(10)
                bare = ["sh", "-c", "mount -t tmpfs none /etc && : >/etc/resolv.conf"]
                assert client.spawn(bare).wait(10).returncode == 0
                yield Wire(client, guest, other)
                client.close()


def always(*options: bytes, address: str = GIVEN) -> Callable[[Request], Sequence[bytes]]:
    return lambda request: [reply(request, HERE, address, *options)]


def test_an_address_and_all_that_belongs_to_it(wire: Wire) -> None:
    routes = bytes((24, 10, 7, 6)) + ip("10.9.8.2") + bytes((0,)) + ip("10.9.8.3")
    settings = (
        *(option(ROUTES, routes), option(SERVERS, ip("10.9.8.53", "10.9.8.54"))),
        *(option(DOMAIN, b"lab.example"), option(MTU, (1400).to_bytes(2))),
    )
    with DhcpServer(wire.other, "w1", always(*GOOD, *settings)) as server:
        assert wire.ask() == f"{MAC} {GIVEN}/24\n"
    (address,) = wire.addresses()
    assert (address["local"], address["prefixlen"]) == (GIVEN, 24)
    assert 590 < address["valid_life_time"] <= 600
    ways = {route["dst"]: route.get("gateway") for route in wire.routes()}
    # Classless routes come instead of the router (RFC 3442)
    assert ways == {"10.9.8.0/24": None, "10.7.6.0/24": "10.9.8.2", "default": "10.9.8.3"}
    assert json.loads(wire.guest.run("ip -j link show w0"))[0]["mtu"] == 1400
    assert wire.resolver() == "nameserver 10.9.8.53\nnameserver 10.9.8.54\nsearch lab.example\n"
    assert [request.kind for request in server.requests] == [DISCOVER, REQUEST]
    assert server.requests[1].options[SERVER] == ip(HERE)
    assert "dhcp w0" in wire.guest.run("ps -eo comm")


def test_a_router_and_files_that_are_there(wire: Wire) -> None:
    """Beside another network's default route; what a file says already is not said twice."""
    known = WriteFile("/etc/resolv.conf", b"nameserver 10.9.8.53\nsearch first\n")
    wire.client.setup([known, Link(OTHER_MAC, 0, ["10.66.0.2/24"], ["10.66.0.1"])])
    settings = (option(SERVERS, ip("10.9.8.53", "10.9.8.54")), option(DOMAIN, b"second"))
    with DhcpServer(wire.other, "w1", always(*GOOD, *settings)):
        wire.ask()
    assert wire.resolver() == "nameserver 10.9.8.53\nsearch first\nnameserver 10.9.8.54\n"
    every = json.loads(wire.guest.run("ip -4 -j route show default"))
    assert [(way["gateway"], way.get("metric", 0) > 0) for way in every] == [
        ("10.66.0.1", False),
        (HERE, True),
    ]


def test_a_gateway_that_is_not_of_the_network(wire: Wire) -> None:
    options = (option(MASK, ip("255.255.255.255")), option(ROUTER, ip("172.20.0.1")))
    with DhcpServer(wire.other, "w1", always(*options)):
        assert wire.ask() == f"{MAC} {GIVEN}/32\n"
    assert {way["dst"]: way.get("gateway") for way in wire.routes()} == {
        "default": "172.20.0.1",
        "172.20.0.1": None,
    }


def test_nobody_answers_until_later(wire: Wire) -> None:
    begun = time.monotonic()
    assert wire.ask(0.3) == f"{MAC} \n"
    assert 0.3 <= time.monotonic() - begun < 3
    with DhcpServer(wire.other, "w1", always(*GOOD)):
        wire.wait(wire.addresses)
    assert wire.addresses()[0]["local"] == GIVEN


def test_a_lease_is_renewed_and_withdrawn(wire: Wire) -> None:
    """T1 after two seconds, of the server alone; then it says no, and gives another address."""
    times = (option(RENEWAL, (2).to_bytes(4)), option(REBINDING, (9).to_bytes(4)))
    renewals: list[Request] = []

    def answer(request: Request) -> Sequence[bytes]:
        if request.client != "0.0.0.0":
            renewals.append(request)
            if len(renewals) == 2:
                return [reply(request, HERE, "0.0.0.0", kind=NAK)]
        address = GIVEN if len(renewals) < 2 else "10.9.8.78"
        return [reply(request, HERE, address, *GOOD, *times)]

    with DhcpServer(wire.other, "w1", answer):
        wire.ask()
        wire.wait(lambda: [a["local"] for a in wire.addresses()] == ["10.9.8.78"])
    assert [(request.kind, request.client) for request in renewals[:2]] == [(REQUEST, GIVEN)] * 2
    assert not {SERVER, 50} & set(renewals[0].options)  # RFC 2131 §4.3.6
    assert [way["dst"] for way in wire.routes()] == ["default", "10.9.8.0/24"]


@pytest.mark.slow
def test_a_lease_that_nobody_renews_ends(wire: Wire) -> None:
    times = (option(SECONDS, (10).to_bytes(4)), option(RENEWAL, (2).to_bytes(4)))
    with DhcpServer(wire.other, "w1", always(option(MASK, ip("255.255.255.0")), *times)):
        wire.ask()
    assert wire.addresses()
    wire.wait(lambda: not wire.addresses(), 15)


LIES: dict[str, Callable[[Request], bytes]] = {
    "of somebody else's request": lambda r: message(r, GIVEN, fine(r), id=r.id ^ 1),
    "to somebody else": lambda r: message(r, GIVEN, fine(r), mac=b"\2\0\0\0\0\1"),
    "a request": lambda r: message(r, GIVEN, fine(r), op=1),
    "no magic": lambda r: message(r, GIVEN, fine(r), magic=b"\0\0\0\0"),
    "no type": lambda r: message(r, GIVEN, option(SERVER, ip(HERE))),
    "no server": lambda r: message(r, GIVEN, option(TYPE, b"\2")),
    "too short": lambda r: message(r, GIVEN, fine(r))[:200],
    "nothing": lambda _: b"",
    "an option beyond the end": lambda r: message(r, GIVEN, bytes((SERVER, 255)) + fine(r)),
    "an option without its length": lambda r: message(r, GIVEN, b"")[:-1] + bytes([TYPE]),
    "no address": lambda r: message(r, "0.0.0.0", fine(r)),
    "a loopback address": lambda r: message(r, "127.0.0.1", fine(r)),
    "a multicast address": lambda r: message(r, "224.0.0.1", fine(r)),
    "the broadcast address": lambda r: message(r, "10.9.8.255", fine(r)),
    "the network": lambda r: message(r, "10.9.8.0", fine(r)),
    "a server that is none": lambda r: message(
        r, GIVEN, option(TYPE, b"\2") + option(SERVER, ip("255.255.255.255"))
    ),
}


def fine(request: Request) -> bytes:
    kind = b"\2" if request.kind == DISCOVER else b"\5"
    return option(TYPE, kind) + option(SERVER, ip(HERE)) + b"".join(GOOD)


def test_answers_that_are_none(wire: Wire) -> None:
    """All of them at once, before the right one: it is the only one that is taken."""
    with DhcpServer(wire.other, "w1", lambda r: [lie(r) for lie in LIES.values()]):
        assert wire.ask(1.5) == f"{MAC} \n"
    assert wire.addresses() == []
    with DhcpServer(
        wire.other, "w1", lambda r: [*(lie(r) for lie in LIES.values()), *always(*GOOD)(r)]
    ):
        wire.wait(wire.addresses)
    assert wire.addresses()[0]["local"] == GIVEN


def test_settings_that_are_none(wire: Wire) -> None:
    """An address that can be had is taken; what else does not make sense is left out."""
    settings = (
        *(option(MASK, ip("255.0.255.0")), option(ROUTER, b"\x0a")),
        *(option(SERVERS, ip("255.255.255.255", "127.0.0.1") + b"\1"), option(MTU, b"\0\1")),
        option(DOMAIN, b"a\nnameserver 6.6.6.6"),
        option(ROUTES, bytes((33,)) * 20),
        *(option(SECONDS, bytes(4)), option(RENEWAL, b"\xff" * 4), option(REBINDING, b"\1")),
    )
    with DhcpServer(wire.other, "w1", always(*settings, *settings)) as server:
        assert wire.ask() == f"{MAC} {GIVEN}/8\n"
        assert wire.addresses()[0]["valid_life_time"] <= 10
        assert wire.resolver() == ""
        assert [way["dst"] for way in wire.routes()] == ["10.0.0.0/8"]
        assert len(server.requests) == 2


def test_a_server_that_always_says_no(wire: Wire) -> None:
    def answer(request: Request) -> Sequence[bytes]:
        return [reply(request, HERE, GIVEN, *GOOD, kind=0 if request.kind == DISCOVER else NAK)]

    with DhcpServer(wire.other, "w1", answer) as server:
        assert wire.ask(2.5) == f"{MAC} \n"
        assert len(server.requests) <= 6  # a second between


def test_another_address_than_was_agreed_on(wire: Wire) -> None:
    def answer(request: Request) -> Sequence[bytes]:
        return [reply(request, HERE, GIVEN if request.kind == DISCOVER else "10.9.8.66", *GOOD)]

    with DhcpServer(wire.other, "w1", answer):
        assert wire.ask(1) == f"{MAC} \n"
    assert wire.addresses() == []


@pytest.mark.skipif(bool(no_dnsmasq), reason=no_dnsmasq)
def test_dnsmasq(wire: Wire, tmp_path: Path) -> None:
    options = (
        "--dhcp-range=10.9.8.100,10.9.8.200,255.255.255.0,300",
        *("--dhcp-option=option:dns-server,10.9.8.53", "--domain=lab.example"),
        "--dhcp-option-force=option:mtu,1300",
    )
    with dnsmasq(wire.other, "w1", tmp_path, *options):
        said = wire.ask(20)
    (address,) = wire.addresses()
    assert said == f"{MAC} {address['local']}/24\n"
    assert address["local"].startswith("10.9.8.1")
    assert wire.resolver() == "nameserver 10.9.8.53\nsearch lab.example\n"
    assert MAC in (tmp_path / "leases").read_text()
    assert {way["dst"]: way.get("gateway") for way in wire.routes()}["default"] == HERE


def test_acknowledged_is_not_offered() -> None:
    """The test's own server: what it answers to what."""
    asked = Request(DISCOVER, 1, "0.0.0.0", b"\2\0\0\0\0\1", {})
    assert reply(asked, HERE, GIVEN)[240:243] == bytes((TYPE, 1, 2))
    assert reply(asked._replace(kind=REQUEST), HERE, GIVEN)[242] == ACK
