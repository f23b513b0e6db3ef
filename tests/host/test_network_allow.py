"""Allow-lists: what a machine with one must not reach, it does not; whatever it puts on the wire."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.names import NXDOMAIN, NameServer, exchange, gateway, look_up, message
from guests.namespaces import HOST, OUTSIDE, Echo, Guest, Namespace, ask, missing, reached, world
from hostel.errors import SpecError
from hostel.host.net import allow, flows, kernel
from hostel.host.net.resolver import MAX_ADDRESSES
from hostel.host.network import attach
from hostel.spec import Nic, Publish

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

OTHER = "203.0.113.9"
NAMES = {
    "many.test": "192.0.2.1",
    "good.test": OUTSIDE,
    "other.test": OTHER,
    "deep.good.test": OTHER,
    "host.test": HOST,
    "metadata.test": "169.254.169.254",
}
ALLOW = (
    *("good.test:7", "many.test:9", "host.test", "metadata.test", "other.example", "neighbour"),
    *(f"{OTHER}:9/tcp", "198.51.100.0/24:7", "0.0.0.0/0:443"),
)


class Scene:
    """One limited machine among what it may and may not reach."""

    def __init__(self, host: Namespace, outside: Namespace, guests: list[Guest]) -> None:
        self.host, self.outside = host, outside
        self.limited, self.neighbour, self.stranger = guests
        self.names = NAMES
        """What the world's name server answers."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("runtime")
    with contextlib.ExitStack() as stack:
        host, outside = stack.enter_context(world())
        outside.run(f"ip addr add {OTHER}/24 dev out", "ip addr add 198.51.100.7/32 dev out")
        host.run("ip addr add 198.51.100.8/32 dev lo")
        stack.enter_context(NameServer(host, outside, NAMES))
        guests = []
        for name, limits in (("limited", ALLOW), ("neighbour", None), ("stranger", None)):
            ports = [Publish(host=8443, guest=7)] if name == "stranger" else []
            nics = [Nic(allow=limits)]
            networks = stack.enter_context(attach(nics, ports, folder, name, cpus=1))
            guests.append(Guest(host, networks.attachments[0]))
            stack.callback(guests[-1].close)
        for port in (7, 9, 443):
            for where in (host, outside, *guests):
                stack.enter_context(Echo(where, port))
        yield Scene(host, outside, guests)


def everything(scene: Scene) -> list[tuple[str, int, str]]:
    others = (scene.neighbour.address, scene.stranger.address, gateway(scene.limited))
    addresses = (OUTSIDE, OTHER, HOST, "198.51.100.7", "198.51.100.8", *others)
    targets = [
        (a, port, kind) for a in addresses for port in (7, 9, 443) for kind in ("tcp", "udp")
    ]
    return [*targets, (HOST, 8443, "tcp")]


def test_what_is_not_listed_is_not_reached(scene: Scene) -> None:
    listed = [
        *((OTHER, 9, "tcp"), ("198.51.100.7", 7, "tcp"), ("198.51.100.7", 7, "udp")),
        *((a, 443, kind) for a in (OUTSIDE, OTHER, "198.51.100.7") for kind in ("tcp", "udp")),
    ]
    assert sorted(reached(scene.limited, everything(scene))) == sorted(listed)
    # all of it is there: another machine reaches it
    assert reached(scene.neighbour, everything(scene)) == everything(scene)


def test_names_open_the_way_to_their_addresses_only(scene: Scene) -> None:
    assert look_up(scene.limited, "good.test") == [OUTSIDE]
    assert ask(scene.limited, OUTSIDE, 7) == HOST
    assert ask(scene.limited, OUTSIDE, 7, "udp") == HOST
    assert reached(scene.limited, [(OUTSIDE, 9, "tcp"), (OTHER, 7, "tcp")]) == []
    assert look_up(scene.limited, "neighbour") == [scene.neighbour.address]
    assert ask(scene.limited, scene.neighbour.address, 9) == scene.limited.address
    assert reached(scene.limited, [(scene.stranger.address, 9, "tcp")]) == []


