"""The host's end of a machine's sockets: to the guest's ports, and from it.

::

    runtime directory of the machine     who serves                 a connection to the guest
      vsock.cid   the guest's address    the kernel                 AF_VSOCK, to that address
      vsock.sock                         hostel                     Unix, and "CONNECT PORT" first
      vsock.sock_PORT                    whoever listens there      Unix, as it is

Any process of the same user may use it; what is here is found by the machine's directory alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pathlib import Path
from typing import Any, Literal

from hostel.errors import GuestError, HostError, UserError

from .runtime import SOCKET_PATH_LIMIT

VHOST = "/dev/vhost-vsock"
FIRST_CID = 3
"""The addresses below are reserved (virtio 1.2 §5.10.4)."""
PORTS = 1 << 32
LONGEST_SUFFIX = len("_4294967295")
FILES = 1 << 14
BACKLOG = 4096
"""A guest is refused, not kept waiting, once so many of its connections have not been accepted."""
PATIENCE = 10.0
"""Seconds that a connection may take. A guest that is there answers at once."""


def choose(wanted: Literal["auto", "vhost", "python"]) -> tuple[Literal["vhost", "python"], str]:
    """Who serves, and why, for a person. A plane that was named is taken or refused."""
    if wanted == "python":
        return "python", "asked for"
    try:
        os.close(os.open(VHOST, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if wanted == "auto":
            return "python", f"{VHOST}: {error.strerror}"
        raise HostError(
            f"{VHOST}: {error.strerror}",
            cost="the kernel cannot serve the machine's sockets",
            cure="modprobe vhost_vsock (as root), or take the plane python",
        ) from None
    return "vhost", f"{VHOST} is there"


def main_path(directory: Path) -> Path:
    """Where hostel's own plane listens; checked to leave room for a port behind it."""
    path = directory / "vsock.sock"
    if len(os.fsencode(path)) + LONGEST_SUFFIX > SOCKET_PATH_LIMIT:
        raise HostError(
            f"{path}_PORT is too long for a socket ({SOCKET_PATH_LIMIT} bytes)",
            cure="give the machine a shorter name, or set a shorter XDG_RUNTIME_DIR",
        )
    return path


def raise_file_limit() -> None:
    """Hostel's own plane has a descriptor for each connection; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def publish_cid(directory: Path, cid: int) -> None:
    """Tell who looks into the directory that the kernel serves, and which address."""
    (directory / "vsock.cid").write_text(f"{cid}\n")


def connect(directory: Path, port: int, timeout: float = PATIENCE) -> socket.socket:
    """A connection to the guest's ``port``, blocking. ``GuestError``: nobody listens there."""
    check_port(port)
    cid = _cid(directory)
    try:
        if cid is not None:
            sock = _connect_vsock(cid, port, timeout)
        else:
            sock = _connect_unix(main_path(directory), port, timeout)
    except FileNotFoundError:
        raise _no_device() from None
    except OSError as error:
        raise GuestError(
            f"no connection to vsock port {port} of the guest: {error.strerror or error}",
            cure="let a program of the guest listen there",
        ) from None
    sock.settimeout(None)
    return sock


def listen(directory: Path, port: int) -> Listener:
    """For the guest's connections to ``port`` of the host (CID 2)."""
    check_port(port)
    cid = _cid(directory)
    if cid is None and not main_path(directory).exists():
        raise _no_device()
    listener = Listener(socket.AF_UNIX if cid is None else socket.AF_VSOCK, cid)
    try:
        if cid is None:
            listener.bind_unix(f"{main_path(directory)}_{port}")
        else:
            listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen on vsock port {port}: {error.strerror or error}",
            cure="choose another port",
        ) from None
    return listener


class Listener(socket.socket):
    """A listening socket. The kernel's vsock has one set of ports for all guests of the host: here
    only one machine's connections are accepted, and the others' are closed."""

    def __init__(self, family: int, cid: int | None) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._only_cid = cid
        self._path = ""

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            sock, address = super().accept()
            if self._only_cid is None or address[0] == self._only_cid:
                return sock, address
            sock.close()

    def bind_unix(self, path: str) -> None:
        """A path that nobody listens at any more is taken over."""
        if os.path.exists(path) and not _is_alive(path):
            os.unlink(path)
        self.bind(path)
        self._path = path

    def close(self) -> None:
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._path = ""
        super().close()


def check_port(port: int) -> None:
    """All ones is no port: it asks for any (vm_sockets.h, VMADDR_PORT_ANY)."""
    if not 0 <= port < PORTS - 1:
        raise UserError(f"a vsock port is 0 to {PORTS - 2}, not {port}")


def _no_device() -> UserError:
    return UserError("the machine has no vsock", cure="start it with --vsock (vsock='auto')")


def _cid(directory: Path) -> int | None:
    try:
        return int((directory / "vsock.cid").read_text())
    except FileNotFoundError:
        return None


def _connect_vsock(cid: int, port: int, timeout: float) -> socket.socket:
    return _connected(socket.AF_VSOCK, (cid, port), timeout)


def _connect_unix(path: Path, port: int, timeout: float) -> socket.socket:
    sock = _connected(socket.AF_UNIX, str(path), timeout)
    try:
        sock.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):  # not a byte more: the rest is the stream's
            part = sock.recv(1)
            if not part:
                raise ConnectionRefusedError("refused")
            answer += part
    except OSError:
        sock.close()
        raise
    return sock


def _connected(family: int, address: Any, timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
