"""Console (virtio 1.2 §5.3) with several ports, each the end of a byte stream on the host.

::

    guest's port ── transmit queue ──► writev ──► socket ─► whoever holds the other end
                 ◄─ receive queue ◄─── readv ◄───

Port 0 is the guest's ``hvc0``; the others are found by name (``/dev/virtio-ports/…``). Bytes move
between guest memory and the socket without a copy in this process and without a buffer: if the socket
is full the transmit queue is left as it is until the socket can be written, and if the guest offers no
room the socket is left unread. So a slow reader slows the guest down, and a slow guest the writer.

(A Linux guest spins in the driver of ``hvc0`` while its bytes are not taken: keep reading port 0.)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from hostel.abi import virtio as abi
from hostel.vmm.loop import EventLoop

from .plane import QueueDevice, ServedQueue
from .queue import MAX_BUFFERS, Chain, fill, take, total

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
QUEUE_SIZE = 128
CONTROL_QUEUE_SIZE = 32
READ_CHAINS = 32
"""Chains that one ``readv`` fills: Linux offers a page each."""
READ_TURNS = 8
"""``readv`` calls before other devices have their turn."""
OUTBOX = 64
"""Control messages waiting for room; with more, the guest's own are not looked at."""


class Port:
    """A port and its backend: ``fd`` is a connected stream socket, which the device then owns."""

    def __init__(self, name: str, fd: int, *, console: bool = False) -> None:
        self.name = name
        self.fd = fd
        self.console = console
        self.connected = True
        """The host's end is there."""
        self.opened = False
        """The guest's end is open; what comes before that a guest would drop."""
        self.starved = False
        """The guest offers no room."""
        self.pending: Chain | None = None
        """Taken from the guest, not wholly written yet …"""
        self.rest: list[memoryview] = []
        """… and what of it is left."""
        self.skip = 0
        """Bytes of the next chain that were written before the state was saved."""
        self.watched = (False, False)
        self.bytes_in = 0
        self.bytes_out = 0


def _receive_index(port: int) -> int:
    """§5.3.2: ports 1 and up come after the control queues."""
    return 2 * port + 2 if port else 0


