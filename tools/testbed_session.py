"""The conversation with an emulated server: boot, hand over the command, carry its streams to its end.

::

    control   hello ──► request ──► ready ──► signal, resize … ◄──► alive, alive, … exit
    stdin, stdout, stderr   bytes; the exit line counts them

Silence is watched: a boot without progress, a runner without signs of life, and, where that is asked for
(``--patience``), a command that writes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from testbed_parts import CACHE, TOP, TestbedError

if TYPE_CHECKING:
    from testbed import Server

PORTS = ("control", "stdin", "stdout", "stderr")
OUTPUTS = (("stdout", 1), ("stderr", 2))
STALL = 45.0
"""Seconds without a byte on the console, or a step of the guest's runner, that end a boot."""
SILENCE = 120.0
"""Seconds without a sign of life from the guest's runner (it gives one every 5) that end a server in which
the command runs."""


LAST_WORDS = 3.0
"""Seconds that a command gets to say where it stands, before a server is ended over its silence."""


class Stalled(TestbedError):
    """A server that stopped making progress before the command said or read a word; worth another try."""


class Session:
    """Boot, hand over the command, carry the streams, and learn how it ended."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.lines = b""
        self.fed = False
        """Whether the command was given any standard input."""
        self.selector = selectors.DefaultSelector()
        for name in ("console", "control"):
            self.selector.register(server.ports[name], selectors.EVENT_READ, name)

    def send(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            self.server.ports["control"].sendall(json.dumps(message).encode() + b"\n")

    def expect(self, key: str) -> None:
        """Wait for a step of the boot, watching that something goes on."""
        deadline = time.monotonic() + STALL
        while True:
            for message in self._poll(max(0.0, deadline - time.monotonic())):
                if key in message:
                    return
            if self.server.ended:
                raise TestbedError("the emulated server ended while booting")
            if time.monotonic() > deadline:
                raise Stalled(f"no progress for {STALL:.0f} s while booting")
            if self.progress:
                deadline = time.monotonic() + STALL

    def _poll(self, timeout: float | None) -> Iterator[dict[str, object]]:
        self.progress = False
        for key, _ in self.selector.select(timeout):
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            self.progress = True
            if not data:
                self.selector.unregister(key.fileobj)
            elif key.data == "console":
                self.server.console = (self.server.console + data)[-65536:]
                if self.server.options.console:
                    os.write(2, data)
            else:
                self.lines += data
        *whole, self.lines = self.lines.split(b"\n")
        yield from (json.loads(line) for line in whole)

    def boot(self) -> None:
        options = self.server.options
        self.expect("hello")
        self.send(
            {
                "argv": options.command,
                "cwd": os.getcwd(),
                "env": environment(),
                "tty": window_size() if options.tty else None,
                "npt": str(options.npt),
                "modules": str(self.server.modules),
                "visible": [str(TOP), os.getcwd(), str(CACHE), *options.share],
            }
        )
        self.expect("ready")

    def run(self) -> int:
        """Carry the streams until the exit line, and then to the last byte that it counts."""
        self.outputs = [Output(self.server.ports[name], fd) for name, fd in OUTPUTS]
        threading.Thread(target=self._feed, daemon=True).start()
        heard = time.monotonic()
        while True:
            for message in self._poll(1.0):
                heard = time.monotonic()
                if "exit" in message:
                    for output, (name, _) in zip(self.outputs, OUTPUTS, strict=True):
                        output.wait_for(int(str(message[name])))
                    return int(str(message["exit"]))
            if self.server.ended:
                raise TestbedError("the emulated server ended before the command did")
            if time.monotonic() - heard > SILENCE:
                self._give_up()
            self._watch_command()

    def _give_up(self) -> None:
        """Again only if nobody could notice that the command ran before."""
        what = f"the emulated server stood still for {SILENCE:.0f} s"
        if not self.fed and not any(output.count for output in self.outputs):
            raise Stalled(what)
        raise TestbedError(f"{what} while the command ran; its output is not complete")

    def _watch_command(self) -> None:
        patience = self.server.options.patience
        if patience and time.monotonic() - self.outputs[0].heard > patience:
            self.send({"signal": signal.SIGABRT})  # Python's faulthandler then shows all threads
            time.sleep(LAST_WORDS)
            raise TestbedError(f"the command wrote nothing for {patience:.0f} s; it was ended")

    def _feed(self) -> None:
        """Our standard input to the guest. A half-closed socket is the guest's end of file: QEMU reads
        what is there first, which a closed one (HUP) does not promise."""
        port = self.server.ports["stdin"]
        with contextlib.suppress(OSError):
            while data := os.read(0, 65536):
                self.fed = True
                port.sendall(data)
        with contextlib.suppress(OSError):
            port.shutdown(socket.SHUT_WR)


class Output(threading.Thread):
    """One output port to one file descriptor; it counts, so that the end is known to be the end."""

    def __init__(self, port: socket.socket, fd: int) -> None:
        super().__init__(daemon=True)
        self.port, self.fd, self.count = port, fd, 0
        self.heard = time.monotonic()
        self.more = threading.Condition()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.port.recv(65536):
                self._write(data)
                self.heard = time.monotonic()
                with self.more:
                    self.count += len(data)
                    self.more.notify()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BrokenPipeError:
                return  # nobody reads any more; the command's own end decides

    def wait_for(self, count: int) -> None:
        with self.more:
            self.more.wait_for(lambda: self.count >= count, timeout=30)


def environment() -> dict[str, str]:
    """The caller's, without what points at things that are not in there."""
    absent = ("XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY", "DBUS_SESSION_BUS_ADDRESS")
    inherited = {key: value for key, value in os.environ.items() if key not in absent}
    return {**inherited, "HOSTEL_TESTBED": "1"}


def window_size() -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    return rows, columns
