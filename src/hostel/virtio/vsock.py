"""Sockets between guest and host (virtio 1.2 §5.10), served in this process.

::

    guest's connections                 (guest's port, host's port) ─► Stream ◄─► Unix socket
    tx queue ── packets ──► _packet ──────────────────────────────────► writev ──►
    rx queue ◄─ packets ─── _outbox    answers, credit, ends: first
             ◄────────────── _pump ◄──────────────────────────────────── readv ◄───
    event queue ◄─ after a restored snapshot: all connections are gone

Data is copied once, between guest memory and the socket, by the kernel. What a socket does not take is
held (``vsock_stream.py``), within the credit that the guest was given; a guest that sends more is cut
off. What the guest has no room for stays in the socket.

Nobody waits for anybody. The sockets are in two epoll sets of the device's own, which the event loop
watches as two descriptors: the ready ones are served in turn, and where the rx queue is empty one word
silences all of them. A guest that does not take its answers is not listened to any longer (``OUTBOX``).

Only streams are offered: a request for SEQPACKET is refused, as §5.10.6.4 wants it.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hostel.abi import virtio as abi
from hostel.errors import QueueError
from hostel.vmm.loop import EventLoop

from .plane import QueueDevice, ServedQueue
from .queue import MAX_BUFFERS, Chain, fill, take, total
from .vsock_packet import HEADER, Packet, Word, header, parse, refusal, split
from .vsock_stream import Stream
from .vsock_table import HUNG_UP, Streams
from .vsock_unix import HostSockets

RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 256
EVENT_QUEUE_SIZE = 16

OUTBOX = 256
"""Packets waiting for room in the guest; with more, its own are not looked at."""
READ_CHAINS = 32
"""Receive buffers that one ``readv`` fills: Linux offers 4 KiB each."""
CONNECT_SECONDS = 5.0
"""How long the guest may take to answer a request."""


class Offer(NamedTuple):
    """A chain of the guest's for data: its buffers for the header, those for data, their size."""

    chain: Chain
    head: list[memoryview]
    data: list[memoryview]
    room: int


