"""Frames to link-local MACs: a bridge hands them to the IP layer of its *port*, past its own rules.

By them a guest could talk to the host's IPv4 and IPv6, and advertise itself as the host's IPv6 router,
whatever its network is. The control sends the same frames by a tap that nobody protects.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.frames import UDP, advertisement, datagram, ipv4, ipv6
from guests.namespaces import HOST, Guest, Namespace, missing, world
from hostel.host.interface import Attachment, GuestLink, Interface
from hostel.host.network import attach
from hostel.spec import Nic

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

HOST_V6, GUEST_V6, PREFIX = "2001:db8::1", "fe80::5", "2001:db8:bad::"
MARK, PORT = b"past the rules", 443
GROUPS = [bytes.fromhex(f"0180c20000{last:02x}") for last in range(16)]
"""The first is the bridge's own if it speaks STP, else it is forwarded as any other."""
GUEST_MAC, GUEST_V4 = "02:00:00:00:00:51", "10.98.0.2"
ROUTER = "an advertised prefix or router"


@pytest.fixture
def host() -> Iterator[Namespace]:
    with world() as (host, _):
        host.run(
            f"ip -6 addr add {HOST_V6}/64 dev eth0 nodad",
            "ip link add br7 type bridge",
            "ip link set br7 up",
        )
        yield host


@contextlib.contextmanager
def bare(host: Namespace) -> Iterator[Attachment]:
    """A tap on a bridge as anybody would make them."""
    host.run("ip tuntap add t0 mode tap", "ip link set t0 master br7", "ip link set t0 up")
    interface = Interface(model="virtio", plane="python", backend="tap", target="t0", mac=GUEST_MAC)
    yield Attachment(interface, GuestLink(mac=GUEST_MAC, addresses=(f"{GUEST_V4}/24",)))


@contextlib.contextmanager
def ours(nic: Nic, folder: Path) -> Iterator[Attachment]:
    with attach([nic], [], folder, "", cpus=1) as networks:
        yield networks.attachments[0]


def request(mac: bytes, address: str) -> bytes:
    """ARP: who has the host's address?"""
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac + socket.inet_aton(address)
    return b"\x08\x06" + body + bytes(6) + socket.inet_aton(HOST)


def listener(host: Namespace, family: int, address: str) -> socket.socket:
    sock = host.socket(socket.SOCK_DGRAM, family)
    sock.bind((address, PORT))
    sock.setblocking(False)
    return sock


def got(sock: socket.socket, wanted: Callable[[bytes], bool] = bool) -> bool:
    with contextlib.suppress(BlockingIOError):
        while True:
            if wanted(sock.recv(4096)):
                return True
    return False


def is_reply(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2"


def intrusions(host: Namespace, attachment: Attachment, groups: list[bytes] = GROUPS) -> list[str]:
    """What the host takes from such frames."""
    with contextlib.ExitStack() as stack:
        guest = Guest(host, attachment)
        stack.callback(guest.close)
        address = guest.address or GUEST_V4
        v4 = stack.enter_context(listener(host, socket.AF_INET, HOST))
        v6 = stack.enter_context(listener(host, socket.AF_INET6, HOST_V6))
        with guest.inside():
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        stack.enter_context(wire)
        wire.bind(("eth0", 0))
        own = bytes.fromhex(guest.mac.replace(":", ""))
        for group in groups:
            for packet in (
                ipv4(address, HOST, datagram(PORT, MARK)),
                ipv6(GUEST_V6, HOST_V6, UDP, datagram(PORT, MARK), 6),
                advertisement(GUEST_V6, PREFIX),
                request(own, address),
            ):
                wire.send(group + own + packet)
        time.sleep(0.3)
        wire.setblocking(False)
        routes = host.run("ip -6 route", "ip -6 addr")
        found = {
            "IPv4": got(v4),
            "IPv6": got(v6),
            ROUTER: PREFIX in routes or f"via {GUEST_V6} " in routes,
            "ARP": got(wire, is_reply),
        }
    return [what for what, there in found.items() if there]


def test_they_are_good_frames(host: Namespace) -> None:
    with bare(host) as attachment:
        assert intrusions(host, attachment, GROUPS[1:]) == ["IPv4", "IPv6", ROUTER, "ARP"]


@pytest.mark.parametrize(
    "nic",
    [Nic(), Nic(mode="isolated"), Nic(allow=("192.0.2.1",))],
    ids=["nat", "isolated", "allow"],
)
def test_the_host_takes_none_of_them(host: Namespace, tmp_path: Path, nic: Nic) -> None:
    with ours(nic, tmp_path) as attachment:
        assert intrusions(host, attachment) == []


@pytest.mark.parametrize("everywhere", [0, 1, 2])
def test_on_a_bridge_of_the_hosts(host: Namespace, tmp_path: Path, everywhere: int) -> None:
    """There the guest is a neighbour of the host's, by the bridge and not past it. What the host says of
    all its interfaces (rp_filter: Ubuntu 2, others 0 or 1) changes nothing."""
    Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text(str(everywhere))
    with ours(Nic(mode="bridge", target="br7"), tmp_path) as attachment:
        assert intrusions(host, attachment, GROUPS[1:]) == []


def test_the_rules_alone_keep_them_out(host: Namespace, tmp_path: Path) -> None:
    """Also if somebody else sets the taps' switches back, as a host's network manager may."""
    with ours(Nic(mode="isolated"), tmp_path) as attachment:
        for path in ("ipv6/conf/{}/disable_ipv6", "ipv4/conf/{}/rp_filter"):
            name = path.format(attachment.interface.target)
            Path("/proc/sys/net", name).write_text("0")
        assert intrusions(host, attachment) == []
