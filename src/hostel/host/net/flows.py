"""Makes the kernel forget connections of an address, by ctnetlink (linux/netfilter/nfnetlink_conntrack.h).

Connection tracking outlives a machine and its network: TCP by days. Whoever gets the address next could go on
with what the one before was allowed, as rules take a known connection for one that has been looked at.

A message: nlmsghdr, nfgenmsg (family, version, resource), attributes of (length, type, payload), each aligned
to 4 bytes. The list of connections is one of our messages answered by many, up to NLMSG_DONE.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from hostel.errors import HostError

NETLINK_NETFILTER = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
CT_NEW, CT_GET, CT_DELETE = 0x100, 0x101, 0x102
"""NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_…"""
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_ZONE, CTA_FILTER = 1, 2, 12, 18, 25
CTA_TUPLE_IP = CTA_IP_V4_SRC = CTA_FILTER_F_CTA_IP_SRC = 1
NESTED, TYPE = 0x8000, 0x3FFF
"""A flag of an attribute's type, and the type without flags."""

HEADER, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
FAMILY = struct.pack("BBH", socket.AF_INET, 0, 0)
PATIENCE = 5.0


def forget(address: str) -> None:
    """All connections that this IPv4 address began or was asked for; ``HostError`` if that cannot be."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
            sock.settimeout(PATIENCE)
            for direction in (CTA_TUPLE_ORIG, CTA_TUPLE_REPLY):
                for names in list(_of(sock, direction, socket.inet_aton(address))):
                    _delete(sock, names)
    except OSError as error:
        raise HostError(
            f"the kernel does not forget the connections of {address}: {error.strerror or error}",
            cost="a machine could use those of an earlier one with its address",
            cure="modprobe nf_conntrack_netlink (as root)",
        ) from None


def _of(sock: socket.socket, direction: int, source: bytes) -> Iterator[bytes]:
    """What names each connection that has this source in this direction. A kernel before 5.8 lists all."""
    ip = pack(CTA_TUPLE_IP | NESTED, pack(CTA_IP_V4_SRC, source))
    wanted = pack(direction, struct.pack("=I", CTA_FILTER_F_CTA_IP_SRC))  # CTA_FILTER_…_FLAGS
    body = pack(direction | NESTED, ip) + pack(CTA_FILTER | NESTED, wanted)
    for found in _ask(sock, CT_GET, NLM_F_DUMP, body):
        parts = dict(unpack(found))
        if _source(parts.get(direction, b"")) == source:
            kept = (CTA_TUPLE_ORIG | NESTED, CTA_ID, CTA_ZONE)
            yield b"".join(pack(k, parts[k & TYPE]) for k in kept if k & TYPE in parts)


def _delete(sock: socket.socket, names: bytes) -> None:
    try:
        list(_ask(sock, CT_DELETE, NLM_F_ACK, names))
    except FileNotFoundError:
        return  # it has ended meanwhile


def _ask(sock: socket.socket, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """The attributes of each connection in the answer."""
    size = HEADER.size + len(FAMILY) + len(body)
    sock.send(HEADER.pack(size, kind, NLM_F_REQUEST | flags, 1, 0) + FAMILY + body)
    while True:
        data = sock.recv(1 << 16)
        while data:
            size, answer, *_ = HEADER.unpack_from(data)
            if answer in (NLMSG_ERROR, NLMSG_DONE):
                (code,) = struct.unpack_from("=i", data, HEADER.size)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return
            if answer == CT_NEW:
                yield data[HEADER.size + len(FAMILY) : size]
            data = data[_aligned(size) :]


def _source(parts: bytes) -> bytes:
    addresses = dict(unpack(parts)).get(CTA_TUPLE_IP, b"")
    return dict(unpack(addresses)).get(CTA_IP_V4_SRC, b"")


def pack(kind: int, payload: bytes) -> bytes:
    size = ATTRIBUTE.size + len(payload)
    return ATTRIBUTE.pack(size, kind) + payload + bytes(_aligned(size) - size)


def unpack(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= ATTRIBUTE.size:
        size, kind = ATTRIBUTE.unpack_from(data)
        yield kind & TYPE, data[ATTRIBUTE.size : size]
        data = data[_aligned(size) :]


def _aligned(size: int) -> int:
    return (size + 3) & ~3
