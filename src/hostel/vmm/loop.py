"""The event loop: one thread that waits on file descriptors with epoll.

Everything that happens on the host's side of a machine and is not a vCPU runs here, one callback
after another, so a callback must not block: file descriptors are non-blocking, and work that blocks
belongs in a thread of its own.

Interest is level-triggered, unless ``add`` is told otherwise: a callback that leaves data unread is
called again. ``add``, ``modify``, ``remove``, ``call_soon`` and ``call_later`` may be called from any
thread; ``remove`` from another thread does not wait for a callback that is running (``run_sync`` does).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class EventLoop:
    """``start`` to ``stop``. ``on_error`` gets what a callback raises; the loop goes on."""

    def __init__(
        self, on_error: Callable[[Exception], None] | None = None, *, name: str = "hostel-loop"
    ) -> None:
        self._on_error = on_error
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._soon: deque[Callback] = deque()
        self._later: list[tuple[float, int, Callback]] = []  # sorted; a handful
        self._order = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._running = False
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._running = True
        self._thread.start()

    def run(self) -> None:
        """Instead of ``start``: in this thread, until ``stop``. It closes everything when it returns."""
        self._running, self._thread = True, threading.current_thread()
        try:
            self._run()
        finally:
            self._close()

    def stop(self) -> None:
        """End the thread and close everything. Idempotent; from the loop itself it does not wait."""
        self._running = False
        with self._lock:
            if self._closed:
                return
            os.eventfd_write(self._wake, 1)
        if self._thread is threading.current_thread():
            return
        if self._thread.is_alive():
            self._thread.join()
        self._close()

    def add(
        self,
        fd: int,
        callback: Callback,
        *,
        read: bool = True,
        write: bool = False,
        edge: bool = False,
    ) -> None:
        """Call ``callback()`` whenever ``fd`` is ready, or has failed or hung up.

        ``edge``: once for what came, read or not. An eventfd then never needs to be read.
        """
        self._callbacks[fd] = callback
        self._epoll.register(fd, _events(read, write) | (select.EPOLLET if edge else 0))

    def modify(self, fd: int, *, read: bool = True, write: bool = False) -> None:
        """With neither, only failure and hang-up are reported."""
        self._epoll.modify(fd, _events(read, write))

    def remove(self, fd: int) -> None:
        """Before ``fd`` is closed. Idempotent."""
        if self._callbacks.pop(fd, None) is not None and not self._epoll.closed:
            with contextlib.suppress(OSError):  # a closed descriptor has left the epoll set already
                self._epoll.unregister(fd)

    def call_soon(self, callback: Callback) -> None:
        """Run ``callback()`` on the loop's thread. From any thread."""
        self._soon.append(callback)
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def call_later(self, delay: float, callback: Callback) -> None:
        """Run ``callback()`` on the loop's thread after ``delay`` seconds. From any thread."""
        entry = (time.monotonic() + delay, next(self._order), callback)
        self.call_soon(lambda: insort(self._later, entry))

    def run_sync(self, callback: Callback) -> None:
        """Run ``callback()`` between two others and return when it has run.

        On the loop's own thread, or when the loop does not run, it is simply called. The caller must
        hold no lock that a callback of the loop takes.
        """
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            callback()
            return
        done = threading.Event()

        def run() -> None:
            try:
                callback()
            finally:
                done.set()

        self.call_soon(run)
        while not done.wait(0.1):
            if not self._thread.is_alive():
                return

    def _run(self) -> None:
        poll, callbacks = self._epoll.poll, self._callbacks
        while self._running:
            if self._later:
                self._run_due()
            for fd, _ in poll(self._patience() if self._later else None):
                if fd == self._wake:
                    self._run_soon()
                elif callback := callbacks.get(fd):  # an earlier one may have removed it
                    self._call(callback)
                if not self._running:
                    break

    def _patience(self) -> float:
        return max(self._later[0][0] - time.monotonic(), 0)

    def _run_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            self._call(self._later.pop(0)[2])

    def _run_soon(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._soon:
            self._call(self._soon.popleft())

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:
            if self._on_error is None:
                raise
            self._on_error(error)

    def _close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._epoll.close()
                os.close(self._wake)
        self._callbacks.clear()


def _events(read: bool, write: bool) -> int:
    return (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
