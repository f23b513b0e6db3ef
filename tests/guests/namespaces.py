"""Network namespaces that stand for a host, its guests and the world outside, with real packets between them.

::

    Namespace "outside" ── veth ── Namespace "host" (hostel runs here) ── hostel0 ── tap ══ Guest

A Guest is a namespace with a tap of its own; a thread carries frames between it and the tap that hostel
made, as a data plane does between that tap and a machine. The machine's own network is never touched.

Everything here changes the namespace of the *main thread* for a moment: sockets and processes stay in
the one they were made in. Use it from the main thread only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from hostel.abi import tun
from hostel.host.interface import Attachment, Interface

CLONE_NEWNET = 0x40000000
IP_PKTINFO = 8
OUTSIDE, HOST = "203.0.113.1", "203.0.113.2"

_libc = ctypes.CDLL(None, use_errno=True)


def leave_network() -> None:
    """This thread's network is a new one, without any interface that is up."""
    _checked(_libc.unshare(CLONE_NEWNET))


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def load_rules(text: str) -> None:
    """Into the nftables of the namespace that this is called in."""
    subprocess.run(["nft", "-f", "-"], input=text, check=True, text=True)


def missing() -> str:
    """What this host lacks for such tests; empty if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "no /dev/net/tun"
    return ""


class Namespace:
    """A network namespace, with its loopback up. A context manager."""

    def __init__(self) -> None:
        before = _current()
        leave_network()
        self.fd = _current()
        _enter(before)
        os.close(before)
        self.run("ip link set lo up")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What is made here is made in there."""
        before = _current()
        _enter(self.fd)
        try:
            yield
        finally:
            _enter(before)
            os.close(before)

    def run(self, *commands: str) -> str:
        with self.inside():
            return "".join(
                subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout
                for command in commands
            )

    def give(self, link: str, other: Namespace) -> None:
        """Move an interface of ours to another namespace, which ``ip`` finds by a process in it."""
        with other.inside():
            holder = subprocess.Popen(["sleep", "60"])
        try:
            self.run(f"ip link set {link} netns {holder.pid}")
        finally:
            holder.kill()
            holder.wait()

    def socket(self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        with self.inside():
            return socket.socket(family, kind)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Guest(Namespace):
    """Stands for a machine: it has what the machine's link says, at the other end of its tap."""

    def __init__(self, host: Namespace, attachment: Attachment, *, configure: bool = True) -> None:
        super().__init__()
        self.mac = attachment.interface.mac
        with host.inside():
            near = _connect(attachment.interface)
        with self.inside():
            far = Tap(open_tap("eth0"))
        self._stop = os.eventfd(0)
        self._pump = threading.Thread(target=_pump, args=(near, far, self._stop), daemon=True)
        self._pump.start()
        self.run(f"ip link set eth0 address {self.mac}", "ip link set eth0 up")
        link = attachment.link
        self.address = ""
        if link is not None and configure:
            self.address = link.addresses[0].partition("/")[0]
            self.run(
                f"ip link set eth0 mtu {link.mtu}", f"ip addr add {link.addresses[0]} dev eth0"
            )
            if link.gateway:
                self.run(f"ip route add default via {link.gateway}")

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._pump.join()
        os.close(self._stop)
        super().close()


class Background:
    """Serves sockets, which it owns, in a thread of its own. A context manager."""

    def __init__(self, *sockets: socket.socket) -> None:
        self._sockets = sockets
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def ready(self, sock: socket.socket) -> None:
        raise NotImplementedError

    def _serve(self) -> None:
        watched = {sock.fileno(): sock for sock in self._sockets}
        while True:
            ready, _, _ = select.select([*watched, self._stop], [], [])
            if self._stop in ready:
                return
            for fd in ready:
                self.ready(watched[fd])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for sock in self._sockets:
            sock.close()
        os.close(self._stop)


class Server(Background):
    """Answers at one port over TCP and UDP."""

    def __init__(self, where: Namespace, port: int, address: str) -> None:
        self.tcp, self.udp = where.socket(), where.socket(socket.SOCK_DGRAM)
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for sock in (self.tcp, self.udp):
            sock.bind((address, port))
        self.tcp.listen(64)
        super().__init__(self.tcp, self.udp)

    def answer_connection(self, connection: socket.socket, peer: str) -> None:
        raise NotImplementedError

    def answer_datagram(self) -> None:
        """There is one in ``udp``."""
        raise NotImplementedError

    def ready(self, sock: socket.socket) -> None:
        if sock is self.udp:
            self.answer_datagram()
            return
        connection, peer = self.tcp.accept()
        with connection:
            self.answer_connection(connection, peer[0])


class Echo(Server):
    """Tells each client the address it comes from."""

    def __init__(self, where: Namespace, port: int, address: str = "0.0.0.0") -> None:
        super().__init__(where, port, address)
        self.udp.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)  # to answer from where it was asked

    def answer_connection(self, connection: socket.socket, peer: str) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(1)
            connection.recv(1)
            connection.send(peer.encode())

    def answer_datagram(self) -> None:
        _, asked_at, _, peer = self.udp.recvmsg(2048, 64)
        with contextlib.suppress(OSError):
            self.udp.sendmsg([peer[0].encode()], asked_at, 0, peer)