@pytest.mark.parametrize("name", ["other.test", "deep.good.test", "stranger", "stranger.hostel"])
def test_other_names_do_not_resolve(scene: Scene, name: str) -> None:
    assert exchange(scene.limited, message(name))[3] & 15 == NXDOMAIN
    assert exchange(scene.limited, message(name), tcp=True)[3] & 15 == NXDOMAIN
    assert look_up(scene.neighbour, name) != []


def test_a_name_does_not_lead_to_the_host(scene: Scene) -> None:
    """Whoever answers for an allowed name may answer anything."""
    assert look_up(scene.limited, "host.test") == [HOST]
    assert look_up(scene.limited, "metadata.test") == ["169.254.169.254"]
    assert reached(scene.limited, [(HOST, 7, "tcp"), (HOST, 443, "udp")]) == []
    ruleset = scene.host.run("nft list ruleset")
    assert OUTSIDE in ruleset
    assert "169.254.169.254" not in ruleset
    assert HOST not in ruleset


def test_a_name_does_not_lead_to_another_machine(scene: Scene) -> None:
    """Only a machine's own name does; the world's name servers do not answer for the network."""
    scene.names["other.example"] = scene.stranger.address
    assert look_up(scene.limited, "other.example") == [scene.stranger.address]
    assert reached(scene.limited, [(scene.stranger.address, 9, "tcp")]) == []


def test_a_dot_within_a_label_is_not_one_between_labels(scene: Scene) -> None:
    """The same letters, another name: of a zone that nobody has allowed."""
    good = message("good.test")
    other = good.replace(b"\4good\4test", b"\x09good.test")
    assert len(other) == len(good)
    with scene.limited.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((gateway(scene.limited), 53))
        sock.settimeout(0.3)
        sock.send(other)
        with pytest.raises(TimeoutError):
            sock.recv(100)


@pytest.mark.parametrize("limited", [Nic(allow=("192.0.2.1",)), Nic(mode="isolated")])
def test_a_machine_does_not_inherit_connections(tmp_path: Path, limited: Nic) -> None:
    """Of one that had its address before, the kernel may still remember what it was allowed to."""

    def from_port(where: Guest) -> bool:
        with where.socket(socket.SOCK_DGRAM) as sock:
            sock.bind(("", 5555))
            sock.settimeout(0.5)
            sock.connect((OUTSIDE, 7))
            sock.send(b"?")
            with contextlib.suppress(OSError):
                return bool(sock.recv(100))
        return False

    with world() as (host, outside), Echo(outside, 7):
        kernel.set_sysctl("ipv4/ip_forward", "1")  # as on a host with Docker
        answers = []
        for nic in (Nic(), limited):
            with attach([nic], [], tmp_path, "", cpus=1) as networks:
                guest = Guest(host, networks.attachments[0])
                guest.run(f"ip route replace default via {gateway(guest)}")
                answers.append((guest.address, from_port(guest)))
                guest.close()
            while "hostel0" in kernel.interfaces():  # with its subnet and all addresses
                time.sleep(0.02)
        (first, before), (second, after) = answers
        assert first == second
        assert (before, after) == (True, False)


def test_connections_end_with_their_machine(tmp_path: Path) -> None:
    """Those to and from it: nobody at its address is to get what was meant for it."""

    def known(address: str) -> int:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, flows.NETLINK_NETFILTER) as sock:
            ways = (flows.CTA_TUPLE_ORIG, flows.CTA_TUPLE_REPLY)
            return sum(len(list(flows._of(sock, way, socket.inet_aton(address)))) for way in ways)

    with (
        world() as (host, outside),
        Echo(outside, 7, OUTSIDE),
        attach([Nic()], [], tmp_path, "stays", cpus=1),
    ):
        with attach([Nic()], [], tmp_path, "leaves", cpus=1) as networks:
            guest = Guest(host, networks.attachments[0])
            assert ask(guest, OUTSIDE, 7, "udp") == HOST
            assert known(guest.address) == 1
            guest.close()
        deadline = time.monotonic() + 5
        while known(guest.address):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_only_addresses_are_answered(scene: Scene) -> None:
    """A name's other records could carry anything, and IPv6 addresses lead nowhere."""
    for kind in (16, 28, 255):
        answer = exchange(scene.limited, message("good.test", kind))
        assert (answer[3] & 15, answer[6:8]) == (0, b"\0\0")


