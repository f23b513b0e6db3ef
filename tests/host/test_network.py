"""Networks of hostel's own, with real packets: what a machine reaches, and what reaches it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.names import gateway, look_up
from guests.namespaces import HOST, OUTSIDE, Echo, Guest, Namespace, ask, missing, reached, world
from hostel.errors import UserError
from hostel.host import runtime
from hostel.host.network import attach
from hostel.spec import Nic, Publish

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

Join = Callable[..., Guest]


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Namespace, Namespace]]:
    with world() as both:
        yield both


@pytest.fixture
def join(host: Namespace, tmp_path: Path) -> Iterator[Join]:
    """A machine with one NIC; afterwards nothing of any network is left."""
    before, open_ones = state_of(host), []

    def one(name: str, nic: Nic, *publish: Publish) -> Guest:
        networks = attach([nic], publish, tmp_path, name, cpus=2)
        guest = Guest(host, networks.attachments[0])
        open_ones.append((networks, guest))
        return guest

    yield one
    for networks, guest in open_ones:
        guest.close()
        networks.close()
    settle()
    assert state_of(host) == before


@pytest.fixture(params=["0", "1"])
def br_netfilter(request: pytest.FixtureRequest, host: Namespace) -> Iterator[None]:
    """Off, and on as Docker has it: frames between ports of a bridge pass the host's IP rules too."""
    switch = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not switch.exists():
        pytest.skip("this kernel has no br_netfilter")
    before = switch.read_text()
    switch.write_text(request.param)
    yield
    switch.write_text(before)


