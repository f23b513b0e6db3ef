"""What serves the receive and transmit queues of a NIC: the contract between ``net.Net`` and its planes.

::

    driver ── control queue ──► Net ── set_filter, set_pairs, set_offloads ──► NetPlane
           ══ rx0 tx0 rx1 tx1 … ═══════════════════════════════════════════════► tap, macvtap, socket

The device is the same whatever the plane: config space, features, control queue, link state. A plane only
moves frames, and says in ``features`` which bits it adds to the device's.

Contract:

* ``prepare`` comes before the driver sees the features; ``features`` and ``max_pairs`` are final after it.
* ``start`` and ``stop`` alternate. When ``stop`` has returned nobody touches guest memory for this plane.
* ``set_*`` may come at any time, before ``start`` and after ``stop`` too, and hold from then on (a
  ``start`` does not forget them). They do not block on the guest or on the network.
* Calls come one at a time (the device holds its lock). ``on_fault`` may be called from any thread that
  holds no lock which ``stop`` takes: the device answers it by ``stop`` on another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from hostel.errors import HostelError
from hostel.memory import GuestMemory

from .device import QueueWiring

Buffer = bytes | bytearray | memoryview

MAC_SIZE = 6
BROADCAST = b"\xff" * MAC_SIZE
_VLAN_TYPE = b"\x81\x00"  # IEEE 802.1Q §9.6: the tag follows the two addresses
_VLAN_MASK = 0xFFF


class Filter(msgspec.Struct, frozen=True):
    """Which frames the driver wants (virtio 1.2 §5.1.6.5). All of them, until it says otherwise."""

    mac: bytes
    promiscuous: bool = True
    all_multicast: bool = False
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: frozenset[bytes] = frozenset()
    """Further addresses, besides ``mac``."""
    multicast: frozenset[bytes] = frozenset()
    vlans: frozenset[int] | None = None
    """None: every VLAN, as the driver did not take CTRL_VLAN. Untagged frames always pass."""

    def accepts(self, frame: Buffer) -> bool:
        """Whether the frame with this beginning (16 bytes of it are looked at) is for the driver."""
        if self.promiscuous:
            return True
        if self.vlans is not None and bytes(frame[12:14]) == _VLAN_TYPE:
            tag = int.from_bytes(frame[14:16], "big")
            if tag & _VLAN_MASK not in self.vlans:
                return False
        return self._accepts_address(bytes(frame[:MAC_SIZE]))

    def _accepts_address(self, address: bytes) -> bool:
        if address == BROADCAST:
            return not self.no_broadcast
        if address and address[0] & 1:
            wanted = self.all_multicast or address in self.multicast
            return wanted and not self.no_multicast
        wanted = self.all_unicast or address == self.mac or address in self.unicast
        return wanted and not self.no_unicast


def unheard(error: HostelError) -> None:
    """A plane's ``on_fault`` until the device sets its own."""


class NetPlane(Protocol):
    """See the module's contract."""

    features: int
    """Bits that this plane adds to the device's: CSUM, GUEST_*, HOST_*, MRG_RXBUF; CTRL_GUEST_OFFLOADS if
    ``set_offloads`` works while it runs."""
    without: int
    """Bits that the device must not offer on this plane, EVENT_IDX for one; usually 0."""
    max_pairs: int
    on_fault: Callable[[HostelError], None]
    """Set by the device: the guest broke a ring, or the backend is gone."""

    def prepare(self) -> None:
        """Meet the backend. ``HostelError`` if it cannot be used."""

    def start(
        self,
        memory: GuestMemory,
        features: int,
        wirings: Sequence[QueueWiring],
        positions: Sequence[tuple[int, int]],
        pairs: int,
    ) -> None:
        """Serve the queues that the driver enabled: index 2k receives, 2k + 1 transmits.

        ``features`` are those negotiated; ``positions`` says for each of ``wirings`` where its ring goes on
        (next available, next used); the first ``pairs`` pairs are in use, the others wait for
        ``set_pairs``. ``QueueError`` where a ring is bad.
        """

    def set_pairs(self, pairs: int) -> None:
        """Frames go through the first ``pairs`` pairs from now on (§5.1.6.5.5)."""

    def set_filter(self, filter: Filter) -> None:
        """As far as this plane can: who passes more does no harm, but costs the guest time."""

    def set_offloads(self, offloads: int) -> None:
        """The GUEST_* bits that the driver can take for now (§5.1.6.5.6)."""

    def set_link(self, up: bool) -> None:
        """With the link down no frame passes in either direction."""

    def stop(self) -> list[tuple[int, int]]:
        """Where each of the ``wirings`` stands, in their order; empty if it was not started."""

    def close(self) -> None:
        """Give everything back; ``stop`` comes first."""

    def statistics(self) -> dict[str, Any]:
        """Counters: at least ``plane``."""
