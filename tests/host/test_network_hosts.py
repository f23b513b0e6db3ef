"""Networks on hosts that are less simple than the tests' own: routes, firewalls, switches and limits."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from guests.killed import Victim
from guests.names import NameServer, gateway, look_up
from guests.namespaces import (
    HOST,
    OUTSIDE,
    Echo,
    Guest,
    Namespace,
    ask,
    load_rules,
    missing,
    reached,
)
from hostel.errors import HostError, SpecError, UserError
from hostel.host import runtime
from hostel.host.interface import Attachment
from hostel.host.net import kernel, resolver, subnet
from hostel.host.network import attach
from hostel.spec import Limits, NetMode, Nic, Publish, Rate

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

NAMES = {"good.test": OUTSIDE}
CHAIN = "{{ type filter hook {} priority 0; policy drop; }};"


@contextlib.contextmanager
def machine(
    folder: Path, nic: Nic, *ports: Publish, name: str = ""
) -> Iterator[tuple[Attachment, tuple[str, ...]]]:
    with attach([nic], ports, folder, name, cpus=1) as networks:
        yield networks.attachments[0], networks.notes


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# -- routes -------------------------------------------------------------------------------------


def test_a_host_with_two_ways_out(host: Namespace, tmp_path: Path) -> None:
    host.run(
        "ip link add near type veth peer name far",
        "ip addr add 198.51.100.1/24 dev near",
        "ip link set near up",
        "ip link set far up",
        f"ip route replace default nexthop via {OUTSIDE} dev eth0 nexthop via 198.51.100.2 dev near",
    )
    ways = [route.device for route in subnet.routes() if route.size == 0]
    assert sorted(set(ways) - {""}) == ["eth0", "near"]
    with machine(tmp_path, Nic()):
        for name in ("eth0", "near"):
            assert kernel.sysctl(f"ipv4/conf/{name}/forwarding") == "1"


def test_a_host_with_routes_to_all_that_is_private(host: Namespace, tmp_path: Path) -> None:
    for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"):
        host.run(f"ip route add {block} via {OUTSIDE}")
    with machine(tmp_path, Nic()) as (attachment, _):
        assert attachment.link
        assert attachment.link.addresses == ("100.127.0.2/24",)
    host.run(f"ip route add 100.64.0.0/10 via {OUTSIDE}")
    until(lambda: "hostel0" not in host.run("ip -o link"))
    with pytest.raises(HostError, match="ip route"), machine(tmp_path, Nic()):
        pass


# -- firewalls ----------------------------------------------------------------------------------


def test_a_firewall_that_lets_nothing_in_is_named(host: Namespace, tmp_path: Path) -> None:
    chain = CHAIN.format("input")
    load_rules(f"table inet filter {{ chain input {chain} }}")
    with machine(tmp_path, Nic(), name="one") as (attachment, notes):
        (note,) = notes
        assert "no names" in note
        assert "inet filter" in note
        with Guest(host, attachment) as guest:
            assert reached(guest, [(gateway(guest), 53, "tcp")]) == []
            rule = note[note.index("iifname") :]
            host.run(f"nft add rule inet filter input {rule}")
            assert look_up(guest, "one") == [guest.address]


@pytest.mark.parametrize("nic", [Nic(allow=("192.0.2.1",)), Nic(mode="isolated")])
def test_rules_that_are_flushed_come_back(
    host: Namespace, outside: Namespace, tmp_path: Path, nic: Nic
) -> None:
    """As `systemctl reload nftables` does, by which a machine would reach all that the host does."""
    nic = msgspec.structs.replace(nic, limits=Limits(bytes=Rate(per_second=1 << 20)))
    with attach([nic], (), tmp_path, "", cpus=1) as networks, Echo(outside, 7), Echo(host, 7):
        assert networks.attachments
        networks.hold_rates()
        with Guest(host, networks.attachments[0]) as guest:
            guest.run(f"ip route replace default via {gateway(guest)}")
            before = host.run("nft list ruleset")
            assert "limit octets" in before
            for _ in range(3):
                load_rules("flush ruleset")
                until(lambda: host.run("nft list ruleset") == before)
            targets = [(OUTSIDE, 7, "tcp"), (HOST, 7, "tcp"), (gateway(guest), 7, "udp")]
            assert reached(guest, targets) == []


def test_the_way_through_a_firewall_comes_back(
    host: Namespace, outside: Namespace, tmp_path: Path
) -> None:
    """Also through one that is only loaded while machines run, as Docker may be started later."""
    table = f"table ip filter {{ chain FORWARD {CHAIN.format('forward')} }}"
    with (
        machine(tmp_path, Nic()) as (attachment, _),
        Echo(outside, 7),
        Guest(host, attachment) as guest,
    ):
        for _ in range(2):
            load_rules(f"flush ruleset; {table}")
            until(lambda: 'comment "hostel hostel0"' in host.run("nft list ruleset"))
            until(lambda: ask(guest, OUTSIDE, 7) == HOST)
    until(lambda: "hostel" not in host.run("nft list ruleset"))
    assert "FORWARD" in host.run("nft list ruleset")


# -- switches and limits ------------------------------------------------------------------------


def test_names_on_a_host_that_binds_foreign_addresses(
    host: Namespace, outside: Namespace, tmp_path: Path
) -> None:
    """net.ipv4.ip_nonlocal_bind, as balancers have it: an address is not the host's for being bound."""
    host.run("sysctl -qw net.ipv4.ip_nonlocal_bind=1")
    nic = Nic(allow=("good.test",))
    with (
        NameServer(host, outside, NAMES),
        machine(tmp_path, nic) as (attachment, _),
        Guest(host, attachment) as guest,
        Echo(outside, 7),
    ):
        assert look_up(guest, "good.test") == [OUTSIDE]
        assert reached(guest, [(OUTSIDE, 7, "tcp")]) == [(OUTSIDE, 7, "tcp")]


