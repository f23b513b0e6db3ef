"""A command in the guest, as the host holds it.

::

    write() / stdin fd ──DATA──▶ guest      while the guest's window has room; CREDIT refills it
    read()  / stdout, stderr fd ◀──DATA──   queued up to the window; consumed bytes go back as CREDIT

One lock and one condition per process. The reader thread only queues; a thread per given file
descriptor moves the bytes on, so that one slow consumer holds up nobody else.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from hostel.errors import AgentError, HostelError, HostError, MachineStopped, MachineTimeout

from .connection import Connection
from .protocol import MAX_PAYLOAD, WINDOW, Buffer, Channel, ExitKind, Reader, Type, Writer

StreamName = Literal["stdout", "stderr"]

_NAMES: dict[int, StreamName] = {Channel.STDOUT: "stdout", Channel.STDERR: "stderr"}
_CREDIT_STEP = WINDOW // 8
_MERGE = 4096
"""Pieces smaller than this are joined in the queue: a byte must not cost an object."""


class ExitStatus(msgspec.Struct, frozen=True):
    """How a command ended: with a code, by a signal, or never begun (``error``)."""

    code: int | None = None
    signal: int | None = None
    error: str = ""
    said: str = ""
    """Of a SETUP: what its steps have found out."""

    @property
    def returncode(self) -> int:
        """As a shell has it: 128 + n for a signal, 126 and 127 for what cannot be executed."""
        return 128 + self.signal if self.signal is not None else self.code or 0


class Output:
    """One of a command's two output channels: a queue that the window bounds."""

    def __init__(self) -> None:
        self.pieces: deque[bytearray] = deque()
        self.size = 0
        self.owed = 0
        self.ended = False

    def add(self, data: bytearray) -> None:
        if self.size + self.owed + len(data) > WINDOW or self.ended:
            raise AgentError("the agent broke its protocol: more output than its window allows")
        self.size += len(data)
        if self.pieces and len(self.pieces[-1]) < _MERGE:
            self.pieces[-1] += data
        else:
            self.pieces.append(data)

    def take(self) -> bytearray:
        piece = self.pieces.popleft()
        self.size -= len(piece)
        self.owed += len(piece)
        return piece

    def credit(self) -> int:
        """What to give back now; small amounts wait."""
        if self.owed < _CREDIT_STEP:
            return 0
        owed, self.owed = self.owed, 0
        return owed


