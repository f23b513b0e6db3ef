"""A guest's console: what it wrote, who listens, and what is typed to it.

::

    engine ──feed──► history (the last MiB), log file (the first 16 MiB), subscribers
    engine ◄──take── input ◄──write── a person

Rules:

* A guest that floods its console costs bounded memory and a bounded file.
* A subscriber is called on the engine's thread, in order, and must not block: it holds up the guest.
* Input is never dropped: ``write`` waits when the guest does not read.
* History is bytes as the guest sent them and may hold any escape sequence; ``tail`` is safe to print.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from .errors import MachineStopped, MachineTimeout

HISTORY = 1 << 20
LOG_LIMIT = 16 << 20
INPUT_LIMIT = 64 << 10
_TAIL_BYTES = 64 << 10
_LINE_LENGTH = 400

_ESCAPE = (
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI (ECMA-48 §5.4)
    rb"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS, SOS, PM, APC
    rb"|\x1b[ -/]*[0-~]?"
)
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"

Subscriber = Callable[[bytes], None]


class Console:
    """Thread-safe. The engine sets ``on_input``, feeds, takes, and closes it when the guest has ended."""

    def __init__(self, *, log: Path | None = None, history: int = HISTORY) -> None:
        self.on_input: Callable[[], None] = lambda: None
        self.total = 0
        self._limit = history
        self._history = bytearray()
        self._subscribers: list[Subscriber] = []
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._input = bytearray()
        self._room = threading.Condition()
        self._closed = False
        self._log = _open_log(log) if log else None

    # -- the guest's output -------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """The guest wrote ``data``."""
        with self._lock:
            self._history += data
            if len(self._history) > self._limit + (self._limit >> 3):
                del self._history[: -self._limit]
            self._write_log(data)
            self.total += len(data)
            for subscriber in tuple(self._subscribers):
                subscriber(data)
            self._news.notify_all()

    def history(self) -> bytes:
        """The last bytes that the guest wrote, as it wrote them."""
        with self._lock:
            return bytes(self._history[-self._limit :])

    def tail(self, lines: int = 12) -> str:
        """The last lines that are not empty, as plain text: no escapes, no control characters."""
        with self._lock:
            raw = bytes(self._history[-_TAIL_BYTES:])
        text = re.sub(_ESCAPE, b"", raw).decode("utf-8", "replace").replace("\r\n", "\n")
        clean = (
            re.sub(_CONTROL, "", line.replace("\t", " "))[:_LINE_LENGTH].rstrip()
            for line in text.split("\n")
        )
        return "\n".join([line for line in clean if line][-lines:])

    def subscribe(self, subscriber: Subscriber, *, replay: bool = False) -> Callable[[], None]:
        """Call ``subscriber(data)`` for what comes, first for the history with ``replay``. Returns
        what ends the subscription."""
        with self._lock:
            if replay and self._history:
                subscriber(self.history())
            self._subscribers.append(subscriber)

        def cancel() -> None:
            with self._lock:
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)

        return cancel

    def wait_for(self, text: bytes, timeout: float) -> None:
        """Return once the history holds ``text``."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while text not in self._history:
                left = deadline - time.monotonic()
                if self._closed:
                    raise MachineStopped(
                        f"the machine ended before it wrote {text!r}", console=self.tail()
                    )
                if left <= 0:
                    raise MachineTimeout(
                        f"no {text!r} on the console in {timeout:g} s", console=self.tail()
                    )
                self._news.wait(left)

    def _write_log(self, data: bytes) -> None:
        if self._log is None or self.total >= LOG_LIMIT:
            return
        try:
            self._log.write(data[: LOG_LIMIT - self.total])
        except OSError:  # a full disk must not end the machine
            self._log.close()
            self._log = None

    # -- input to the guest -------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Type ``data``. Waits while the guest has much to read; ``MachineStopped`` when it has ended."""
        left = memoryview(data)
        while left:
            with self._room:
                while len(self._input) >= INPUT_LIMIT and not self._closed:
                    self._room.wait()
                if self._closed:
                    raise MachineStopped("the machine has ended; nobody reads its console")
                room = INPUT_LIMIT - len(self._input)
                self._input += left[:room]
                left = left[room:]
            self.on_input()

    @property
    def has_input(self) -> bool:
        return bool(self._input)

    def take(self, limit: int) -> bytes:
        """Up to ``limit`` bytes of input, for the engine."""
        if not self._input or limit <= 0:  # the usual case, at each read of the serial port
            return b""
        with self._room:
            data = bytes(self._input[:limit])
            del self._input[:limit]
            self._room.notify_all()
            return data

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing more comes. History stays; whoever waits is woken. Idempotent."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        with self._lock:
            self._news.notify_all()
            if self._log is not None:
                self._log.close()
                self._log = None


def _open_log(path: Path) -> FileIO | None:
    """A disk that is full is no reason not to start a machine."""
    try:
        return FileIO(path, "wb")
    except OSError:
        return None
