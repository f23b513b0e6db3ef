"""A DHCP server whose answers a test decides: real packets, by the kernel's own UDP, on one interface.

::

    with DhcpServer(namespace, "w1", answer) as server:     # answer(Request) gives messages to send
        server.requests                                     # what has come, in order
    with dnsmasq(namespace, "w1", folder, …):               # a real one
        (folder / "leases").read_text()
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from guests.namespaces import Background, Namespace

DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6
MASK, ROUTER, SERVERS, DOMAIN, MTU, SECONDS, TYPE, SERVER = 1, 3, 6, 15, 26, 51, 53, 54
RENEWAL, REBINDING, ROUTES, END = 58, 59, 121, 255
FIXED = struct.Struct(">BBBBIHHIIII16s64s128s4s")
MAGIC = bytes((99, 130, 83, 99))
TO_ALL = "255.255.255.255"


class Request(NamedTuple):
    """A client's message, as far as tests look at it."""

    kind: int
    id: int
    client: str
    mac: bytes
    options: dict[int, bytes]


def parse(data: bytes) -> Request:
    fixed, options, at = FIXED.unpack_from(data), {}, FIXED.size
    while data[at] != END:
        options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    client = socket.inet_ntoa(struct.pack(">I", fixed[7]))
    return Request(options[TYPE][0], fixed[4], client, fixed[11][:6], options)


def option(code: int, data: bytes) -> bytes:
    return bytes((code, len(data))) + data


def ip(*addresses: str) -> bytes:
    return b"".join(map(socket.inet_aton, addresses))


def message(request: Request, address: str, options: bytes, **changed: bytes | int) -> bytes:
    """A reply to it. ``changed`` names fields to fill otherwise."""
    fields: dict[str, bytes | int] = {
        "op": 2,
        "hardware": 1,
        "size": 6,
        "hops": 0,
        "id": request.id,
        "seconds": 0,
        "flags": 0,
        "client": 0,
        "yours": int.from_bytes(socket.inet_aton(address)),
        "next": 0,
        "relay": 0,
        "mac": request.mac,
        "name": b"",
        "file": b"",
        "magic": MAGIC,
    }
    return FIXED.pack(*(fields | changed).values()) + options + b"\xff"


def reply(request: Request, server: str, address: str, *options: bytes, kind: int = 0) -> bytes:
    """OFFER for a DISCOVER, ACK for a REQUEST."""
    kind = kind or (OFFER if request.kind == DISCOVER else ACK)
    head = option(TYPE, bytes([kind])) + option(SERVER, ip(server))
    return message(request, address, head + b"".join(options))


no_dnsmasq = "" if shutil.which("dnsmasq") else "dnsmasq is not installed"


@contextlib.contextmanager
def dnsmasq(where: Namespace, interface: str, folder: Path, *options: str) -> Iterator[None]:
    """Its leases are in ``folder``. Before it offers an address it looks whether that is in use, by ping."""
    command = [
        *("dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--user=root"),
        *(f"--interface={interface}", "--bind-interfaces", f"--dhcp-leasefile={folder}/leases"),
        *(f"--pid-file={folder}/pid", *options),
    ]
    with where.inside():
        daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()


class DhcpServer(Background):
    """``answer`` is asked in a thread of its own."""

    def __init__(
        self, where: Namespace, interface: str, answer: Callable[[Request], Sequence[bytes]]
    ) -> None:
        self.requests: list[Request] = []
        self._answer = answer
        udp = where.socket(socket.SOCK_DGRAM)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        udp.bind(("", 67))
        super().__init__(udp)

    def ready(self, sock: socket.socket) -> None:
        request = parse(sock.recv(2048))
        self.requests.append(request)
        to = TO_ALL if request.client == "0.0.0.0" else request.client
        for data in self._answer(request):
            sock.sendto(data, (to, 68))