class Vsock(QueueDevice):
    """``path``: see ``vsock_unix.py``. ``cid``: the guest's address."""

    device_id = abi.ID_VSOCK
    features = QueueDevice.features | 1 << abi.VSOCK_F_STREAM
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE)

    def __init__(self, loop: EventLoop, path: Path, *, cid: int, name: str = "vsock") -> None:
        super().__init__(loop)
        self.name = name
        self.cid = cid
        self.config = abi.VSOCK_CONFIG.pack(cid)
        self.streams = Streams()
        self.counters = dict.fromkeys(("bytes_in", "bytes_out", "opened", "refused", "reset"), 0)
        self._outbox: deque[bytes | Word] = deque()
        self._starved = False
        """The guest offers no room."""
        self._deaf = False
        """The tx queue was left as it is, because of the outbox."""
        self._restored = False
        self._host = HostSockets(loop, path, self.lock, self._connect)

    def serve(self, queue: ServedQueue) -> None:
        if queue.index == RX:
            self._set_starved(False)
        elif queue.index == TX:
            self._transmit(queue)
        else:
            self._announce(queue)
        self._deliver()

    # -- life cycle ---------------------------------------------------------------------------

    def started(self) -> None:
        self._starved = self._deaf = False
        self.loop.add(self.streams.read_fd, self._readable)
        self.loop.add(self.streams.write_fd, self._writable)

    def stopping(self) -> None:
        self.loop.remove(self.streams.read_fd)
        self.loop.remove(self.streams.write_fd)
        self.streams.clear()
        self._outbox.clear()

    def close(self) -> None:
        super().close()
        with self.lock:
            self._host.close()
            self.streams.close()

    def load(self, state: dict[str, Any]) -> None:
        """The connections were not saved: the guest will be told that they are gone."""
        super().load(state)
        self._restored = True

    def _announce(self, queue: ServedQueue) -> None:
        """§5.10.6.7: the driver ends its connections and reads its address anew."""
        if self._restored and (chain := queue.pop()) is not None:
            self._restored = False
            event = abi.VSOCK_EVENT.pack(abi.VSOCK_EVENT_TRANSPORT_RESET)
            queue.push(chain, fill(chain.writable, event))
            queue.interrupt()

    def statistics(self) -> dict[str, Any]:
        with self.lock:
            own = {"cid": self.cid, "streams": len(self.streams), "held": self.streams.held}
            return {**super().statistics(), "plane": "python", **own, **self.counters}

    # -- from the guest -----------------------------------------------------------------------

    def _transmit(self, queue: ServedQueue) -> None:
        self._deaf = len(self._outbox) >= OUTBOX
        for chain in () if self._deaf else queue.chains():
            packet, payload = parse(chain)
            self._packet(packet, payload)
            queue.push(chain, 0)
            self._deaf = len(self._outbox) >= OUTBOX
            if self._deaf:
                break
        queue.interrupt()

    def _packet(self, packet: Packet, payload: list[memoryview]) -> None:
        if packet.src_cid != self.cid:
            return  # §5.10.6.4.2: it must be the guest's own; there is nobody to be answered
        stream = None
        if packet.dst_cid == abi.VSOCK_CID_HOST and packet.type == abi.VSOCK_TYPE_STREAM:
            stream = self.streams.get(packet.src_port, packet.dst_port)
            if stream is None and packet.op == abi.VSOCK_OP_REQUEST:
                self._request(packet)
                return
        if stream is None:
            self._refuse(packet)
            return
        stream.learn(packet.buf_alloc, packet.fwd_cnt)
        self._on_stream(stream, packet, payload)
        self.streams.watch(stream)

    def _on_stream(self, stream: Stream, packet: Packet, payload: list[memoryview]) -> None:
        """§5.10.6.5 and 6. What does not belong here ends the connection."""
        op = packet.op
        if op == abi.VSOCK_OP_RST:
            self.streams.release(stream)
        elif stream.connecting:
            if op == abi.VSOCK_OP_RESPONSE:
                self._established(stream)
            else:
                self._reset(stream)
        elif op == abi.VSOCK_OP_RW and stream.guest_sends:
            self._receive(stream, payload, packet.len)
        elif op == abi.VSOCK_OP_SHUTDOWN:
            self._shut_down(stream, packet.flags)
        elif op == abi.VSOCK_OP_CREDIT_REQUEST:
            self._tell(stream, abi.VSOCK_OP_CREDIT_UPDATE)
        elif op != abi.VSOCK_OP_CREDIT_UPDATE:
            self._reset(stream)

    def _request(self, packet: Packet) -> None:
        """The guest connects (§5.10.6.5)."""
        sock = None if self.streams.full else self._host.connect(packet.dst_port)
        if sock is None:
            self._refuse(packet)
            return
        stream = self.streams.add(sock, packet.src_port, packet.dst_port)
        stream.learn(packet.buf_alloc, packet.fwd_cnt)
        self.counters["opened"] += 1
        self._tell(stream, abi.VSOCK_OP_RESPONSE)
        self.streams.watch(stream)

    def _refuse(self, packet: Packet) -> None:
        """Never an RST for an RST: each could be the answer to the other."""
        if packet.op != abi.VSOCK_OP_RST:
            self.counters["refused"] += 1
            self._outbox.append(refusal(packet))

    def _receive(self, stream: Stream, payload: list[memoryview], size: int) -> None:
        if not stream.accept(payload, size):
            self._reset(stream)
            return
        self.counters["bytes_in"] += size
        if stream.held:
            self.streams.watch_writable(stream)
        self._report(stream)

    def _shut_down(self, stream: Stream, flags: int) -> None:
        """Once said, neither can be taken back. With both the connection is over, and the guest waits
        for RST before it uses the port again (§5.10.6.6)."""
        if flags & abi.VSOCK_SHUTDOWN_SEND:
            stream.end_of_guest()
        if flags & abi.VSOCK_SHUTDOWN_RCV:
            stream.end_of_reading()
        if not (stream.guest_sends or stream.guest_reads):
            self._tell(stream, abi.VSOCK_OP_RST)
            self.streams.release(stream)

    def _reset(self, stream: Stream) -> None:
        self.counters["reset"] += 1
        self._tell(stream, abi.VSOCK_OP_RST)
        self.streams.release(stream)

    # -- from the host ------------------------------------------------------------------------

    def _connect(self, sock: socket.socket, port: int) -> None:
        """A program of the host's wants the guest's ``port``."""
        if RX not in self.queues or self.streams.full:
            sock.close()
            return
        stream = self.streams.add(sock, port, self.streams.free_port(port), connecting=True)
        self.loop.call_later(CONNECT_SECONDS, partial(self._give_up, stream))
        self._tell(stream, abi.VSOCK_OP_REQUEST)
        self.guarded(self._deliver)

    def _give_up(self, stream: Stream) -> None:
        with self.lock:
            if stream.connecting and self.streams.has(stream):
                self._reset(stream)
                self.guarded(self._deliver)

    def _established(self, stream: Stream) -> None:
        stream.connecting = False
        self.counters["opened"] += 1
        try:
            stream.sock.send(b"OK %d\n" % stream.host_port)
        except OSError:
            self._hung_up(stream)

    def _hung_up(self, stream: Stream) -> None:
        """The program on the host has gone. The guest may still have bytes of it to read, so it is the
        guest that ends the connection."""
        self.streams.close_socket(stream)
        stream.host_sends = False
        self._report(stream)

    def _report(self, stream: Stream) -> None:
        """What the guest must know: which ends the host's side has come to, and that there is room."""
        if stream.ends != stream.told:
            stream.told = stream.ends
            self._tell(stream, abi.VSOCK_OP_SHUTDOWN, stream.ends)
        elif stream.update_due:
            self._tell(stream, abi.VSOCK_OP_CREDIT_UPDATE)

    def _writable(self) -> None:
        with self.lock:
            for stream in self.streams.flush() if self.queues else ():
                if self.streams.has(stream):
                    self._report(stream)
            self.guarded(self._deliver)

    def _readable(self) -> None:
        with self.lock:
            self.guarded(partial(self._deliver, sockets=True))

    # -- to the guest -------------------------------------------------------------------------

    def _tell(self, stream: Stream, op: int, flags: int = 0) -> None:
        stream.reported = stream.forwarded
        self._outbox.append(Word(stream, op, flags))

    def _deliver(self, *, sockets: bool = False) -> None:
        """What waits in the outbox, and where that is empty, what is in the sockets."""
        queue = self.queues.get(RX)
        if queue is None:
            return
        self._flush_outbox(queue)
        if sockets and not self._outbox:
            self._pump(queue)
            self._flush_outbox(queue)
        queue.interrupt()
        if self._deaf and len(self._outbox) < OUTBOX and TX in self.queues:
            self._deaf = False
            self.queues[TX].kick_self()

    def _flush_outbox(self, queue: ServedQueue) -> None:
        while self._outbox and (chain := self._room(queue)) is not None:
            what = self._outbox.popleft()
            head = what if isinstance(what, bytes) else what.header(self.cid)
            fill(split(chain.writable)[0], head)
            queue.push(chain, HEADER)

    def _room(self, queue: ServedQueue) -> Chain | None:
        chain = queue.pop()
        if chain is None and queue.enable_notifications():
            chain = queue.pop()
        if chain is None:
            self._set_starved(True)
        return chain

    def _set_starved(self, starved: bool) -> None:
        if starved != self._starved:
            self._starved = starved
            self.loop.modify(self.streams.read_fd, read=not starved)

    def _pump(self, queue: ServedQueue) -> None:
        """From the sockets that are ready, in turn, until the guest has no more room."""
        for stream, events in self.streams.ready_to_read():
            if not stream.readable:
                if events & HUNG_UP:
                    self._hung_up(stream)
            elif not stream.credit:
                self._ask(stream)
            elif not self._read(stream, queue, hung_up=bool(events & HUNG_UP)):
                return
            self.streams.watch(stream)

    def _ask(self, stream: Stream) -> None:
        if not stream.asked:
            stream.asked = True
            self._tell(stream, abi.VSOCK_OP_CREDIT_REQUEST)

    def _read(self, stream: Stream, queue: ServedQueue, *, hung_up: bool) -> bool:
        """One ``readv`` into what the guest offers and has credit for; ``False``: it offers nothing."""
        offered = self._offered(queue, stream.credit)
        if not offered:
            return False
        try:
            length = os.readv(stream.fd, [view for offer in offered for view in offer.data])
        except BlockingIOError:
            queue.unpop(len(offered))
            return True
        except OSError:
            length, hung_up = 0, True
        if length:
            self._send(stream, queue, offered, length)
            return True
        queue.unpop(len(offered))
        stream.host_sends = False
        if hung_up:
            self._hung_up(stream)
        else:
            self._report(stream)
        return True

    def _offered(self, queue: ServedQueue, credit: int) -> list[Offer]:
        """The next chains, as many as one ``readv`` fills; at most ``credit`` bytes of room."""
        offered: list[Offer] = []
        buffers = 0
        while credit and len(offered) < READ_CHAINS:
            chain = queue.pop() if offered else self._room(queue)
            if chain is None:
                break
            head, data = split(chain.writable)
            room = total(data) if chain.readable else chain.size - HEADER
            if room > credit:
                data, room = take(data, credit)[0], credit
            buffers += len(data)
            if buffers > MAX_BUFFERS:
                queue.unpop()
                break
            if not data:
                raise QueueError("a receive buffer without room for data")
            credit -= room
            offered.append(Offer(chain, head, data, room))
        return offered

    def _send(self, stream: Stream, queue: ServedQueue, offered: list[Offer], length: int) -> None:
        """``length`` bytes lie in the guest's buffers: put headers before them, and give them back."""
        stream.sent += length
        self.counters["bytes_out"] += length
        for at, (chain, head, _, room) in enumerate(offered):
            if not length:
                queue.unpop(len(offered) - at)
                break
            size = min(length, room)
            fill(head, header(stream, self.cid, abi.VSOCK_OP_RW, size=size))
            queue.push(chain, HEADER + size)
            length -= size