class Console(QueueDevice):
    """``ports[0]`` is the console."""

    device_id = abi.ID_CONSOLE
    features = QueueDevice.features | 1 << abi.CONSOLE_F_SIZE | 1 << abi.CONSOLE_F_MULTIPORT

    def __init__(
        self,
        loop: EventLoop,
        ports: Sequence[Port],
        *,
        name: str = "console",
        size: tuple[int, int] = (80, 25),
    ) -> None:
        super().__init__(loop)
        self.name = name
        self.ports = list(ports)
        control = (CONTROL_QUEUE_SIZE,) * 2
        self.queue_sizes = (QUEUE_SIZE,) * 2 + control + (QUEUE_SIZE,) * 2 * (len(ports) - 1)
        self._outbox: deque[bytes] = deque()
        self._port_of = {
            _receive_index(number) + way: port
            for number, port in enumerate(self.ports)
            for way in (0, 1)
        }
        for port in self.ports:
            os.set_blocking(port.fd, False)
        self._set_size(*size)

    @property
    def multiport(self) -> bool:
        return bool(self.driver_features >> abi.CONSOLE_F_MULTIPORT & 1)

    def serve(self, queue: ServedQueue) -> None:
        port = self._port_of.get(queue.index)
        if queue.index == CONTROL_RECEIVE:
            self._flush_outbox()
        elif queue.index == CONTROL_TRANSMIT:
            self._read_control(queue)
        elif port is not None and queue.index % 2:
            self._transmit(port, queue)
        elif port is not None:
            port.starved = False
            self._receive(port)

    # -- life cycle ---------------------------------------------------------------------------

    def started(self) -> None:
        for port in self.ports:
            self._watch(port)

    def stopping(self) -> None:
        self._outbox.clear()
        for port in self.ports:
            self._unwatch(port)
            port.pending, port.rest, port.skip = None, [], 0
            port.opened = port.starved = False

    def close(self) -> None:
        super().close()
        for port in self.ports:
            if port.fd >= 0:
                os.close(port.fd)
                port.fd = -1
            port.connected = False

    def save(self) -> dict[str, Any]:
        """A chain that is half written comes again after ``load``, and its first half is skipped."""
        with self.lock:
            state = super().save()
            halves = {}
            for index, port in self._port_of.items():
                if index % 2 and port.pending is not None:
                    halves[index] = total(port.pending.readable) - total(port.rest)
            positions = [
                [index, (avail - (index in halves)) & 0xFFFF, used]
                for index, avail, used in state["queues"]
            ]
            ports = [
                [port.opened, halves.get(_receive_index(number) + 1, 0)]
                for number, port in enumerate(self.ports)
            ]
            return {**state, "queues": positions, "ports": ports}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        for port, (opened, skip) in zip(self.ports, state["ports"], strict=True):
            port.opened, port.skip = opened, skip

    def statistics(self) -> dict[str, Any]:
        ports = {p.name: {"in": p.bytes_in, "out": p.bytes_out} for p in self.ports}
        return {**super().statistics(), "ports": ports}

    # -- the backend --------------------------------------------------------------------------

    def _watch(self, port: Port) -> None:
        """Wait for what is of use now. With neither, the fd leaves the loop: a peer that hung up
        would be reported again and again."""
        read = port.connected and not port.starved and (port.opened or port.console)
        wanted = (read, port.connected and port.pending is not None)
        if wanted == port.watched:
            return
        if port.watched == (False, False):
            callback = partial(self._ready, port)
            self.loop.add(port.fd, callback, read=wanted[0], write=wanted[1])
        elif wanted == (False, False):
            self.loop.remove(port.fd)
        else:
            self.loop.modify(port.fd, read=wanted[0], write=wanted[1])
        port.watched = wanted

    def _unwatch(self, port: Port) -> None:
        if port.watched != (False, False):
            self.loop.remove(port.fd)
            port.watched = (False, False)

    def _ready(self, port: Port) -> None:
        with self.lock:
            read, write = port.watched
            transmit = self.queues.get(_receive_index(self.ports.index(port)) + 1)
            if write and transmit is not None:
                self.guarded(partial(self._transmit, port, transmit))
            if read:
                self.guarded(partial(self._receive, port))

    def _hang_up(self, port: Port) -> None:
        """The host's end is gone: the guest reads end-of-file, and what it sends is dropped."""
        port.connected = False
        self._unwatch(port)
        self._send(port, abi.CONSOLE_PORT_OPEN, 0)

    # -- guest to host ------------------------------------------------------------------------

    def _transmit(self, port: Port, queue: ServedQueue) -> None:
        if port.pending is None or self._write(port, queue):
            for chain in queue.chains():
                port.pending = chain
                port.rest = take(chain.readable, port.skip)[1]
                port.skip = 0
                if not self._write(port, queue):
                    break
        self._watch(port)
        queue.interrupt()

    def _write(self, port: Port, queue: ServedQueue) -> bool:
        """Write the pending chain; ``False`` if the socket is full before its end."""
        while port.rest and port.connected:
            try:
                written = os.writev(port.fd, port.rest)
            except BlockingIOError:
                return False
            except OSError:
                self._hang_up(port)
                break
            port.bytes_out += written
            port.rest = take(port.rest, written)[1]
        if port.pending is not None:
            queue.push(port.pending, 0)
        port.pending, port.rest = None, []
        return True

    # -- host to guest ------------------------------------------------------------------------

    def _receive(self, port: Port) -> None:
        queue = self.queues.get(_receive_index(self.ports.index(port)))
        accepts = port.connected and (port.opened or port.console)
        if queue is not None and accepts:
            turns = iter(range(READ_TURNS))
            while next(turns, None) is not None and self._read_some(port, queue):
                pass
            queue.interrupt()
        self._watch(port)

    def _read_some(self, port: Port, queue: ServedQueue) -> bool:
        """One ``readv`` into what the guest offers; whether another may bring more."""
        chains = self._offered(queue)
        if not chains:
            port.starved = not queue.enable_notifications()
            return not port.starved
        try:
            length = os.readv(port.fd, [view for chain in chains for view in chain.writable])
        except BlockingIOError:
            queue.unpop(len(chains))
            return False
        except OSError:
            length = 0
        port.bytes_in += length
        filled = 0
        for chain in chains:
            if not length:
                break
            used = min(length, total(chain.writable))
            queue.push(chain, used)
            length -= used
            filled += 1
        queue.unpop(len(chains) - filled)
        if not filled:
            self._hang_up(port)
        return filled == len(chains)

    def _offered(self, queue: ServedQueue) -> list[Chain]:
        """The next chains, as many as one ``readv`` can fill."""
        chains: list[Chain] = []
        buffers = 0
        while len(chains) < READ_CHAINS and (chain := queue.pop()) is not None:
            buffers += len(chain.writable)
            if chain.writable and buffers <= MAX_BUFFERS:
                chains.append(chain)
            elif chains:
                queue.unpop()
                break
            else:
                queue.push(chain, 0)  # room for nothing
        return chains

    # -- control (§5.3.6.2) -------------------------------------------------------------------

    def _read_control(self, queue: ServedQueue) -> None:
        for chain in queue.chains() if len(self._outbox) < OUTBOX else ():
            head, _ = take(chain.readable, abi.CONSOLE_CONTROL.size)
            message = b"".join(head)
            queue.push(chain, 0)
            if len(message) == abi.CONSOLE_CONTROL.size:
                self._on_control(*abi.CONSOLE_CONTROL.unpack(message))
            if len(self._outbox) >= OUTBOX:
                break
        queue.interrupt()

    def _on_control(self, number: int, event: int, value: int) -> None:
        if event == abi.CONSOLE_DEVICE_READY and value:
            for port in self.ports:
                self._send(port, abi.CONSOLE_PORT_ADD, 1)
        elif number >= len(self.ports):
            return
        elif event == abi.CONSOLE_PORT_READY and value:
            self._introduce(self.ports[number])
        elif event == abi.CONSOLE_PORT_OPEN:
            self.ports[number].opened = bool(value)
            self._watch(self.ports[number])

    def _introduce(self, port: Port) -> None:
        if port.console:
            self._send(port, abi.CONSOLE_CONSOLE_PORT, 1)
            self._send_size()
        self._send(port, abi.CONSOLE_PORT_NAME, 1, port.name.encode())
        self._send(port, abi.CONSOLE_PORT_OPEN, port.connected)

    def _send(self, port: Port, event: int, value: int, more: bytes = b"") -> None:
        if self.multiport and CONTROL_RECEIVE in self.queues:
            number = self.ports.index(port)
            self._outbox.append(abi.CONSOLE_CONTROL.pack(number, event, value) + more)
            self._flush_outbox()

    def _flush_outbox(self) -> None:
        queue = self.queues.get(CONTROL_RECEIVE)
        if queue is None:
            return
        was_full = len(self._outbox) >= OUTBOX
        while self._outbox:
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    continue
                break
            queue.push(chain, fill(chain.writable, self._outbox.popleft()))
        queue.interrupt()
        transmit = self.queues.get(CONTROL_TRANSMIT)
        if was_full and len(self._outbox) < OUTBOX and transmit is not None:
            transmit.kick_self()

    # -- size ---------------------------------------------------------------------------------

    def resize(self, columns: int, rows: int) -> None:
        """The terminal behind port 0 has a new size."""
        with self.lock:
            self._set_size(columns, rows)
            self.config_changed()
            self.guarded(self._send_size)

    def _set_size(self, columns: int, rows: int) -> None:
        self._size = (columns & 0xFFFF, rows & 0xFFFF)
        self.config = abi.CONSOLE_CONFIG.pack(*self._size, len(self.ports), 0)

    def _send_size(self) -> None:
        """§5.3.6.2: columns, then rows. (Linux took them the other way round until 6.15; Debian's
        6.1 has the correction.)"""
        columns, rows = self._size
        size = columns.to_bytes(2, "little") + rows.to_bytes(2, "little")
        self._send(self.ports[0], abi.CONSOLE_RESIZE, 1, size)
