"""Signals while a machine runs a command.

::

    phase      INT TERM HUP QUIT                          WINCH
    starting   end now: EndedBySignal                       -
    running    passed on to the command; a second         the command's window
               Ctrl-C, and --stop-timeout after the       follows
               first TERM, HUP or QUIT, end it now
               On a raw terminal: three Ctrl-C keys
               within a second end it now
    ending     nothing: the machine stops within a deadline

Rules:

* A Python signal handler runs in the main thread between two bytecodes, wherever that thread is. So a
  handler takes no lock: it raises, or puts the number on a ``SimpleQueue`` (reentrant by contract);
  a thread sends it to the guest.
* ``--timeout`` is the same: SIGALRM, then TERM to the command, then the end.
* A signal that the caller has us ignore (nohup, ``&`` in a script) stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from hostel.errors import HostelError

from . import terminal
from .entry import EndedBySignal

if TYPE_CHECKING:
    from hostel.guest.client import GuestProcess

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CTRL_C = 3


class Signals:
    """Handlers for the length of the block. The main thread only."""

    def __init__(self, *, timeout: float | None, stop_timeout: float) -> None:
        self.timed_out = False
        self._timeout = timeout
        self._stop_timeout = stop_timeout
        self._handle: Callable[[int], None] = self._starting
        self._stopping = 0
        self._interrupts = 0
        self._pressed: list[float] = []
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._before: dict[int, Any] = {}
        self._process: GuestProcess | None = None

    def __enter__(self) -> Signals:
        for number in (*FORWARDED, signal.SIGWINCH, signal.SIGALRM):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._arrived)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ending()
        for number, before in self._before.items():
            signal.signal(number, before)

    def running(self, process: GuestProcess) -> None:
        """The command runs; what comes goes to it."""
        self._process = process
        threading.Thread(target=self._send, name="signals", daemon=True).start()
        self._handle = self._pass_on
        if self._timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, self._timeout)

    def ending(self) -> None:
        """The command has ended, or is given up."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._handle = lambda number: None
        self._actions.put(None)

    def keys(self, data: bytes) -> None:
        """What is typed on a raw terminal, where Ctrl-C is a key of the guest's: three of them at once,
        and the command still there, force the end. Called by the thread that passes them on."""
        now = time.monotonic()
        for key in data:
            self._pressed = [*self._pressed[-2:], now] if key == CTRL_C else []
            if len(self._pressed) == 3 and now - self._pressed[0] <= 1.0:
                self._interrupts = 1  # the next one is the second
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _end(self, number: int) -> NoReturn:
        """Nothing may interrupt the clean-up that the exception begins."""
        self.ending()
        raise EndedBySignal(number)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self._handle(number)

    def _starting(self, number: int) -> None:
        if number in FORWARDED:
            self._end(number)

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGALRM:
            self._alarm()
        elif number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._end(number)
            self._signal(number)
        else:
            self._signal(number)
            self._stop_within(number)

    def _alarm(self) -> None:
        """The command's time is over; or, if it was told to stop already, its time to do so."""
        if self._stopping:
            self._end(self._stopping)
        self.timed_out = True
        self._signal(signal.SIGTERM)
        self._stop_within(signal.SIGTERM)

    def _stop_within(self, number: int) -> None:
        if not self._stopping:
            self._stopping = number
            # Zero would disarm the timer.
            signal.setitimer(signal.ITIMER_REAL, max(self._stop_timeout, 0.001))

    def _signal(self, number: int) -> None:
        process = self._process
        assert process is not None
        self._actions.put(lambda: process.signal(number))

    def _resize(self) -> None:
        process = self._process
        assert process is not None
        self._actions.put(lambda: process.resize(*terminal.size()))

    def _send(self) -> None:
        while (action := self._actions.get()) is not None:
            with contextlib.suppress(HostelError):  # the command ended a moment ago
                action()