def test_what_is_outside(host: Namespace) -> None:
    for address, expected in ((OUTSIDE, True), (HOST, False), ("203.0.113.255", False)):
        assert resolver.outside(address) is expected
    host.run("ip route del default")
    assert resolver.outside("192.0.2.1")


def test_every_address_of_the_host(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    """As other programs write it."""
    port = Publish(host=8080, guest=80, address="0.0.0.0")
    with (
        machine(tmp_path, Nic(), port) as (attachment, _),
        Guest(host, attachment) as guest,
        Echo(guest, 80),
    ):
        assert ask(outside, HOST, 8080) == OUTSIDE
        assert ask(host, "127.0.0.1", 8080)


@pytest.mark.parametrize("mode", ["nat", "user"])
@pytest.mark.parametrize("address", ["::1", "224.0.0.1", "255.255.255.255"])
def test_addresses_that_no_port_is_at(tmp_path: Path, mode: NetMode, address: str) -> None:
    port = Publish(host=8080, guest=80, address=address)
    with pytest.raises(SpecError, match="no IPv4 address to publish at"):
        attach([Nic(mode=mode)], [port], tmp_path, "", cpus=1)


@pytest.fixture
def few_files() -> Iterator[None]:
    """The usual limit; ours is larger here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_many_ports(host: Namespace, outside: Namespace, tmp_path: Path) -> None:
    ports = [Publish(host=port, guest=port) for port in range(20000, 20400)]
    with (
        machine(tmp_path, Nic(), *ports) as (attachment, _),
        Guest(host, attachment) as guest,
        Echo(guest, 20399),
    ):
        assert ask(outside, HOST, 20399) == OUTSIDE


def test_more_than_a_keeper_is_told(host: Namespace, tmp_path: Path) -> None:
    ports = [Publish(host=port, guest=port) for port in range(10000, 20000)]
    with pytest.raises(UserError, match="10000 published ports"):
        attach([Nic()], ports, tmp_path, "", cpus=1)
    assert "hostel" not in host.run("ip -o link")


# -- bridges of the host's ---------------------------------------------------------------------


def test_a_bridge_keeps_its_mac(host: Namespace, tmp_path: Path) -> None:
    """It has its lowest port's if none was set, and the host's neighbours know it by that."""
    port = "fa:00:00:00:00:01"
    host.run(
        f"ip link add near address {port} type veth peer name far",
        "ip link add br7 type bridge",
        "ip link set near master br7",
        "ip link set br7 up",
    )
    assert port in host.run("ip -o link show br7")
    for _ in range(3):
        with machine(tmp_path, Nic(mode="bridge", target="br7")):
            assert port in host.run("ip -o link show br7")


# -- what a machine gets whose user named no network --------------------------------------------

CHOOSE = "from hostel.host.reach import default_nic; print(default_nic()[1])"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("hindrance", "words"),
    [
        ("", "root, tun and nftables are there"),
        (
            "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys;",
            "may not be written",
        ),
        ("mount -t tmpfs none /dev/net;", "no nat: /dev/net/tun"),
        ("mount --bind /dev/null $(readlink -f $(which nft));", "no nat: nft is not installed"),
    ],
)
def test_the_network_of_a_host_that_lacks_something(hindrance: str, words: str) -> None:
    script = f'{hindrance} exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, CHOOSE]
    assert words in subprocess.run(command, check=True, capture_output=True, text=True).stdout


# -- killed where it hurts ----------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from hostel.host.net import client
from hostel.host.network import attach
from hostel.spec import Nic
spawn = client._spawn
def killed(*arguments):
    spawn(*arguments)
    print("started", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
client._spawn = killed
attach([Nic()], (), Path(sys.argv[1]), "", cpus=1)
"""


def test_killed_once_the_keeper_runs(host: Namespace, tmp_path: Path) -> None:
    """Nobody leases anything from it: it ends all the same, and its network with it."""
    before = host.run("nft list ruleset", "ip -o link")
    with Victim(KILLED, str(tmp_path)) as victim:
        assert victim.line == "started"
    until(
        lambda: (
            not any(runtime.base().glob(f".net-nat-*-{os.stat('/proc/thread-self/ns/net').st_ino}"))
        )
    )
    assert host.run("nft list ruleset", "ip -o link") == before
