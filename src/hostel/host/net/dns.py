"""DNS messages (RFC 1035 §4), as little of them as a forwarder needs: the question, and addresses.

A guest may send anything, and so may a server: what is cut short or runs in circles is a ``ValueError``.
"""

from __future__ import annotations

import socket
import struct

A = 1
IN = 1
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3

HEADER = struct.Struct(">HHHHHH")
RESPONSE, OPCODE, AUTHORITATIVE = 0x8000, 0x7800, 0x0400
RECURSION_DESIRED, RECURSION_AVAILABLE = 0x0100, 0x0080
POINTER = 0xC0
"""The two highest bits of a label's length: the rest of the name is elsewhere (§4.1.4)."""


class Question:
    """What a query asks for; ``wire`` is the question section as it came."""

    def __init__(self, message: bytes) -> None:
        if len(message) < HEADER.size:
            raise ValueError("shorter than a header")
        self.id, self.flags, questions, *_ = HEADER.unpack_from(message)
        if questions != 1 or self.flags & OPCODE:
            raise ValueError("not a query with one question")
        self.name, end = _name(message, HEADER.size)
        if len(message) < end + 4:
            raise ValueError("the question is cut short")
        self.type, self.kind = struct.unpack_from(">HH", message, end)
        self.wire = message[HEADER.size : end + 4]

    @property
    def is_query(self) -> bool:
        return not self.flags & RESPONSE

    def answer(self, code: int, addresses: list[str], ttl: int = 0) -> bytes:
        """A response of our own, with A records for the name asked."""
        flags = RESPONSE | AUTHORITATIVE | RECURSION_AVAILABLE
        flags |= (self.flags & RECURSION_DESIRED) | code
        header = HEADER.pack(self.id, flags, 1, len(addresses), 0, 0)
        owner = struct.pack(">H", POINTER << 8 | HEADER.size)
        record = struct.pack(">HHIH", A, IN, ttl, 4)
        records = (owner + record + socket.inet_aton(address) for address in addresses)
        return header + self.wire + b"".join(records)


def addresses(message: bytes) -> tuple[list[str], int]:
    """All IPv4 addresses of a response's answer, whatever aliases lead to them, and the least TTL."""
    count = HEADER.unpack_from(message)[3]
    question = Question(message)
    offset = HEADER.size + len(question.wire)
    found, least = [], 1 << 31
    for _ in range(count):
        offset = _skip_name(message, offset)
        if len(message) < offset + 10:
            raise ValueError("a record is cut short")
        kind, group, ttl, length = struct.unpack_from(">HHIH", message, offset)
        data = message[offset + 10 : offset + 10 + length]
        offset += 10 + length
        if (kind, group, len(data)) == (A, IN, 4):
            found.append(socket.inet_ntoa(data))
            least = min(least, ttl)
    return found, least if found else 0


def _name(message: bytes, offset: int) -> tuple[str, int]:
    """A name without pointers, in lower case, and where it ends: a question's has nothing to point at."""
    labels = []
    while True:
        length = _byte(message, offset)
        offset += 1
        if length == 0:
            break
        if length & POINTER or offset + length > len(message):
            raise ValueError("a name that cannot be read")
        labels.append(message[offset : offset + length].decode("latin-1").lower())
        if "." in labels[-1]:
            raise ValueError("a dot in a label, which would look like one between labels")
        offset += length
    name = ".".join(labels)
    if len(name) > 253:
        raise ValueError("a name that is too long")
    return name, offset


def _skip_name(message: bytes, offset: int) -> int:
    while True:
        length = _byte(message, offset)
        if length & POINTER:
            return offset + 2
        offset += 1 + length
        if length == 0:
            return offset


def _byte(message: bytes, offset: int) -> int:
    if offset >= len(message):
        raise ValueError("the message is cut short")
    return message[offset]