class Stream:
    """What commands and file transfers have in common: a stream of the connection with its channels."""

    def __init__(self, connection: Connection, has_input: bool = True) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._outputs = {Channel.STDOUT: Output(), Channel.STDERR: Output()}
        self._window = WINDOW
        self._input_open = has_input
        self._input_wake = -1
        self._status: ExitStatus | None = None
        self._error: HostelError | None = None
        self.id = connection.open(self)

    # Called by the reader thread.

    def frame(self, type: Type, channel: int, payload: bytearray) -> None:
        with self._changed:
            if type is Type.EXIT:
                self._exit(payload)
            elif type is Type.DATA:
                self._output(channel).add(payload)
            elif type is Type.EOF and channel == Channel.STDIN:
                self._end_input()
            elif type is Type.EOF:
                self._output(channel).ended = True
                self._forget()
            elif type is Type.CREDIT and channel == Channel.STDIN:
                self._refill(payload)
            else:
                raise AgentError(f"the agent broke its protocol: {type.name} on a command's stream")
            self._changed.notify_all()

    def failed(self, error: HostelError) -> None:
        with self._changed:
            self._error = error
            self._end_input()
            self._changed.notify_all()

    def _end_input(self) -> None:
        self._input_open = False
        if self._input_wake >= 0:
            os.eventfd_write(self._input_wake, 1)

    def _output(self, channel: int) -> Output:
        if channel not in _NAMES:
            raise AgentError("the agent broke its protocol: output on an unknown channel")
        return self._outputs[Channel(channel)]

    def _refill(self, payload: bytearray) -> None:
        self._window += Reader(payload).u32()
        if self._window > WINDOW:
            raise AgentError("the agent broke its protocol: more credit than was used")

    def _exit(self, payload: bytearray) -> None:
        self._end_input()
        try:
            self._status = read_exit(payload)
        except AgentError as error:
            self._error = error
        self._forget()

    def _forget(self) -> None:
        """Once nothing more can come."""
        if (self._status or self._error) and all(o.ended for o in self._outputs.values()):
            self._connection.forget(self.id)

    # Called by anyone else.

    def _wait(self, ready: Callable[[], bool], deadline: float | None = None) -> None:
        """With the lock held: until ``ready``, or the connection's error, or the deadline's."""
        while not ready():
            if self._error:
                raise self._error
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise MachineTimeout("the command has not ended in time")
            self._changed.wait(left)

    def write(self, data: Buffer) -> None:
        """Bytes for standard input. Blocks while the guest's window is full."""
        view = memoryview(data).cast("B")
        while view:
            with self._changed:
                self._wait(lambda: self._window > 0 or not self._input_open)
                if not self._input_open:
                    raise self._error or AgentError(
                        "the command no longer reads its standard input"
                    )
                size = min(len(view), self._window, MAX_PAYLOAD)
                self._window -= size
            self._connection.send(Type.DATA, self.id, view[:size], Channel.STDIN, wait=True)
            view = view[size:]

    def close_stdin(self) -> None:
        """End of file for the command's standard input. Again is harmless."""
        with self._changed:
            was_open, self._input_open = self._input_open, False
        if was_open:
            self._connection.send(Type.EOF, self.id, channel=Channel.STDIN)

    def take(self, channels: tuple[Channel, ...]) -> tuple[Channel, bytearray] | None:
        """The next bytes of one of these channels; None when all have ended."""
        outputs = [(channel, self._outputs[channel]) for channel in channels]
        with self._changed:
            self._wait(
                lambda: any(o.pieces for _, o in outputs) or all(o.ended for _, o in outputs)
            )
            found = next((pair for pair in outputs if pair[1].pieces), None)
            if found is None:
                return None
            channel, output = found
            piece, credit = output.take(), output.credit()
        if credit and not output.ended:
            self._send_quietly(Type.CREDIT, Writer().u32(credit).data, channel)
        return channel, piece

    def _send_quietly(self, type: Type, payload: bytes | bytearray, channel: int = 0) -> None:
        """For what needs no answer: if the machine is gone, the next wait says so."""
        with contextlib.suppress(MachineStopped, AgentError):
            self._connection.send(type, self.id, payload, channel)

    def stop_reading(self, channel: Channel) -> None:
        """Nobody wants this output any more: the command gets SIGPIPE, as on a broken pipe."""
        self._send_quietly(Type.EOF, b"", channel)

    def finished(self, timeout: float | None = None) -> ExitStatus:
        """Until EXIT. ``AgentError`` if the agent could not do what was asked."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._wait(lambda: self._status is not None, deadline)
            assert self._status is not None
            return self._status


class GuestProcess(Stream):
    """A running command; made by ``AgentClient.spawn``."""

    def __init__(self, connection: Connection, has_input: bool = True) -> None:
        super().__init__(connection, has_input)
        self._pumps: list[threading.Thread] = []
        self._unwritten: HostError | None = None
        self._unpumped: tuple[Channel, ...] = (Channel.STDOUT, Channel.STDERR)

    def read(self) -> tuple[StreamName, bytes] | None:
        """The next bytes of output; None at the end. Unread output stops the command when its window
        (512 KiB each) is full."""
        taken = self.take(self._unpumped)
        return None if taken is None else (_NAMES[taken[0]], bytes(taken[1]))

    def resize(self, rows: int, cols: int) -> None:
        """The terminal's new size."""
        self._send_quietly(Type.RESIZE, Writer().u32(rows, cols).data)

    def signal(self, number: int) -> None:
        """To the command's process group."""
        self._send_quietly(Type.SIGNAL, Writer().u32(number).data)

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Until the command has ended and its output is in the file descriptors it was given.
        ``HostError`` if one of them did not take it: a full disk, say."""
        deadline = None if timeout is None else time.monotonic() + timeout
        status = self.finished(timeout)
        for pump in self._pumps:
            pump.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if pump.is_alive():
                raise MachineTimeout("the command's output is not being read")
        if self._unwritten:
            raise self._unwritten
        return status

    def communicate(
        self, data: Buffer = b"", timeout: float | None = None
    ) -> tuple[bytes, bytes, ExitStatus]:
        """Feeds standard input, collects both outputs, waits."""
        collected = {"stdout": bytearray(), "stderr": bytearray()}
        feeder = threading.Thread(target=self._feed, args=(data,), daemon=True)
        feeder.start()
        collector = threading.Thread(target=self._collect, args=(collected,), daemon=True)
        collector.start()
        self._pumps.append(collector)
        status = self.wait(timeout)
        return bytes(collected["stdout"]), bytes(collected["stderr"]), status

    def _feed(self, data: Buffer) -> None:
        with contextlib.suppress(HostelError):  # wait() reports it
            self.write(data)
            self.close_stdin()

    def _collect(self, collected: dict[str, bytearray]) -> None:
        with contextlib.suppress(HostelError):
            while (piece := self.read()) is not None:
                collected[piece[0]] += piece[1]

    # File descriptors instead of read() and write().

    def pump_output(self, channel: Channel, fd: int) -> None:
        """Moves a channel to a file descriptor of the host, from now on."""
        self._unpumped = tuple(c for c in self._unpumped if c != channel)
        self._start_pump(lambda: self._pump_output(channel, fd), waited_for=True)

    def pump_input(self, fd: int, watch: Callable[[bytes], None] | None = None) -> None:
        """Moves a file descriptor of the host to standard input, its end too. ``watch`` sees the bytes
        first."""
        self._start_pump(lambda: self._pump_input(fd, watch), waited_for=False)

    def _start_pump(self, work: Callable[[], None], *, waited_for: bool) -> None:
        thread = threading.Thread(target=work, name="hostel-pump", daemon=True)
        thread.start()
        if waited_for:
            self._pumps.append(thread)

    def _pump_output(self, channel: Channel, fd: int) -> None:
        with contextlib.suppress(HostelError):
            while (taken := self.take((channel,))) is not None:
                try:
                    _write_all(fd, taken[1])
                except OSError as error:
                    self._lost(channel, error)
                    self.stop_reading(channel)
                    break
            while self.take((channel,)) is not None:
                pass  # what was under way when the reader left

    def _lost(self, channel: Channel, error: OSError) -> None:
        """A reader that leaves wants no more, and nobody needs to hear of it; all else loses output."""
        if not isinstance(error, BrokenPipeError):
            name = "standard error" if channel is Channel.STDERR else "standard output"
            self._unwritten = HostError(f"cannot write to {name}: {error.strerror}")
            self._unwritten.__cause__ = error

    def _pump_input(self, fd: int, watch: Callable[[bytes], None] | None) -> None:
        """``_input_wake`` ends the wait for a terminal that stays silent after the command's end."""
        with self._changed:
            self._input_wake = wake = os.eventfd(0 if self._input_open else 1, os.EFD_CLOEXEC)
        try:
            with contextlib.suppress(HostelError):
                while _wait_readable(fd, wake) and (data := _read_some(fd)):
                    if watch:
                        watch(data)
                    self.write(data)
                self.close_stdin()
        finally:
            with self._changed:
                self._input_wake = -1
            os.close(wake)


