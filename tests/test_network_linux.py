"""Networks of real Linux guests on engine qemu: from the user's words to the guest's interface and back.

::

    "outside" 203.0.113.1 ── veth ── 203.0.113.2 "host", where hostel runs ── hostel0 ── alpha, beta
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import hostel
from cli.hostel_command import run_hostel
from guests.namespaces import HOST, OUTSIDE, Echo, Namespace, ask, missing, open_tap, world
from hostel.host import runtime
from hostel.spec import Nic, Publish

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(240),
]

MAC = "52:54:00:12:34:56"
MEMORY = 256 << 20
Vm = hostel.Machine
ARP = bytes.fromhex("0806")
ETH_P_ALL = 3
"""Of those who ask for one protocol a bridge's port shows nothing: the bridge takes it before."""

ECHO = """
import socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.client_address[0].encode())
socketserver.TCPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""
CONNECT = """
import socket, sys
asking = socket.create_connection((sys.argv[1], 7), 10)
asking.send(b"?")
print(asking.recv(99).decode())
"""


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Namespace, Namespace]]:
    with world() as both:
        yield both


@pytest.fixture(scope="module")
def machines(places: tuple[Namespace, Namespace]) -> Iterator[tuple[Vm, Vm]]:
    """Two machines on one network; one of them with all that can be asked for."""
    nic = Nic(mac=MAC, mtu=1400, address="10.213.0.77", queues=2)
    publish = (Publish(host=8080, guest=80), Publish(host=8081, guest=81, address=HOST))
    with ExitStack() as stack:
        alpha = stack.enter_context(
            Vm(name="alpha", engine="qemu", cpus=2, memory=MEMORY, nics=(nic,), publish=publish)
        )
        beta = stack.enter_context(
            Vm(name="beta", engine="qemu", memory=MEMORY, nics=(Nic(),), transport="mmio")
        )
        alpha.wait_ready()
        beta.wait_ready()
        yield alpha, beta
    settle()
    links = [line.split()[1] for line in places[0].run("ip -o link").splitlines()]
    assert [link.partition("@")[0].strip(":") for link in links] == ["lo", "eth0"]


def settle() -> None:
    """Until the keepers have ended: a lease is given back without waiting for that."""
    deadline = time.monotonic() + 5
    while left := list(runtime.base().glob(".net-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def output(vm: Vm, *argv: str, user: str | None = None) -> str:
    result = vm.exec(argv, user=user, timeout=60)
    assert result.exit_code == 0, result
    return result.stdout.decode()


def interface(vm: Vm, name: str = "eth0") -> dict[str, Any]:
    found = json.loads(output(vm, "ip", "-j", "addr", "show", "dev", name))
    assert isinstance(found[0], dict)
    return found[0]


def test_interface_is_as_asked(machines: tuple[Vm, Vm]) -> None:
    eth0 = interface(machines[0])
    assert (eth0["address"], eth0["mtu"], "UP" in eth0["flags"]) == (MAC, 1400, True)
    ipv4 = [(a["local"], a["prefixlen"]) for a in eth0["addr_info"] if a["family"] == "inet"]
    assert ipv4 == [("10.213.0.77", 24)]
    assert machines[0].addresses == ("10.213.0.77",)
    queues = output(machines[0], "ls", "/sys/class/net/eth0/queues").split()
    assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"]


def test_what_is_known_of_it(machines: tuple[Vm, Vm]) -> None:
    (nic,) = machines[0].statistics()["nics"]
    assert (nic["mac"], nic["addresses"]) == (MAC, ["10.213.0.77"])
    assert (nic["backend"], nic["model"]) == ("tap", "virtio")
    assert machines[1].addresses[0].startswith("10.213.0.")


@pytest.mark.skipif(shutil.which("ping") is None, reason="ping is not installed")
def test_ping_by_an_ordinary_user(machines: tuple[Vm, Vm]) -> None:
    for target in (OUTSIDE, "10.213.0.1", "beta", "alpha", "127.0.0.1"):
        said = output(machines[0], "ping", "-n", "-c1", "-W10", target, user="nobody")
        assert "1 received" in said


def test_machines_know_each_other_by_name(machines: tuple[Vm, Vm]) -> None:
    alpha, beta = machines
    address = beta.addresses[0]
    assert output(alpha, "getent", "ahostsv4", "beta").split()[0] == address
    assert output(alpha, "getent", "ahostsv4", "beta.hostel").split()[0] == address
    assert output(beta, "getent", "ahostsv4", "alpha").split()[0] == "10.213.0.77"
    hosts = output(alpha, "cat", "/etc/hosts").splitlines()
    assert hosts[-1].split() == ["10.213.0.77", "alpha"]


def test_the_world_sees_the_host(
    machines: tuple[Vm, Vm], places: tuple[Namespace, Namespace]
) -> None:
    with Echo(places[1], 7):
        for vm in machines:
            assert output(vm, "python3", "-c", CONNECT, OUTSIDE) == f"{HOST}\n"


def test_published_ports(machines: tuple[Vm, Vm], places: tuple[Namespace, Namespace]) -> None:
    host, outside = places
    servers = [
        machines[0].popen(["python3", "-c", ECHO, port], user="root", stdin=False)
        for port in ("80", "81")
    ]
    deadline = time.monotonic() + 60
    while not (ask(outside, HOST, 8080) and ask(outside, HOST, 8081)):
        assert time.monotonic() < deadline
    assert [ask(outside, HOST, port) for port in (8080, 8081)] == [OUTSIDE] * 2
    assert ask(host, "127.0.0.1", 8080) != ""
    assert ask(host, HOST, 8081) != ""
    assert ask(host, "127.0.0.1", 8081) == ""  # published at one address only
    for server in servers:
        server.signal(9)
        server.wait(30)


def test_the_cable_is_pulled_and_the_machine_announces_itself(
    machines: tuple[Vm, Vm], places: tuple[Namespace, Namespace]
) -> None:
    alpha = machines[0]
    carrier = "[ $(cat /sys/class/net/eth0/carrier) = %d ]"
    until = f"for i in $(seq 200); do {carrier} && exit; sleep 0.1; done; false"
    with places[0].inside(), arp_listener(alpha.plan.nics[0].target) as wire:
        for up in (False, True):
            alpha.set_link(up=up)
            output(alpha, "sh", "-c", until % up)
        alpha.announce()
        heard = bytes.fromhex(MAC.replace(":", ""))
        frame = b""
        while frame[6:14] != heard + ARP or frame[28:32] != frame[38:42]:
            frame = wire.recv(100)  # its timeout ends a vain wait
    with pytest.raises(hostel.SpecError, match="no NIC 1"):
        alpha.set_link(1, up=False)


def arp_listener(interface: str) -> socket.socket:
    """On the machine's own tap: no gratuitous ARP passes our bridge, whose host answers for all."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.bind((interface, ETH_P_ALL))
    made.settimeout(20)
    return made


