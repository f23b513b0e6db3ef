"""Eventfds that stand for interrupts (KVM_IRQFD) and for writes of the guest (KVM_IOEVENTFD).

::

    anybody ──write──► eventfd ──watcher thread──► raise the GSI          irqfd
    guest's OUT or store ──VM exit──► address match ──write──► eventfd    ioeventfd

The watcher is started with the first irqfd. An eventfd that is signalled before it is assigned
interrupts at once, as with KVM.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from hostel.errors import HostError


class Irqfds:
    """``raised(gsi)`` is called on the watcher's thread, once for each time the eventfd was read."""

    def __init__(self, raised: Callable[[int], None]) -> None:
        self._raised = raised
        self._lock = threading.Lock()
        self._gsis: dict[int, int] = {}
        self._epoll: select.epoll | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1

    def assign(self, gsi: int, fd: int) -> None:
        with self._lock:
            if fd in self._gsis:
                raise HostError(f"eventfd {fd} stands for an interrupt already")
            if self._epoll is None:
                self._start()
            assert self._epoll is not None
            self._gsis[fd] = gsi
            self._epoll.register(fd, select.EPOLLIN)

    def deassign(self, gsi: int, fd: int) -> None:
        """From here on it interrupts no more."""
        with self._lock:
            if self._gsis.get(fd) != gsi or self._epoll is None:
                raise HostError(f"eventfd {fd} does not stand for GSI {gsi}")
            del self._gsis[fd]
            self._epoll.unregister(fd)

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None or self._epoll is None:
            return
        os.eventfd_write(self._wake, 1)
        thread.join()
        self._epoll.close()
        os.close(self._wake)
        self._gsis.clear()

    def _start(self) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._watch, name="hostel-irqfd", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        assert self._epoll is not None
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wake:
                    return
                self._take(fd)

    def _take(self, fd: int) -> None:
        """The lock is held while the interrupt is raised: after ``deassign`` none comes."""
        with self._lock:
            gsi = self._gsis.get(fd)
            if gsi is None:
                return
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
                self._raised(gsi)


class Ioeventfds:
    """Looked up at each write of the guest to a port or to MMIO. From any thread: what was deassigned may be
    closed at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_address: dict[tuple[bool, int], list[tuple[int, int | None, int]]] = {}

    def assign(self, address: int, size: int, fd: int, match: int | None, *, pio: bool) -> None:
        with self._lock:
            there = self._by_address.setdefault((pio, address), [])
            if any((s, m) == (size, match) for s, m, _ in there):
                raise HostError(f"an ioeventfd is at {address:#x} already")
            there.append((size, match, fd))

    def deassign(self, address: int, size: int, fd: int, match: int | None, *, pio: bool) -> None:
        with self._lock:
            there = self._by_address.get((pio, address), [])
            if (size, match, fd) not in there:
                raise HostError(f"no such ioeventfd at {address:#x}")
            there.remove((size, match, fd))
            if not there:
                del self._by_address[pio, address]

    def write(self, address: int, data: bytes, *, pio: bool) -> bool:
        """Whether an eventfd took the write. Size 0 matches any length."""
        with self._lock:
            for size, match, fd in self._by_address.get((pio, address), ()):
                if size in (0, len(data)) and match in (None, int.from_bytes(data, "little")):
                    os.eventfd_write(fd, 1)
                    return True
        return False