def settle() -> None:
    """Until the keepers have ended: a lease is given back without waiting for that."""
    deadline = time.monotonic() + 5
    while left := list(runtime.base().glob(".net-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def refused(nic: Nic, folder: Path, *publish: Publish) -> None:
    with attach([nic], publish, folder, "", cpus=1) as networks:
        assert networks.attachments is None


def state_of(host: Namespace) -> str:
    """All that a network may change on the host."""
    paths = ("ipv4/ip_forward", "ipv4/conf/eth0/forwarding", "ipv4/conf/eth0/route_localnet")
    sysctls = [Path("/proc/sys/net", path).read_text() for path in paths]
    links = [line.split()[1] for line in host.run("ip -o link").splitlines()]
    return repr(
        (sysctls, links, host.run("ip route", "ip neigh show nud permanent", "nft list ruleset"))
    )


def test_nat_reaches_the_world_as_the_host(outside: Namespace, join: Join) -> None:
    guest = join("", Nic())
    with Echo(outside, 7):
        assert ask(guest, OUTSIDE, 7) == HOST
        assert ask(guest, OUTSIDE, 7, "udp") == HOST


def test_nobody_outside_reaches_a_machine(outside: Namespace, host: Namespace, join: Join) -> None:
    guest = join("", Nic())
    with Echo(guest, 7):
        assert ask(host, guest.address, 7) != ""  # the host itself does
        assert reached(outside, [(guest.address, 7, "tcp"), (guest.address, 7, "udp")]) == []


def test_the_host_is_a_router_for_nobody_else(
    places: tuple[Namespace, Namespace], join: Join
) -> None:
    """Forwarding is on for the uplink while a network lives; others may not use that."""
    host, outside = places
    join("", Nic())
    with Namespace() as third:
        host.run("ip link add near type veth peer name far")
        try:
            host.give("far", third)
            host.run("ip addr add 198.51.100.1/24 dev near", "ip link set near up")
            third.run("ip addr add 198.51.100.2/24 dev far", "ip link set far up")
            third.run("ip route add default via 198.51.100.1")
            outside.run(f"ip route add 198.51.100.0/24 via {HOST}")
            with Echo(third, 7):
                assert ask(host, "198.51.100.2", 7)
                assert (
                    reached(outside, [("198.51.100.2", 7, "tcp"), ("198.51.100.2", 7, "udp")]) == []
                )
        finally:
            outside.run("ip route del 198.51.100.0/24")
            host.run("ip link del near")


@pytest.mark.usefixtures("br_netfilter")
def test_isolated_reaches_neighbours_only(outside: Namespace, host: Namespace, join: Join) -> None:
    one, two = join("one", Nic(mode="isolated")), join("two", Nic(mode="isolated"))
    one.run(f"ip route add default via {gateway(one)}")
    targets = [(OUTSIDE, 7, "tcp"), (HOST, 7, "udp"), (HOST, 7, "tcp"), (gateway(one), 7, "tcp")]
    with Echo(outside, 7), Echo(host, 7), Echo(two, 7):
        assert reached(one, [*targets, (two.address, 7, "tcp")]) == [(two.address, 7, "tcp")]
        assert ask(one, two.address, 7, "udp") == one.address


def test_two_networks_do_not_see_each_other(join: Join) -> None:
    one, two = join("one", Nic(target="red")), join("two", Nic(target="blue"))
    with Echo(two, 7), Echo(one, 7):
        assert reached(one, [(two.address, 7, "tcp"), (two.address, 7, "udp")]) == []
        assert reached(two, [(one.address, 7, "tcp")]) == []
        assert look_up(one, "two.hostel") == []


def test_machines_know_each_other_by_name(join: Join) -> None:
    one, two = join("one", Nic()), join("Two", Nic())
    assert look_up(one, "two") == [two.address]
    assert look_up(one, "TWO.hostel", tcp=True) == [two.address]
    assert look_up(two, "one.hostel") == [one.address]
    assert look_up(two, "three.hostel") == []
    with Echo(two, 7):
        assert ask(one, two.address, 7) == one.address


@pytest.mark.usefixtures("br_netfilter")
def test_ports_are_reached_from_everywhere(outside: Namespace, host: Namespace, join: Join) -> None:
    ports = [Publish(host=8080, guest=80), Publish(host=8080, guest=80, protocol="udp")]
    guest, other = join("", Nic(), *ports), join("", Nic())
    with Echo(guest, 80):
        for kind in ("tcp", "udp"):
            assert ask(outside, HOST, 8080, kind) == OUTSIDE
            assert ask(host, "127.0.0.1", 8080, kind) == gateway(guest)
            assert ask(host, HOST, 8080, kind)
            assert ask(other, HOST, 8080, kind) == gateway(guest)
            assert ask(guest, HOST, 8080, kind) == gateway(guest)


def test_a_port_at_one_address(outside: Namespace, host: Namespace, join: Join) -> None:
    guest = join("", Nic(mode="isolated"), Publish(host=8080, guest=80, address="127.0.0.1"))
    with Echo(guest, 80):
        assert ask(host, "127.0.0.1", 8080)
        assert reached(outside, [(HOST, 8080, "tcp")]) == []


def test_ports_on_an_isolated_network(outside: Namespace, host: Namespace, join: Join) -> None:
    """Callers seem to be the bridge: a machine there knows no way to anybody else."""
    ports = [Publish(host=8080, guest=80), Publish(host=8080, guest=80, protocol="udp")]
    guest = join("", Nic(mode="isolated"), *ports)
    other = join("", Nic(mode="isolated"))
    with Echo(guest, 80), Echo(outside, 7):
        for kind in ("tcp", "udp"):
            for caller, address in (
                (outside, HOST),
                (host, HOST),
                (host, "127.0.0.1"),
                (other, gateway(guest)),
                (guest, gateway(guest)),
            ):
                assert ask(caller, address, 8080, kind) == gateway(guest)
        guest.run(f"ip route add default via {gateway(guest)}")
        assert reached(guest, [(OUTSIDE, 7, "tcp"), (OUTSIDE, 7, "udp"), (HOST, 7, "tcp")]) == []


def test_an_isolated_machine_asks_for_ports_of_other_networks(host: Namespace, join: Join) -> None:
    """What the host leads elsewhere, for another network of ours or for containers, is not for it."""
    other = join("", Nic(target="red"), Publish(host=8080, guest=80))
    guest, near = join("", Nic(mode="isolated")), join("", Nic(target="blue"))
    host.run(
        "nft add table ip containers",
        "nft add chain ip containers pre { type nat hook prerouting priority dstnat; }",
        f"nft add rule ip containers pre tcp dport 8081 dnat to {other.address}:80",
    )
    try:
        with Echo(other, 80):
            for port in (8080, 8081):
                assert ask(near, gateway(near), port)
                assert reached(guest, [(gateway(guest), port, "tcp")]) == []
    finally:
        host.run("nft delete table ip containers")


def test_a_taken_port_is_an_error(host: Namespace, join: Join, tmp_path: Path) -> None:
    join("", Nic(), Publish(host=8080, guest=80))
    with Echo(host, 9090, "127.0.0.1"):
        for port in (8080, 9090):
            with pytest.raises(UserError, match=f"port {port}/tcp.*in use"):
                refused(Nic(), tmp_path, Publish(host=port, guest=1))


def test_loopback_of_the_host_stays_out_of_reach(host: Namespace, join: Join) -> None:
    """route_localnet is on, for published ports; a guest that routes 127.0.0.0/8 to us gets nowhere."""
    guest = join("", Nic(), Publish(host=8080, guest=80))
    guest.run("ip addr del 127.0.0.1/8 dev lo")
    guest.run(f"ip route add 127.0.0.0/8 via {gateway(guest)} src {guest.address}")
    with guest.inside():
        Path("/proc/sys/net/ipv4/conf/eth0/route_localnet").write_text("1")
    with Echo(host, 7, "127.0.0.1"):
        assert ask(host, "127.0.0.1", 7) == "127.0.0.1"
        assert reached(guest, [("127.0.0.1", 7, "tcp"), ("127.0.0.1", 7, "udp")]) == []


def test_an_address_of_ones_own(join: Join, tmp_path: Path) -> None:
    first = join("", Nic(address="10.213.0.77"))
    assert first.address == "10.213.0.77"
    for address, why in (("10.213.0.77", "in use"), ("192.168.1.1", "no address")):
        with pytest.raises(UserError, match=why):
            refused(Nic(address=address), tmp_path)


def test_a_subnet_that_the_host_does_not_use(host: Namespace, join: Join) -> None:
    host.run("ip route add 10.128.0.0/9 dev eth0")
    try:
        assert join("", Nic()).address.startswith("172.29.0.")
    finally:
        host.run("ip route del 10.128.0.0/9")


def test_a_small_mtu(join: Join, outside: Namespace) -> None:
    """Below what IPv6 needs, an interface has none to be set up."""
    guest = join("small", Nic(mtu=576))
    with Echo(outside, 7):
        assert ask(guest, OUTSIDE, 7) == HOST


def test_macs(tmp_path: Path) -> None:
    def mac(name: str) -> str:
        with attach([Nic()], (), tmp_path, name, cpus=1) as networks:
            return networks.attachments[0].interface.mac

    assert mac("one") == mac("one") != mac("two")
    assert mac("") != mac("")
    assert all(int(mac(name)[:2], 16) & 3 == 2 for name in ("one", "two", ""))


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_a_port_that_passt_cannot_have(host: Namespace, tmp_path: Path) -> None:
    with Echo(host, 8124), pytest.raises(UserError, match=r"port 8124/tcp .*already in use"):
        attach([Nic(mode="user")], [Publish(host=8124, guest=80)], tmp_path, "", cpus=1)
