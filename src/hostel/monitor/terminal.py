"""``hvc0``: the virtio console's first port, joined with the machine's console.

What the guest writes there is console output like the serial port's. What is typed goes to the guest's
``/dev/console``, which is the last ``console=`` of its command line: here, or the serial port.
"""

from __future__ import annotations

import contextlib
import re
import socket

from hostel.console import Console
from hostel.vmm.loop import EventLoop

CHUNK = 64 << 10


def is_dev_console(cmdline: str) -> bool:
    """Whether ``hvc0`` is the guest's ``/dev/console``."""
    consoles = re.findall(r"(?:^|\s)console=([^\s,]+)", cmdline)
    return bool(consoles) and consoles[-1] == "hvc0"


class Terminal:
    """The host's end of the port. On the event loop."""

    def __init__(
        self, sock: socket.socket, console: Console, loop: EventLoop, *, cmdline: str
    ) -> None:
        self.is_dev_console = is_dev_console(cmdline)
        self._sock = sock
        self._console = console
        self._loop = loop
        self._rest = b""
        sock.setblocking(False)
        loop.add(sock.fileno(), self._ready)

    def poll_input(self) -> None:
        """The console has input: pass on what fits, and the rest when there is room."""
        try:
            while data := self._rest or self._console.take(CHUNK):
                self._rest = data
                self._rest = data[self._sock.send(data) :]
        except BlockingIOError:
            self._loop.modify(self._sock.fileno(), write=True)
        except OSError:  # the port is gone
            self._rest = b""

    def _ready(self) -> None:
        self._loop.modify(self._sock.fileno())
        if not self._read():
            self._loop.remove(self._sock.fileno())
        if self._rest:
            self.poll_input()

    def _read(self) -> bool:
        """Whether there may be more."""
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._console.feed(data)
        return bool(data)

    def close(self) -> None:
        """What the guest has written is still passed on. From any thread."""
        self._loop.run_sync(self._close)

    def _close(self) -> None:
        self._loop.remove(self._sock.fileno())
        with contextlib.suppress(OSError):
            while data := self._sock.recv(CHUNK):
                self._console.feed(data)
        self._sock.close()
