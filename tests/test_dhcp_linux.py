"""Linux guests on networks that are not hostel's: an address by DHCP, one by router advertisement, or none.

::

    bridge     "host": br7 10.98.0.1, a DHCP server ── hostel-t0 ── guest
    tap        "host": mine 10.98.0.1, dnsmasq ═══════════════════ guest
    macvtap    "outside": 203.0.113.1, dnsmasq ── eth0 of "host" ── hostel-m0 ══ guest
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hostel
from cli.hostel_command import run_hostel
from guests.dhcp import (
    MASK,
    ROUTER,
    SERVERS,
    DhcpServer,
    dnsmasq,
    ip,
    no_dnsmasq,
    option,
    reply,
)
from guests.frames import ALL_NODES_MAC, advertisement
from guests.namespaces import OUTSIDE, Echo, Namespace, missing, world
from hostel.spec import Nic

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(280),
]

HERE, GIVEN, PREFIX = "10.98.0.1", "10.98.0.44", "2001:db8:77::"
ROUTER_MAC = bytes.fromhex("020000000077")
OPTIONS = (
    *(option(MASK, ip("255.255.255.0")), option(ROUTER, ip(HERE))),
    option(SERVERS, ip("10.98.0.53")),
)
CONNECT = """
import socket, sys
asking = socket.create_connection((sys.argv[1], 7), 60)
asking.send(b"?")
print(asking.recv(99).decode())
"""


@pytest.fixture
def places() -> Iterator[tuple[Namespace, Namespace]]:
    with world() as both:
        yield both


@pytest.fixture
def outside(places: tuple[Namespace, Namespace]) -> Namespace:
    return places[1]


@pytest.fixture
def host(places: tuple[Namespace, Namespace]) -> Namespace:
    places[0].run(
        "ip link add br7 type bridge forward_delay 0",
        f"ip addr add {HERE}/24 dev br7",
        "ip link set br7 up",
    )
    return places[0]


def server(host: Namespace) -> DhcpServer:
    return DhcpServer(host, "br7", lambda request: [reply(request, HERE, GIVEN, *OPTIONS)])


def advertise(host: Namespace) -> None:
    """A prefix to make an address of, from a router on the bridge."""
    with host.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with sock:
        sock.bind(("br7", 0))
        sock.send(ALL_NODES_MAC + ROUTER_MAC + advertisement("fe80::7", PREFIX))


def output(vm: hostel.Machine, *argv: str) -> str:
    result = vm.exec(argv, timeout=60)
    assert result.exit_code == 0, result
    return result.stdout.decode()


def addresses(vm: hostel.Machine) -> list[dict[str, Any]]:
    return list(json.loads(output(vm, "ip", "-j", "addr", "show", "dev", "eth0"))[0]["addr_info"])


ENGINES = pytest.mark.parametrize(
    "engine",
    [
        pytest.param("qemu", marks=pytest.mark.qemu),
        pytest.param("kvm", marks=[pytest.mark.linux_kvm, pytest.mark.slow]),
    ],
)
NEEDS_DNSMASQ = pytest.mark.skipif(bool(no_dnsmasq), reason=no_dnsmasq)


@ENGINES
def test_both_families(host: Namespace, engine: str) -> None:
    nic = Nic(mode="bridge", target="br7")
    with (
        server(host),
        Echo(host, 7),
        hostel.Machine(engine=engine, memory=256 << 20, nics=(nic,)) as vm,
    ):
        vm.wait_ready(250)
        assert vm.addresses == (GIVEN,)
        assert vm.notes == ()
        assert output(vm, "cat", "/etc/resolv.conf") == "nameserver 10.98.0.53\n"
        assert output(vm, "python3", "-c", CONNECT, HERE) == f"{GIVEN}\n"
        deadline = time.monotonic() + 60
        while not any(PREFIX[:-1] in address["local"] for address in addresses(vm)):
            assert time.monotonic() < deadline, addresses(vm)
            advertise(host)
            time.sleep(0.2)


def finds_its_way(vm: hostel.Machine, server: str, leases: Path) -> None:
    """It has the address that dnsmasq gave it, and the name server; ``server`` is reached from there."""
    vm.wait_ready(250)
    (address,) = vm.addresses
    assert vm.notes == ()
    (lease,) = leases.read_text().splitlines()
    assert lease.split()[1:3] == [vm.statistics()["nics"][0]["mac"], address]
    assert output(vm, "cat", "/etc/resolv.conf") == "nameserver 192.0.2.53\nsearch lab.example\n"
    assert output(vm, "python3", "-c", CONNECT, server) == f"{address}\n"


def options(first: str, last: str) -> tuple[str, ...]:
    server = "--dhcp-option=option:dns-server,192.0.2.53"
    return f"--dhcp-range={first},{last},255.255.255.0,300", server, "--domain=lab.example"


@NEEDS_DNSMASQ
@ENGINES
def test_a_tap_of_the_users(host: Namespace, tmp_path: Path, engine: str) -> None:
    """It has no carrier until the machine opens it; the host's address is there before."""
    host.run(
        "ip tuntap add dev mine mode tap",
        "ip addr flush dev br7",
        f"ip addr add {HERE}/24 dev mine",
        "ip link set mine up",
    )
    nic = Nic(mode="tap", target="mine")
    with (
        dnsmasq(host, "mine", tmp_path, *options("10.98.0.100", "10.98.0.120")),
        Echo(host, 7),
        hostel.Machine(engine=engine, memory=256 << 20, nics=(nic,)) as vm,
    ):
        finds_its_way(vm, HERE, tmp_path / "leases")
    assert "mine" in host.run("ip -o link"), "it is the user's, and stays"


@NEEDS_DNSMASQ
@ENGINES
def test_a_macvtap(host: Namespace, outside: Namespace, tmp_path: Path, engine: str) -> None:
    """The guest is a neighbour of the host's, on the network that the host's interface is on."""
    try:
        host.run("ip link add link eth0 name try0 type macvtap", "ip link del try0")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no macvtap here: {error.stderr.strip()}")
    nic = Nic(mode="macvtap", target="eth0")
    with (
        dnsmasq(outside, "out", tmp_path, *options("203.0.113.100", "203.0.113.120")),
        Echo(outside, 7),
        hostel.Machine(engine=engine, memory=256 << 20, nics=(nic,)) as vm,
    ):
        finds_its_way(vm, OUTSIDE, tmp_path / "leases")


@pytest.mark.qemu
def test_nobody_answers(host: Namespace) -> None:
    """A line, and the machine runs; nobody is asked where nobody is to be."""
    command = ("sh", "-c", "ip -4 -o addr show dev eth0; echo runs")
    result = run_hostel("run", "--engine", "qemu", "--net", "bridge=br7", *command)
    assert result.stdout == b"runs\n"
    line = b"no IPv4 address on tap hostel-t0: no DHCP server answered in 10 s"
    assert line in result.stderr
    begun = time.monotonic()
    result = run_hostel("run", "--engine", "qemu", "--net", "bridge=br7,ip=none", *command)
    assert result.stdout == b"runs\n"
    assert b"DHCP" not in result.stderr
    assert time.monotonic() - begun < 60
