"""The agent as the host sees it: ``AgentClient`` over one connected socket.

Thread-safe; every call may come from any thread. Errors: ``AgentError`` (the agent said no, or broke its
protocol), ``MachineStopped`` (the stream ended), ``MachineTimeout`` (the caller's deadline).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from hostel.errors import AgentError, HostelError, MachineStopped, MachineTimeout, SpecError

from .connection import Connection, Explain
from .process import ExitStatus, GuestProcess, Stream
from .protocol import KEEP, KEEP_TIME, VERSION, Buffer, Channel, ExecFlag, How, Reader, Type, Writer
from .steps import Step, encode_steps

__all__ = ["AgentClient", "ExitStatus", "GuestProcess", "Hello", "Ids", "Tty"]


class Hello(msgspec.Struct, frozen=True):
    """The agent's first word: what the guest is."""

    version: int
    cpus: int
    memory: int
    started: float
    """Seconds from the guest's power-on to the agent's first instruction …"""
    ready: float
    """… and to this message."""
    release: str
    machine: str


class Ids(msgspec.Struct, frozen=True):
    """A user by numbers, as they are."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = Ids(0, 0)

Word = str | os.PathLike[str]
"""Of a command: text, or what Python takes for a path."""


class Tty(msgspec.Struct, frozen=True):
    rows: int = 24
    cols: int = 80


class AgentClient:
    """One guest's agent."""

    def __init__(self, sock: socket.socket, explain: Explain | None = None) -> None:
        self._changed = threading.Condition()
        self._hello: Hello | None = None
        self._pongs: set[bytes] = set()
        self._error: HostelError | None = None
        self._connection = Connection(sock, self, explain)
        self._connection.start()
        with contextlib.suppress(MachineStopped):  # the first call says so
            self._connection.send(Type.HELLO, 0, Writer().u32(VERSION).data)

    # Stream 0, called by the reader thread.

    def frame(self, type: Type, channel: int, payload: bytearray) -> None:
        with self._changed:
            if type is Type.HELLO and self._hello is None:
                self._hello = _read_hello(payload)
            elif type is Type.PONG and len(self._pongs) < 64:
                self._pongs.add(bytes(payload))
            else:
                raise AgentError(f"the agent broke its protocol: {type.name} where it has no place")
            self._changed.notify_all()

    def failed(self, error: HostelError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    # The public side.

    def wait_hello(self, timeout: float | None = None) -> Hello:
        """Until the guest's agent runs."""
        with self._changed:
            self._wait_for(lambda: self._hello, "the guest's agent has not answered", timeout)
            assert self._hello is not None
            return self._hello

    def ping(self, timeout: float = 10.0) -> float:
        """Seconds of a round trip."""
        token, start = f"{time.monotonic_ns()}".encode(), time.monotonic()
        self._connection.send(Type.PING, 0, token)
        with self._changed:
            self._wait_for(
                lambda: token in self._pongs, "the guest's agent does not answer", timeout
            )
            self._pongs.discard(token)
        return time.monotonic() - start

    def setup(self, steps: Sequence[Step], timeout: float | None = 60.0) -> str:
        """Mounts, the root, the host name …, in order; what the steps have to say (``Dhcp``).
        ``AgentError`` names the step that failed."""
        return self.request(Type.SETUP, encode_steps(steps)).finished(timeout).said

    def spawn(
        self,
        argv: Sequence[Word],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Word = "/",
        user: str | Ids = ROOT,
        tty: Tty | None = None,
        stdin: bool | int = True,
        stdout: int | None = None,
        stderr: int | None = None,
        login_env: bool = False,
    ) -> GuestProcess:
        """Starts a command. ``user`` as text (``name``, ``uid``, ``user:group``) is looked up in the
        guest. ``stdin`` is True (``write``), False (``/dev/null``) or a file descriptor of the host;
        ``stdout`` and ``stderr`` are file descriptors that get the bytes, or None (``read``).
        ``login_env`` adds HOME, USER, LOGNAME and SHELL where ``env`` has none."""
        words, given = check_argv(argv), check_env(env)
        flags = (ExecFlag.TTY if tty else 0) | (ExecFlag.LOGIN_ENV if login_env else 0)
        flags |= 0 if stdin is False else ExecFlag.STDIN
        size = tty or Tty(0, 0)
        variables = {**({"TERM": "linux"} if tty else {}), **given}
        message = Writer().u32(flags, size.rows, size.cols)
        _write_user(message, user)
        message.string(os.fsdecode(cwd)).strings(words)
        message.strings([f"{name}={value}" for name, value in variables.items()])
        process = GuestProcess(self._connection, has_input=stdin is not False or tty is not None)
        self._connection.send(Type.EXEC, process.id, message.data)
        _attach(process, stdin, stdout, stderr)
        return process

    def request(self, type: Type, payload: Buffer) -> Stream:
        """A stream that is not a command: SETUP, PACK or UNPACK."""
        stream = Stream(self._connection)
        self._connection.send(type, stream.id, payload)
        return stream

    def put(
        self,
        path: str,
        data: bytes,
        *,
        mode: int = 0o644,
        owner: Ids | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """Writes one file in the guest. Trees: ``files.copy_in``."""
        from . import files

        ids, time_ns = owner or Ids(KEEP, KEEP), KEEP_TIME if mtime_ns is None else mtime_ns
        files.put(self, path, data, mode=mode, uid=ids.uid, gid=ids.gid, mtime_ns=time_ns)

    def get(self, path: str) -> bytes:
        """Reads one file of the guest, up to 1 GiB. Larger ones and trees: ``files.copy_out``."""
        from . import files

        return files.get(self, path)

    def shutdown(self, how: How = How.POWEROFF) -> None:
        """Kills what runs, writes back and powers off or restarts. Returns at once; the machine's end
        is the engine's to see."""
        self._connection.send(Type.SHUTDOWN, 0, Writer().u32(how).data)

    def close(self) -> None:
        """Ends the connection, not the guest."""
        self._connection.close()

    def _wait_for(self, ready: Callable[[], object], what: str, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            if self._error:
                raise self._error
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise MachineTimeout(f"{what} within {timeout:g} s")
            self._changed.wait(left)


def check_argv(argv: Sequence[Word]) -> list[str]:
    """Its words; SpecError if it is no argument vector."""
    if isinstance(argv, str | bytes):  # a sequence too, of one-letter words
        raise SpecError("argv must be a list of strings, not a string")
    try:
        words = [os.fsdecode(word) for word in argv]
    except TypeError as error:
        raise SpecError(f"argv must be a list of strings: {error}") from None
    if not words or not words[0]:
        raise SpecError("no command was given")
    _check_nul(words)
    return words


def check_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """A copy; SpecError for what are no variables."""
    given = {} if env is None else env
    if not isinstance(given, Mapping):
        raise SpecError(f"env must map names to values, as a dict does, not be a {_kind(env)}")
    for name, value in given.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise SpecError(f"env must map strings to strings, not {name!r} to {value!r}")
        if not name or "=" in name:
            raise SpecError(f"not the name of a variable: {name!r}")
    _check_nul([*given, *given.values()])
    return dict(given)


def _check_nul(words: Sequence[str]) -> None:
    if wrong := next((word for word in words if "\0" in word), ""):
        raise SpecError(f"a NUL byte cannot be passed to the guest: {wrong!r}")


def check_input(data: Buffer | None) -> memoryview:
    """Its bytes; SpecError if it has none."""
    try:
        return memoryview(data or b"").cast("B")
    except TypeError:
        raise SpecError(f"input must be bytes, not {_kind(data)}", cure="encode it") from None


def _kind(value: object) -> str:
    return type(value).__name__


def _read_hello(payload: bytearray) -> Hello:
    fields = Reader(payload)
    version = fields.u32()
    if version != VERSION:
        raise AgentError(
            f"the guest's agent speaks version {version} of the protocol, not {VERSION}"
        )
    hello = Hello(
        version,
        fields.u32(),
        fields.u64(),
        fields.u64() / 1e9,
        fields.u64() / 1e9,
        fields.string(),
        fields.string(),
    )
    fields.end()
    return hello


def _write_user(message: Writer, user: str | Ids) -> None:
    if isinstance(user, str):
        message.string(user).u32(0, 0, 0)
    else:
        message.string("").u32(user.uid, user.gid, len(user.groups), *user.groups)


def _attach(
    process: GuestProcess, stdin: bool | int, stdout: int | None, stderr: int | None
) -> None:
    if stdout is not None:
        process.pump_output(Channel.STDOUT, stdout)
    if stderr is not None:
        process.pump_output(Channel.STDERR, stderr)
    if not isinstance(stdin, bool):
        process.pump_input(stdin)
