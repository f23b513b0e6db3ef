"""One connection between a program of the guest and one of the host: credits, and two half-closes.

::

    guest ── OP_RW ──► accept ── writev ──► Unix socket ──► host's program
                         └── held, while the socket is full: never more than ``window``
    guest ◄─ OP_RW ◄── credit, readv ◄───── Unix socket ◄── host's program

Credit (virtio 1.2 §5.10.6.3). Each side tells in every packet how much room it has in all (buf_alloc)
and how many bytes have left that room for good (fwd_cnt), both modulo 2^32, and the other never has
more under way than that. Ours is ``window`` and ``forwarded``: a byte has left when the Unix socket took
it. Here all counters count without wrapping.

A stream knows nothing of queues and packets, and does not wait.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from hostel.abi import virtio as abi

from .queue import take

WORD = 0xFFFF_FFFF


class Stream:
    """``sock`` belongs to the stream. Not thread-safe."""

    __slots__ = (
        "acknowledged",
        "asked",
        "connecting",
        "fd",
        "forwarded",
        "guest_port",
        "guest_reads",
        "guest_sends",
        "held",
        "host_port",
        "host_reads",
        "host_sends",
        "peer_window",
        "received",
        "reported",
        "sent",
        "sock",
        "told",
        "waits",
        "watched",
        "window",
    )

    def __init__(
        self,
        sock: socket.socket,
        *,
        guest_port: int,
        host_port: int,
        window: int,
        connecting: bool = False,
    ) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.guest_port = guest_port
        self.host_port = host_port
        self.connecting = connecting
        """The guest has not answered our request yet."""
        self.watched: int | None = None
        """The events of the socket that are waited for, by whoever reads it."""
        self.waits = False
        """Until the socket can be written."""
        self.told = 0
        """The ends of the host's side that the guest knows of."""
        # Guest to host.
        self.window = window
        self.received = 0
        self.forwarded = 0
        self.reported = 0
        """``forwarded`` as the guest was last told."""
        self.held = bytearray()
        self.guest_sends = True
        self.host_reads = True
        # Host to guest.
        self.sent = 0
        self.acknowledged = 0
        """Of what was ``sent``: has left the guest's room."""
        self.peer_window = 0
        self.asked = False
        """Out of credit, and the guest was asked for news."""
        self.host_sends = True
        self.guest_reads = True

    @property
    def key(self) -> tuple[int, int]:
        return self.guest_port, self.host_port

    @property
    def open(self) -> bool:
        """The host's program is still there."""
        return self.fd >= 0

    def close(self) -> None:
        self.sock.close()
        self.fd = -1
        self._drop()

    # -- guest to host ------------------------------------------------------------------------

    def accept(self, buffers: Sequence[memoryview], size: int) -> bool:
        """Take ``size`` bytes from the guest; ``False``: it had no credit for them."""
        self.received += size
        if self.received - self.forwarded > self.window:
            return False
        rest = list(buffers)
        if not self.held:
            rest = self._write(rest)
        if not self.host_reads:
            self.forwarded = self.received
            return True
        for part in rest:
            self.held += part
        return True

    def flush(self) -> None:
        """The socket takes bytes again."""
        try:
            written = os.write(self.fd, self.held)
        except BlockingIOError:
            return
        except OSError:
            self._drop()
            return
        self.forwarded += written
        del self.held[:written]
        self._pass_end_on()

    def end_of_guest(self) -> None:
        """The guest sends no more: the host's program reads end-of-file, after what is held."""
        self.guest_sends = False
        self._pass_end_on()

    @property
    def update_due(self) -> bool:
        """Half the window is free without the guest's knowing. It cannot run dry before that: what
        it lacks of its credit is held here, on its way out, or this."""
        return 2 * (self.forwarded - self.reported) >= self.window

    def _write(self, rest: list[memoryview]) -> list[memoryview]:
        """What the socket did not take."""
        while rest and self.host_reads:
            try:
                written = os.writev(self.fd, rest)
            except BlockingIOError:
                break
            except OSError:
                self._drop()
                break
            self.forwarded += written
            rest = take(rest, written)[1]
        return rest

    def _drop(self) -> None:
        """Nobody reads on the host's side any more: what the guest sends has gone at once."""
        self.host_reads = False
        self.held.clear()
        self.forwarded = self.received

    def _pass_end_on(self) -> None:
        if not self.guest_sends and not self.held and self.open:
            with contextlib.suppress(OSError):  # its other end is gone
                self.sock.shutdown(socket.SHUT_WR)

    # -- host to guest ------------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return max(0, self.peer_window - (self.sent - self.acknowledged))

    def learn(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What any packet of the guest says of its room. A count that is behind (two threads of the
        guest may swap their packets) or ahead of all that was sent is no news."""
        news = (fwd_cnt - self.acknowledged) & WORD
        if news <= self.sent - self.acknowledged:
            self.acknowledged += news
        self.peer_window = buf_alloc
        if self.credit:
            self.asked = False

    @property
    def readable(self) -> bool:
        """Bytes of the host's program are still to be passed on."""
        return self.host_sends and self.guest_reads

    @property
    def ends(self) -> int:
        """The host's side as flags of SHUTDOWN."""
        gone = 0 if self.host_reads else abi.VSOCK_SHUTDOWN_RCV
        return gone if self.host_sends else gone | abi.VSOCK_SHUTDOWN_SEND

    def end_of_reading(self) -> None:
        """The guest receives no more: the host's program cannot write any longer."""
        self.guest_reads = False
        if self.open:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)