def test_what_comes_in_is_answered(scene: Scene) -> None:
    assert ask(scene.neighbour, scene.limited.address, 7) == scene.neighbour.address
    assert ask(scene.host, scene.limited.address, 7) == gateway(scene.limited)


def test_a_name_with_a_thousand_addresses(scene: Scene) -> None:
    """Who answers for a name decides how many: what a guest can make the host do has an end."""
    for number in range(MAX_ADDRESSES + 20):
        scene.names["many.test"] = f"192.0.2.{number}"
        assert look_up(scene.limited, "many.test") == [f"192.0.2.{number}"]
    assert scene.host.run("nft list ruleset").count("192.0.2.") == MAX_ADDRESSES


def test_messages_that_are_none(scene: Scene) -> None:
    """None of them is answered, none ends the resolver, and each leaves its place to another."""
    good = message("good.test")
    loop = good[:12] + b"\xc0\x0c" + good[-4:]
    bad = [b"", good[:5], good[:-1], loop, good[:12], good[:2] + b"\x81" + good[3:], b"\xff" * 600]
    with scene.limited.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((gateway(scene.limited), 53))
        for _ in range(20):
            for text in bad:
                sock.send(text)
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(100)
    assert look_up(scene.limited, "good.test") == [OUTSIDE]
    assert look_up(scene.limited, "good.test", tcp=True) == [OUTSIDE]


# -- by hand: frames that no guest's kernel would send -----------------------------------------


@pytest.fixture
def wire(scene: Scene) -> Iterator[socket.socket]:
    """The guest's end of its wire."""
    with scene.limited.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with sock:
        sock.bind(("eth0", 0))
        yield sock


@pytest.fixture
def taps(scene: Scene) -> Iterator[list[socket.socket]]:
    """What arrives at the other guests, outside, and at the host's IP layer from the bridge."""
    ends = []
    for where, link in (
        *((scene.neighbour, "eth0"), (scene.stranger, "eth0"), (scene.outside, "out")),
        (scene.host, "hostel0"),
    ):
        with where.inside():
            ends.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        ends[-1].bind((link, 0))
        ends[-1].setblocking(False)
    yield ends
    for end in ends:
        end.close()


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def bridge_mac(scene: Scene) -> bytes:
    return mac(scene.host.run("ip -o link show hostel0").partition("link/ether ")[2].split()[0])


def arp(scene: Scene, *, operation: int = 1, sender: str, target: str, source: bytes) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation)
    body += source + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)
    return b"\xff" * 6 + mac(scene.limited.mac) + b"\x08\x06" + body


def udp(source: str, target: str, port: int, mark: bytes) -> bytes:
    datagram = struct.pack(">HHHH", 4000, port, 8 + len(mark), 0) + mark
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack(">H", checksum) + header[12:] + datagram


def ipv6(target: str, mark: bytes) -> bytes:
    datagram = struct.pack(">HHHH", 4000, 443, 8 + len(mark), 0) + mark
    header = struct.pack(">IHBB", 6 << 28, len(datagram), 17, 64)
    addresses = socket.inet_pton(socket.AF_INET6, "fe80::1") + socket.inet_pton(
        socket.AF_INET6, target
    )
    return header + addresses + datagram


def arrived(taps: list[socket.socket], mark: bytes, patience: float = 0.3) -> list[int]:
    """At which ends a frame with this mark came in."""
    deadline, found = time.monotonic() + patience, set[int]()
    while time.monotonic() < deadline:
        for number, end in enumerate(taps):
            with contextlib.suppress(BlockingIOError):
                while True:
                    if mark in end.recv(4096):
                        found.add(number)
        time.sleep(0.01)
    return sorted(found)


