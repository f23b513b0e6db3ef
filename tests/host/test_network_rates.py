"""A NIC's rates kept by the kernel, with real packets: both ways share, nothing is left."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from guests.namespaces import Guest, Namespace, missing, world
from hostel.errors import SpecError
from hostel.host import runtime
from hostel.host.attaching import interfaces
from hostel.host.net import rates
from hostel.host.network import attach
from hostel.spec import Limits, Nic, Rate

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PORT = 9
SO_RCVBUFFORCE = 33
NICS = [Nic(address="10.213.0.9"), Nic(mode="isolated"), Nic(mode="bridge", target="br9")]


@pytest.fixture(scope="module")
def host() -> Iterator[Namespace]:
    with world() as (host, _):
        host.run(
            "ip link add br9 type bridge stp_state 0 forward_delay 0",
            "ip addr add 192.0.2.1/24 dev br9",
            "ip link set br9 up",
        )
        yield host


class Wire:
    """A machine's NIC, and datagrams between it and its host."""

    def __init__(self, host: Namespace, nic: Nic, folder: Path, stack: ExitStack) -> None:
        networks = stack.enter_context(attach([nic], (), folder, "", cpus=1))
        (interface,) = interfaces(networks, "qemu")
        self.tap = interface.target
        guest = stack.enter_context(Guest(host, networks.attachments[0]))
        if nic.mode == "bridge":
            guest.run("ip addr add 192.0.2.2/24 dev eth0")
            near, far = "192.0.2.1", "192.0.2.2"
        else:
            link = networks.attachments[0].link
            assert link is not None
            near, far = link.dns[0], guest.address
            guest.run(f"ip neigh replace {near} lladdr {_mac(host, near)} dev eth0")
        self.near = _bound(stack, host, near)
        self.far = _bound(stack, guest, far)

    def to_guest(self, count: int, size: int) -> int:
        """How many of them arrive."""
        return _arrived(self.near, self.far, count, size)

    def from_guest(self, count: int, size: int) -> int:
        return _arrived(self.far, self.near, count, size)


def _mac(host: Namespace, address: str) -> str:
    lines = host.run("ip -o addr").splitlines()
    device = next(line.split()[1] for line in lines if f" {address}/" in line)
    return host.run(f"ip -o link show {device}").partition("link/ether ")[2].split()[0]


def _bound(stack: ExitStack, where: Namespace, address: str) -> socket.socket:
    sock = stack.enter_context(where.socket(socket.SOCK_DGRAM))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    sock.bind((address, PORT))
    return sock


def _arrived(sender: socket.socket, receiver: socket.socket, count: int, size: int) -> int:
    for _ in range(count):
        sender.sendto(bytes(size), receiver.getsockname())
        time.sleep(0.0005)  # the thread between the taps keeps up
    receiver.settimeout(0.3)
    found = 0
    try:
        while receiver.recv(size):
            found += 1
    except TimeoutError:
        return found
    return found


@pytest.mark.parametrize("nic", NICS, ids=lambda nic: nic.mode)
def test_bytes_are_limited_in_both_directions_together(
    host: Namespace, tmp_path: Path, nic: Nic
) -> None:
    """The bucket holds 200 datagrams of a thousand bytes, and hardly anything comes after."""
    limits = Limits(bytes=Rate(per_second=1000, burst=200_000))
    with ExitStack() as stack:
        wire = Wire(host, msgspec.structs.replace(nic, limits=limits), tmp_path, stack)
        assert wire.to_guest(100, 958) == 100
        assert 70 <= wire.from_guest(150, 958) <= 110
        assert wire.to_guest(50, 958) <= 10


def test_packets_are_limited(host: Namespace, tmp_path: Path) -> None:
    limits = Limits(operations=Rate(per_second=1, burst=50))
    with ExitStack() as stack:
        wire = Wire(host, Nic(mode="bridge", target="br9", limits=limits), tmp_path, stack)
        assert 20 <= wire.to_guest(100, 100) <= 60  # ARP, and what IPv6 says of itself, count too


def test_a_bucket_is_never_smaller_than_a_frame() -> None:
    """Or one of TCP's uncut segments would never pass."""
    text = rates.render("tap", {"bytes": {"per_second": 1000, "burst": 10}})
    assert f"burst {rates.LARGEST - 1000} bytes" in text


def test_nothing_is_left_of_limits(host: Namespace, tmp_path: Path) -> None:
    limits = Limits(bytes=Rate(per_second=10**12), operations=Rate(per_second=10**12))
    for nic in NICS:
        with ExitStack() as stack:
            wire = Wire(host, msgspec.structs.replace(nic, limits=limits), tmp_path, stack)
            assert f"table bridge {wire.tap} " in host.run("nft list ruleset")
            assert wire.to_guest(10, 1000) == 10
    deadline = time.monotonic() + 5
    while any(runtime.base().glob(".net-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert host.run("nft list ruleset") == ""


def test_only_the_taps_of_our_own_are_limited(host: Namespace, tmp_path: Path) -> None:
    """On another's tap the kernel keeps nothing for us."""
    host.run("ip tuntap add dev tap9 mode tap")
    nic = Nic(mode="tap", target="tap9", limits=Limits(bytes=Rate(per_second=1000)))
    with (
        attach([nic], (), tmp_path, "", cpus=1) as networks,
        pytest.raises(SpecError, match="cannot limit the rate"),
    ):
        interfaces(networks, "qemu")
    host.run("ip link del tap9")
