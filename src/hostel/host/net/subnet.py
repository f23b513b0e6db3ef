"""Which IPv4 subnet a network gets, and which address a machine: integers and /24s, nothing else.

A network's subnet overlaps with nothing that the host has a route to. Addresses are handed out in a
circle: one that has just become free is the last to be used again, as others may remember its MAC.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise
from zlib import crc32

from hostel.errors import HostError, UserError

from . import kernel

PREFIX = 24
SIZE = 1 << (32 - PREFIX)
LARGEST = 1 << 28
BLOCKS = ("10.213.0.0", "172.29.0.0", "192.168.0.0", "100.127.0.0")
"""Each of 256 subnets: private ones (RFC 1918), and a part of 100.64.0.0/10 (RFC 6598), as there are VPNs
with routes to all that is private."""
_ROUTE_KINDS = ("unicast", "local", "broadcast", "multicast", "throw", "unreachable",
                "prohibit", "blackhole", "nat")  # fmt: skip


def number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address), "big")


def text(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


class Route:
    """Where the host sends packets for a subnet; a ``size`` of 0 for what is no subnet (default)."""

    def __init__(self, kind: str, base: int, size: int, device: str) -> None:
        self.kind, self.base, self.size, self.device = kind, base, size, device


def routes() -> list[Route]:
    """All that the host has, of all tables: a VPN may have its own."""
    text = kernel.run([kernel.find("ip"), "-4", "-o", "route", "show", "table", "all"])
    return [route for line in text.splitlines() if line.strip() for route in _routes(line)]


def choose(name: str, taken: list[Route]) -> int:
    """A free subnet, the same for the same name if it can be; its first address."""
    for base in _candidates(name):
        if not any(r.base < base + SIZE and base < r.base + r.size for r in taken):
            return base
    raise HostError(
        f"the host has routes to every subnet that hostel would use (of {', '.join(BLOCKS)})",
        cost="no network of hostel's own",
        cure="see: ip route; or use --net bridge, macvtap or tap",
    )


def _routes(line: str) -> Iterator[Route]:
    """One for each way that the packets may take (ip-route(8), ``nexthop``)."""
    words = line.replace("\\", " ").split()
    kind = words.pop(0) if words[0] in _ROUTE_KINDS else "unicast"
    address, _, prefix = words[0].partition("/")
    length = int(prefix or 32)
    base, size = (0, 0) if address == "default" else (number(address), 1 << (32 - length))
    if size > LARGEST:  # halves of the world are a VPN's default route
        base = size = 0
    for device in [name for word, name in pairwise(words) if word == "dev"] or [""]:
        yield Route(kind, base, size, device)


def _candidates(name: str) -> Iterator[int]:
    first = 0 if name == "default" else 1 + crc32(name.encode()) % 255
    for block in BLOCKS:
        for n in range(256):
            yield number(block) + ((first + n) % 256) * SIZE


class Pool:
    """The addresses of one subnet. The bridge has the first."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.gateway = text(base + 1)
        self._taken: set[int] = set()
        self._next = 2

    def take(self, wanted: str = "") -> str:
        """``wanted`` or any free one."""
        if wanted:
            return self._take_this(wanted)
        for n in range(SIZE - 3):
            candidate = 2 + (self._next - 2 + n) % (SIZE - 3)
            if self.base + candidate not in self._taken:
                self._next = candidate + 1
                self._taken.add(self.base + candidate)
                return text(self.base + candidate)
        raise HostError("the network has no free address left", cure="use another network as well")

    def give_back(self, address: str) -> None:
        self._taken.discard(number(address))

    def has(self, address: str) -> bool:
        return self.base <= number(address) < self.base + SIZE

    def __str__(self) -> str:
        return f"{text(self.base)}/{PREFIX}"

    def _take_this(self, wanted: str) -> str:
        address, _, prefix = wanted.partition("/")
        value = number(address)
        if prefix not in ("", str(PREFIX)) or not self.base + 1 < value < self.base + SIZE - 1:
            raise UserError(
                f"{wanted} is no address for a machine on this network",
                cure=f"choose one of {text(self.base + 2)} to {text(self.base + SIZE - 2)}, or leave ip= out",
            )
        if value in self._taken:
            raise UserError(f"{address} is in use by another machine of this network")
        self._taken.add(value)
        return text(value)
