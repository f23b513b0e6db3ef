"""Packets by hand: what a kernel would not send, or not just now. Each begins with its Ethernet type."""

from __future__ import annotations

import socket
import struct

UDP, ICMPV6 = 17, 58
ALL_NODES = "ff02::1"
ALL_NODES_MAC = bytes.fromhex("333300000001")


def checksum(data: bytes) -> int:
    total = sum(int(word) for word in struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(port: int, content: bytes) -> bytes:
    """Without a checksum."""
    return struct.pack(">HHHH", 4000, port, 8 + len(content), 0) + content


def ipv4(source: str, target: str, body: bytes) -> bytes:
    header = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, UDP, 0))
    header += socket.inet_aton(source) + socket.inet_aton(target)
    header[10:12] = checksum(bytes(header)).to_bytes(2, "big")
    return b"\x08\x00" + header + body


def ipv6(source: str, target: str, protocol: int, body: bytes, sum_at: int) -> bytes:
    """Hop limit 255: of this link (RFC 4861 §6.1.2)."""
    ends = b"".join(socket.inet_pton(socket.AF_INET6, text) for text in (source, target))
    pseudo = ends + struct.pack(">II", len(body), protocol)
    total = checksum(pseudo + body + bytes(len(body) % 2))
    body = body[:sum_at] + total.to_bytes(2, "big") + body[sum_at + 2 :]
    return b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(body), protocol, 255) + ends + body


def advertisement(router: str, prefix: str) -> bytes:
    """A router for half an hour, and a prefix (RFC 4861 §4.2, §4.6.2)."""
    body = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    body += struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 86400, 14400, 0)
    body += socket.inet_pton(socket.AF_INET6, prefix)
    return ipv6(router, ALL_NODES, ICMPV6, body, 2)
