"""Linux guests on a bridge that is not hostel's: an address by DHCP, one by router advertisement, or none.

::

    "host": br7 10.98.0.1, a DHCP server ── hostel-t0 ── guest
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

import hostel
from cli.hostel_command import run_hostel
from guests.dhcp import MASK, ROUTER, SERVERS, DhcpServer, ip, option, reply
from guests.frames import ALL_NODES_MAC, advertisement
from guests.namespaces import Echo, Namespace, missing, world
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
CONNECT = f"""
import socket
asking = socket.create_connection(("{HERE}", 7), 60)
asking.send(b"?")
print(asking.recv(99).decode())
"""


@pytest.fixture
def host() -> Iterator[Namespace]:
    with world() as (host, _):
        host.run(
            "ip link add br7 type bridge forward_delay 0",
            f"ip addr add {HERE}/24 dev br7",
            "ip link set br7 up",
        )
        yield host


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


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("qemu", marks=pytest.mark.qemu),
        pytest.param("kvm", marks=[pytest.mark.linux_kvm, pytest.mark.slow]),
    ],
)
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
        assert output(vm, "python3", "-c", CONNECT) == f"{GIVEN}\n"
        deadline = time.monotonic() + 60
        while not any(PREFIX[:-1] in address["local"] for address in addresses(vm)):
            assert time.monotonic() < deadline, addresses(vm)
            advertise(host)
            time.sleep(0.2)


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
