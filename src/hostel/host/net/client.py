"""The machine's side of a network: find its keeper or start it, and lease one NIC from it.

::

    .net.lock     held while a keeper is looked for or started, and while one decides to end
    .net-KEY/     of one network of one network namespace
        lock      held (flock) by the keeper as long as it lives; handed to it already held
        sock      where it listens; bound here, so that the first machine need not wait for it
        state     what there is to undo (``fabric``)
        log       what the keeper wrote to standard error

So a directory whose lock is free has no keeper: it is swept (its state undone), then used anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hostel import errors
from hostel.errors import HelperError, HostError, UserError
from hostel.host import runtime

from .state import State

PREFIX = ".net-"
LIMIT = 1 << 17
"""Bytes of one request or answer: a packet of a SOCK_SEQPACKET socket."""
PATIENCE = 60.0
"""Seconds a keeper may take to answer; it takes milliseconds, but a host may be busy."""
_START = Path(__file__).with_name("start.py")


class Lease:
    """A NIC on a network, as long as it is open. Asked for at once; ``answer`` waits."""

    def __init__(self, kind: str, target: str, request: dict[str, Any]) -> None:
        self._base = runtime.base()
        self._folder = self._base / f"{PREFIX}{kind}-{_word(target)}-{_namespace()}"
        self._network = (kind, target)
        self._request = _packed(request)
        self._socket: socket.socket | None = None
        self._starting = 0
        self._answer: dict[str, Any] | None = None
        self._ask()

    def answer(self) -> dict[str, Any]:
        """What the keeper made; or the error that it had."""
        if self._answer is None:
            try:
                self._answer = self._understood(self._receive() or self._ask_again())
            except BaseException:
                self.close()
                raise
        return self._answer

    def limit(self, limits: dict[str, Any]) -> None:
        """The kernel keeps these rates from now on (``rates``)."""
        self.answer()
        assert self._socket is not None
        with contextlib.suppress(OSError):  # a keeper that has ended does not answer either
            self._socket.send(msgspec.json.encode(limits))
        self._understood(self._receive())

    def close(self) -> None:
        """Give it back: the keeper sees to the rest. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._starting:  # it has forked long since
            os.waitpid(self._starting, 0)
            self._starting = 0

    def _ask(self) -> None:
        with _locked(self._base):
            self._socket = _connect(self._folder)
            if self._socket is None:
                self._socket, self._starting = _start(self._folder, self._network)
            self._socket.settimeout(PATIENCE)
            with contextlib.suppress(OSError):  # a keeper that has ended does not answer either
                self._socket.send(self._request)

    def _ask_again(self) -> bytes:
        """A keeper that is being killed may take a connection and end: its socket lives as long as the
        last of its threads. Whoever is asked next is another one."""
        self.close()
        self._ask()
        return self._receive()

    def _receive(self) -> bytes:
        """Nothing, if the keeper ended."""
        assert self._socket is not None
        try:
            return self._socket.recv(LIMIT)
        except TimeoutError:
            raise HelperError(f"the network's keeper said nothing in {PATIENCE:g} s") from None
        except OSError:
            return b""

    def _understood(self, data: bytes) -> dict[str, Any]:
        if not data:
            raise HelperError(f"the network's keeper failed: {_last_words(self._folder / 'log')}")
        answer: dict[str, Any] = msgspec.json.decode(data)
        if "error" in answer:
            kind, message, cost, cure = answer["error"]
            raise getattr(errors, kind, HostError)(message, cost=cost, cure=cure)
        return answer


def _packed(request: dict[str, Any]) -> bytes:
    """As one packet."""
    data = msgspec.json.encode(request)
    if len(data) > LIMIT:
        raise UserError(
            f"{len(request['publish'])} published ports and {len(request['allow'] or ())} allowed "
            "destinations are too many for one machine",
            cure="allow prefixes, and publish fewer ports",
        )
    return data


def sweep() -> list[str]:
    """Undo networks whose keeper was killed. Networks that machines still use stay as they are."""
    parent = runtime.base()
    if not any(parent.glob(f"{PREFIX}*")):
        return []
    with _locked(parent):
        return [folder.name for folder in sorted(parent.glob(f"{PREFIX}*")) if _sweep_one(folder)]


def _connect(folder: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(folder) as path:
            sock.connect(f"{path}/sock")
    except OSError:
        sock.close()
        return None
    return sock


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A name of the folder that leaves room in a socket's address (108 bytes), however long it is."""
    fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _start(folder: Path, network: tuple[str, str]) -> tuple[socket.socket, int]:
    """A new keeper, which will find our connection waiting, and its pid until it forks.

    The caller holds the lock. A network whose keeper was killed and whose machines still run keeps its
    bridge; its record is put aside, for a later sweep.
    """
    _sweep_one(folder)
    if folder.exists():
        kind_and_target, _, namespace = folder.name.rpartition("-")
        folder.rename(folder.with_name(f"{kind_and_target}~{os.urandom(3).hex()}-{namespace}"))
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            log = os.open(
                folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
            )
            stack.callback(os.close, log)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            (folder / "sock").unlink(missing_ok=True)
            with _short(folder) as path:
                listener.bind(f"{path}/sock")
            listener.listen(64)
            sock = _connect(folder)  # before it is there: if we are killed, its first lease breaks
            assert sock is not None
            try:
                pid = _spawn((str(folder), *network), (listener.fileno(), lock), log)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise HostError(
                f"cannot start a network's keeper in {folder}: {error.strerror}",
                cost="no network of hostel's own",
                cure="set XDG_RUNTIME_DIR to a directory of yours with some room, or use --net user",
            ) from None
    return sock, pid


def _spawn(arguments: tuple[str, ...], fds: tuple[int, ...], log: int) -> int:
    """It forks once more and is nobody's child (``start.py``): it may outlive us."""
    argv = [sys.executable, "-IS", str(_START), *map(str, fds), *arguments]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 2),
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),
    ]
    return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True)


def _sweep_one(folder: Path) -> bool:
    """Clear a directory without a keeper. The caller holds the lock."""
    from shutil import rmtree

    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        rmtree(folder, ignore_errors=True)
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.name.endswith(f"-{_namespace()}"):
            left = State.left(folder)
            if left.in_use():
                return False
            left.undo()
        rmtree(folder, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _namespace() -> int:
    """The network namespace's number: a bridge is to be found in its own only."""
    return os.stat("/proc/self/ns/net").st_ino


def _word(target: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in target) or "default"


@contextlib.contextmanager
def _locked(parent: Path) -> Iterator[None]:
    fd = os.open(parent / ".net.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
