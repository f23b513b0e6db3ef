"""DNS for tests: questions as a guest asks them, and the server that the host's resolver file names."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Mapping

from guests.namespaces import Guest, Namespace, Server
from hostel.host.net.exchange import servers

NXDOMAIN, REFUSED = 3, 5


def gateway(guest: Guest) -> str:
    """The bridge's address, on networks of ours."""
    return guest.address.rpartition(".")[0] + ".1"


def look_up(
    guest: Guest, name: str, *, tcp: bool = False, server: str = "", patience: float = 5
) -> list[str]:
    """The IPv4 addresses of a name, as the guest's resolver gets them."""
    answer = exchange(guest, message(name), tcp=tcp, server=server, patience=patience)
    count = struct.unpack_from(">H", answer, 6)[0]
    records = answer[len(message(name)) :]
    return [socket.inet_ntoa(records[16 * n + 12 : 16 * n + 16]) for n in range(count)]


def message(name: str, kind: int = 1, ident: int = 0x1234) -> bytes:
    """A query (RFC 1035 §4.1)."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">6H", ident, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, kind, 1)


def exchange(
    guest: Guest, query: bytes, *, tcp: bool = False, server: str = "", patience: float = 5
) -> bytes:
    """The answer to one query; of our own networks' resolver if no other is named."""
    with guest.socket(socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
        sock.settimeout(patience)
        sock.connect((server or gateway(guest), 53))
        sock.send(struct.pack(">H", len(query)) + query if tcp else query)
        answer = sock.recv(4096)
    return answer[2:] if tcp else answer


class NameServer(Server):
    """Answers for some names at the address of the host's resolver, in the world outside or on the host."""

    def __init__(self, host: Namespace, outside: Namespace, names: Mapping[str, str]) -> None:
        self.names, self.asked = names, list[str]()
        address = servers()[0]
        local = address.startswith("127.")
        if not local:
            with contextlib.suppress(Exception):  # there already
                outside.run(f"ip addr add {address}/32 dev out")
        super().__init__(host if local else outside, 53, address)

    def answer_connection(self, connection: socket.socket, peer: str) -> None:
        answer = self._answer(connection.recv(2048)[2:])
        connection.send(struct.pack(">H", len(answer)) + answer)

    def answer_datagram(self) -> None:
        query, peer = self.udp.recvfrom(2048)
        self.udp.sendto(self._answer(query), peer)

    def _answer(self, query: bytes) -> bytes:
        parts, offset = [], 12
        while length := query[offset]:
            parts.append(query[offset + 1 : offset + 1 + length].decode())
            offset += 1 + length
        name = ".".join(parts)
        self.asked.append(name)
        address = self.names.get(name)
        code = 0 if address else NXDOMAIN
        header = struct.pack(">2s5H", query[:2], 0x8180 | code, 1, int(bool(address)), 0, 0)
        record = struct.pack(">HHHIH", 0xC00C, 1, 1, 60, 4)
        return header + query[12:] + (record + socket.inet_aton(address) if address else b"")