def test_network_survives_a_reboot(machines: tuple[Vm, Vm]) -> None:
    _, beta = machines
    before, mac = beta.addresses, interface(beta)["address"]
    with pytest.raises(hostel.MachineStopped):
        beta.exec(["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"], user="root")
    assert output(beta, "getent", "ahostsv4", "alpha").split()[0] == "10.213.0.77"
    assert (beta.addresses, interface(beta)["address"]) == (before, mac)
    assert beta.restarts == 1


def test_command_line(places: tuple[Namespace, Namespace]) -> None:
    """The default, and all that it says; the machine is named by its host name."""
    script = "cat /etc/resolv.conf; hostname -i; ls /sys/class/net"
    options = ("--engine", "qemu", "--json", "-m", "256M", "-H", "gamma", "--read-only")
    result = run_hostel("run", *options, "sh", "-c", script)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stderr.splitlines()[-1])
    (address,) = record["addresses"]
    *resolver, own, eth0, lo = result.stdout.decode().split("\n")[:-1]
    assert resolver == [f"nameserver {address.rpartition('.')[0]}.1", "search hostel"]
    assert (own, eth0, lo) == (address, "eth0", "lo")
    assert record["network"][0].startswith("virtio ")


def test_a_network_that_fails_unasked() -> None:
    """No subnet is free for one: the command runs all the same, unless it was told to have a network."""
    arguments = ("--engine", "qemu", "-m", "256M")
    with Namespace() as full, full.inside():
        for subnet in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"):
            full.run(f"ip route add {subnet} dev lo")
        result = run_hostel("run", *arguments, "ls", "/sys/class/net")
        assert (result.returncode, result.stdout) == (0, b"lo\n"), result.stderr
        assert b"hostel: no network: the host has routes to every subnet" in result.stderr
        for asked in (("--net", "nat"), ("-p", "8080:80"), ("--allow", "192.0.2.1")):
            result = run_hostel("run", *arguments, *asked, "true")
            assert result.returncode == 125, asked