def ask(where: Namespace, address: str, port: int, kind: str = "tcp", patience: float = 3) -> str:
    """Whom an ``Echo`` there took us for; "" if nothing comes back in time."""
    with where.socket(socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.settimeout(patience)
        try:
            sock.connect((address, port))
            sock.send(b"?")
            return sock.recv(100).decode()
        except OSError:
            return ""


def reached(where: Namespace, targets: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Which of these (address, port, protocol) answer; all asked at once, in half a second."""
    answers: dict[tuple[str, int, str], str] = {}

    def one(target: tuple[str, int, str], sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(0.5)
            sock.connect(target[:2])
            sock.send(b"?")
            answers[target] = sock.recv(100).decode()

    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    threads = [
        threading.Thread(target=one, args=(target, where.socket(kinds[target[2]])))
        for target in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [target for target in targets if target in answers]


@contextlib.contextmanager
def world() -> Iterator[tuple[Namespace, Namespace]]:
    """A host, which the main thread is in, and what is outside; the host forwards nothing as yet."""
    with Namespace() as host, Namespace() as outside, host.inside():
        host.run("ip link add eth0 type veth peer name out")
        host.give("out", outside)
        host.run(
            f"ip addr add {HOST}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {OUTSIDE}",
        )
        outside.run(
            f"ip addr add {OUTSIDE}/24 dev out",
            "ip link set out up",
            f"ip route add 10.0.0.0/8 via {HOST}",  # a neighbour that would use us as a router
        )
        yield host, outside


def open_tap(name: str, device: str = "/dev/net/tun") -> int:
    """Without vnet headers: the kernel then sums and segments what it gives us."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ.pack(name.encode(), tun.IFF_TAP | tun.IFF_NO_PI, b""))
    return fd


class Tap:
    """One end of a guest's wire: a tap or a macvtap, a frame a read."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def frames(self) -> list[bytes]:
        return [os.read(self.fd, 1 << 17)]

    def send(self, frame: bytes) -> None:
        os.write(self.fd, frame)

    def close(self) -> None:
        os.close(self.fd)


class Stream(Tap):
    """The other kind: a socket that carries each frame with its length before it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._received = b""
        super().__init__(self._socket.fileno())

    def frames(self) -> list[bytes]:
        data = self._socket.recv(1 << 17)
        if not data:
            raise OSError("the other end is closed")
        self._received += data
        found = []
        while len(self._received) >= 4:
            end = 4 + struct.unpack_from(">I", self._received)[0]
            if len(self._received) < end:
                break
            found.append(self._received[4:end])
            self._received = self._received[end:]
        return found

    def send(self, frame: bytes) -> None:
        self._socket.sendall(struct.pack(">I", len(frame)) + frame)

    def close(self) -> None:
        self._socket.close()


def _connect(interface: Interface) -> Tap:
    if interface.backend == "stream":
        return Stream(interface.target)
    if interface.backend == "macvtap":
        return Tap(open_tap("", interface.target))
    return Tap(open_tap(interface.target))


def _pump(one: Tap, other: Tap, stop: int) -> None:
    """Frames from each to the other, until told to stop or one has gone."""
    poll = select.poll()
    for fd in (one.fd, other.fd, stop):
        poll.register(fd, select.POLLIN)
    try:
        while True:
            for fd, _ in poll.poll():
                if fd == stop:
                    return
                here, there = (one, other) if fd == one.fd else (other, one)
                for frame in here.frames():
                    with contextlib.suppress(OSError):  # not up yet
                        there.send(frame)
    except OSError:
        return  # hostel has taken its side away
    finally:
        one.close()
        other.close()


def _current() -> int:
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(fd: int) -> None:
    _checked(_libc.setns(fd, CLONE_NEWNET))