def read_exit(payload: bytearray) -> ExitStatus:
    """EXIT's fields. A command that cannot be executed has an exit code by convention; all else that
    fails is an ``AgentError``."""
    fields = Reader(payload)
    kind, value, step, text = fields.u32(), fields.u32(), fields.string(), fields.string()
    fields.end()
    if kind == ExitKind.CODE:
        return ExitStatus(code=value & 0xFF, said=text)
    if kind == ExitKind.SIGNAL:
        return ExitStatus(signal=value & 0x7F)
    if kind == ExitKind.FAILED and step == "exec":
        return ExitStatus(code=127 if value == _ENOENT else 126, error=text)
    raise AgentError(f"{step}: {text}")


_ENOENT = 2
"""The guest's number, which is Linux's on every architecture."""


def _poll(*wanted: tuple[int, int]) -> dict[int, int]:
    """Which of these descriptors are ready; waits for the first."""
    poll = select.poll()
    for fd, events in wanted:
        poll.register(fd, events)
    return dict(poll.poll())


def _wait_readable(fd: int, wake: int) -> bool:
    return wake not in _poll((fd, select.POLLIN), (wake, select.POLLIN))


def _write_all(fd: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            _poll((fd, select.POLLOUT))


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, MAX_PAYLOAD)
    except BlockingIOError:
        _poll((fd, select.POLLIN))
        return _read_some(fd)
    except OSError:
        return b""  # a terminal that is gone