def test_no_network(places: tuple[Namespace, Namespace]) -> None:
    script = "ls /sys/class/net; tail -n1 /etc/hosts; cmp /etc/resolv.conf - && echo same"
    with open("/etc/resolv.conf", "rb") as resolver:
        content = resolver.read()
    result = run_hostel(
        "run", "-q", "--engine", "qemu", "--net", "none", "sh", "-c", script, input=content
    )
    assert result.stdout.decode() == "lo\n127.0.1.1\thostel\nsame\n"


def test_a_tap_of_the_users_own(places: tuple[Namespace, Namespace]) -> None:
    """It has the address that was asked for; two NICs, told apart by their MACs."""
    host, _ = places
    host.run(
        "ip tuntap add dev own0 mode tap multi_queue vnet_hdr",
        "ip addr add 192.0.2.1/24 dev own0",
        "ip link set own0 up",
    )
    net = ("--net", f"tap=own0,mac={MAC},ip=192.0.2.2/24,mtu=9000,queues=2", "--net", "nat")
    script = (
        f"d=$(basename $(dirname $(grep -l {MAC} /sys/class/net/*/address)));"
        f" cat /sys/class/net/$d/mtu; python3 -c '{CONNECT}' 192.0.2.1"
    )
    try:
        with Echo(host, 7):
            result = run_hostel(
                *("run", "-q", "--engine", "qemu", "--cpus", "2", "-u", "root", *net),
                *("sh", "-c", script),
            )
        assert result.stdout.decode() == "9000\n192.0.2.2\n", result.stderr
    finally:
        host.run("ip link del own0")


def test_a_macvtap_is_on_the_interfaces_own_network(places: tuple[Namespace, Namespace]) -> None:
    """The world sees the guest's address, not the host's; and nothing of it stays."""
    host, world = places
    address = OUTSIDE.rpartition(".")[0] + ".77"
    net = ("--net", f"macvtap=eth0,ip={address}/24")
    with Echo(world, 7):
        result = run_hostel(
            *("run", "-q", "--engine", "qemu", *net, "python3", "-c", CONNECT, OUTSIDE)
        )
    assert result.stdout.decode() == f"{address}\n", result.stderr
    deadline = time.monotonic() + 20
    while "macvtap" in host.run("ip -d link"):
        assert time.monotonic() < deadline, "the macvtap is still there"
        time.sleep(0.05)


def e1000_kernel() -> str:
    from hostel.host import kernels

    for kernel in kernels.survey():
        if kernel.modules and not kernel.problem and any(kernel.modules.rglob("e1000.ko*")):
            return kernel.release
    return ""


def test_an_emulated_nic(places: tuple[Namespace, Namespace]) -> None:
    if not (release := e1000_kernel()):
        pytest.skip("no guest kernel with e1000: hostel kernel fetch linux-image-amd64")
    net = ("--net", "nat,model=e1000", "--kernel", release)
    script = f"readlink /sys/class/net/eth0/device/driver; python3 -c '{CONNECT}' {OUTSIDE}"
    with Echo(places[1], 7):
        result = run_hostel("run", "-q", "--engine", "qemu", *net, "sh", "-c", script)
    assert result.stdout.decode().split("/")[-1] == f"e1000\n{HOST}\n", result.stderr


def test_a_tap_that_is_in_use(places: tuple[Namespace, Namespace]) -> None:
    host, _ = places
    host.run("ip tuntap add dev own1 mode tap")
    fd = open_tap("own1")
    try:
        result = run_hostel("run", "-q", "--engine", "qemu", "--net", "tap=own1", "true")
        assert result.returncode == 125
        assert b"own1" in result.stderr
        assert b"in use" in result.stderr
    finally:
        os.close(fd)
        host.run("ip link del own1")