def test_frames_by_hand(scene: Scene, wire: socket.socket, taps: list[socket.socket]) -> None:
    limited, mark = scene.limited, os.urandom(8)
    own, gate = mac(limited.mac), bridge_mac(scene)
    neighbour, fake = mac(scene.neighbour.mac), bytes.fromhex("020000000042")
    good = udp(limited.address, OUTSIDE, 443, mark)
    wire.send(gate + own + b"\x08\x00" + good)
    assert arrived(taps, mark, 1) == [2, 3]  # this one is in order: by the host to the world

    v6 = ipv6("ff02::1", mark)
    for frame in (
        gate + fake + b"\x08\x00" + good,  # another MAC
        gate + own + b"\x08\x00" + udp("10.213.0.99", OUTSIDE, 443, mark),  # another address
        gate + own + b"\x08\x00" + udp(scene.neighbour.address, OUTSIDE, 443, mark),
        gate + own + b"\x08\x00" + udp("127.0.0.1", "127.0.0.1", 7, mark),
        neighbour + own + b"\x08\x00" + udp(limited.address, scene.neighbour.address, 443, mark),
        b"\xff" * 6 + own + b"\x08\x00" + udp(limited.address, "255.255.255.255", 67, mark),
        b"\x33\x33\0\0\0\1" + own + b"\x86\xdd" + v6,  # IPv6, to all
        neighbour + own + b"\x86\xdd" + ipv6("fe80::2", mark),
        gate + own + b"\x86\xdd" + ipv6("fe80::3", mark),
        gate + own + b"\x81\x00\0\1\x08\x00" + good,  # in a VLAN
        neighbour + own + b"\x81\x00\0\1\x08\x00" + good,
        neighbour + own + b"\x88\xb5" + mark * 8,  # some other protocol
        b"\xff" * 6 + own + b"\x88\xb5" + mark * 8,
    ):
        wire.send(frame)
    assert arrived(taps, mark) == []


def test_arp_by_hand(scene: Scene, wire: socket.socket, taps: list[socket.socket]) -> None:
    """Nobody hears a guest's ARP but the host, and the host believes none of it."""
    own, address = mac(scene.limited.mac), scene.limited.address
    before = scene.host.run("ip neigh show dev hostel0")
    for operation in (1, 2):
        for sender in (gateway(scene.limited), scene.neighbour.address, address):
            for target in (sender, scene.neighbour.address, "192.168.7.7"):
                wire.send(arp(scene, operation=operation, sender=sender, target=target, source=own))
    wire.send(
        arp(
            scene,
            sender=address,
            target=gateway(scene.limited),
            source=bytes.fromhex("020000000042"),
        )
    )
    assert arrived(taps[:3], own) == []
    assert scene.host.run("ip neigh show dev hostel0") == before
    assert ask(scene.neighbour, scene.stranger.address, 7) == scene.neighbour.address


# -- how entries are written --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "service"),
    [
        ("192.0.2.1", "address", ""),
        ("192.0.2.1/32:80", "address", "meta l4proto { tcp, udp } th dport 80"),
        ("192.0.2.0/24:80/tcp", "prefix", "tcp dport 80"),
        ("Pypi.ORG.:443/udp", "name", "udp dport 443"),
        ("db", "name", ""),
    ],
)
def test_entries(text: str, kind: str, service: str) -> None:
    entry = allow.parse(text)
    assert (entry.kind, entry.service()) == (kind, service)
    assert entry.host == text.lower().partition(":")[0].removesuffix("/32").rstrip(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.2.3",
        "1.2.3.4/33",
        "a/8",
        "a:0",
        "a:65536",
        "a:80/sctp",
        "a b",
        "a;drop",
        "::1",
        "-a",
        "a..b",
    ],
)
def test_entries_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not a destination to allow"):
        attach([Nic(allow=(text,))], (), tmp_path, "", cpus=1)
