"""Names for the guests of one network: machines by our own leases, all else by the host's resolvers.

Our own, and not dnsmasq: what may be resolved depends on which guest asks (``rules`` has checked that
its address is its own), an allowed name opens the way to its addresses before the answer leaves, and
nothing more has to be installed or started. It forwards messages as they are; the cache is the host's.

::

    query ─► whose?  ─► a machine's name ──────────────────────────────► our answer
                     ─► not to be resolved by this guest ──────────────► NXDOMAIN
                     ─► all else ─► the host's resolver ─► admit ──────► its answer
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from hostel.errors import HostError
from hostel.vmm.loop import EventLoop

from . import dns
from .exchange import Exchange, TcpClient
from .rules import Guest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .fabric import Network

    Reply = Callable[[bytes], None]

MACHINE_TTL = 1
LEAST_TIME, MOST_TIME = 300, 86400
"""Seconds that an address of an allowed name stays reachable: programs resolve once and connect later."""
MAX_PENDING, MAX_PENDING_IN_ALL = 64, 256
"""Of one guest and of all, questions and TCP connections together; each has a file descriptor."""
MAX_ADDRESSES = 64
"""Of one allowed name at a time: whoever answers for it could think of many, and each is work."""


class Resolver:
    """UDP and TCP on one port of the bridge's address; rules lead port 53 there: that may be taken."""

    def __init__(self, address: str, network: Network, loop: EventLoop) -> None:
        self._network, self.loop = network, loop
        self._udp, self._tcp = _sockets(address)
        self.port = int(self._udp.getsockname()[1])
        self._pending: dict[str, int] = {}
        loop.add(self._udp.fileno(), self._datagram)
        loop.add(self._tcp.fileno(), self._connection)

    def _datagram(self) -> None:
        try:
            message, sender = self._udp.recvfrom(4096)
        except OSError:  # what was there had a wrong checksum
            return

        def reply(answer: bytes) -> None:
            try:
                self._udp.sendto(answer, sender)
            except OSError:
                return  # the guest has gone, or its queue is full: it asks again

        if self.enter(sender[0]):
            self.ask(sender[0], message, reply, tcp=False)

    def _connection(self) -> None:
        try:
            sock, sender = self._tcp.accept()
        except OSError:
            return
        if self.enter(sender[0]):
            TcpClient(self, sock, sender[0])
        else:
            sock.close()

    def enter(self, sender: str) -> bool:
        """Whether this sender may have one more thing pending; ``leave`` when it is done."""
        if self._network.guest_at(sender) is None or self._pending.get(sender, 0) >= MAX_PENDING:
            return False
        if sum(self._pending.values()) >= MAX_PENDING_IN_ALL:
            return False
        self._pending[sender] = self._pending.get(sender, 0) + 1
        return True

    def leave(self, sender: str) -> None:
        self._pending[sender] -= 1
        if not self._pending[sender]:
            del self._pending[sender]

    def ask(self, sender: str, message: bytes, reply: Reply, *, tcp: bool) -> None:
        """Answer one message of a guest, now or later; then it has left."""
        guest = self._network.guest_at(sender)
        try:
            question = dns.Question(message)
        except ValueError:
            guest = None
        if guest is None or not question.is_query:
            self.leave(sender)
            return
        own = self._own_answer(guest, question)
        if own is not None:
            reply(own)
            self.leave(sender)
            return

        def done(answer: bytes | None) -> None:
            self.leave(sender)
            reply(self._checked(guest, question, answer))

        Exchange(self.loop, message, done, tcp=tcp).start()

    def _own_answer(self, guest: Guest, question: dns.Question) -> bytes | None:
        """The answer if it is ours to give; None: ask the host's resolver."""
        name = question.name
        allowed = guest.allow is None or name in guest.names
        machines = self._network.machine(name)
        if machines:
            return self._machine_answer(guest, question, machines)
        ours = name == "hostel" or name.endswith(".hostel")
        if ours or not allowed or not self._network.reaches_world():
            return question.answer(dns.NXDOMAIN, [])
        if guest.allow is not None and question.type != dns.A:
            return question.answer(dns.NOERROR, [])  # it can only use addresses, and only IPv4 ones
        return None

    def _machine_answer(self, guest: Guest, question: dns.Question, found: list[str]) -> bytes:
        if question.type != dns.A:
            return question.answer(dns.NOERROR, [])
        if guest.allow is not None and not guest.names_machine(question.name):
            return question.answer(dns.NXDOMAIN, [])
        for name in guest.names_machine(question.name):
            self._network.admit(guest, name, found, LEAST_TIME)
        return question.answer(dns.NOERROR, found, MACHINE_TTL)

    def _checked(self, guest: Guest, question: dns.Question, answer: bytes | None) -> bytes:
        """The host's answer, once the way to what it says is open."""
        failure = question.answer(dns.SERVFAIL, [])
        if answer is None or guest.allow is None:
            return answer or failure
        try:
            found, ttl = dns.addresses(answer)
            usable = [a for a in dict.fromkeys(found) if outside(a) and not self._network.has(a)]
            if usable and self._network.guest_at(guest.address) is guest:
                seconds = min(max(ttl, LEAST_TIME), MOST_TIME)
                self._network.admit(guest, question.name, usable, seconds)
        except (ValueError, HostError):
            return failure
        return answer


def outside(address: str) -> bool:
    """Whether a name may lead there: not to this host, nor to the link, whoever answers for the name
    (and not to other machines: ``Network.has``).

    A name is somebody else's to point anywhere: at services of this host, or at a cloud's metadata.
    """
    first, second = (int(part) for part in address.split(".")[:2])
    if first in (0, 127) or first >= 224 or (first, second) == (169, 254):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 9))  # sends nothing; and bind tells nothing (ip_nonlocal_bind)
        except PermissionError:
            return False  # a broadcast
        except OSError:
            return True  # no way there, as yet
        return bool(sock.getsockname()[0] != address)  # the host reaches itself as itself


def _sockets(address: str) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on the same free port."""
    for _ in range(20):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            udp.bind((address, 0))
            tcp.bind(udp.getsockname())
            tcp.listen(16)
            return udp, tcp
        except OSError as error:
            problem = error.strerror
            udp.close()
            tcp.close()
    raise HostError(f"no port for names at {address}: {problem}")
