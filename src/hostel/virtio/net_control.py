"""What a NIC's driver asks for on its control queue (virtio 1.2 §5.1.6.5), as values.

::

    Control ── obey(command) ──► Control, or None: the command is refused

A command is two bytes, class and number, and its data. One whose feature was not negotiated, whose length
is wrong or whose value is out of range changes nothing and is answered with ERR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from hostel.abi import virtio_net as abi

from .net_plane import MAC_SIZE, Filter

MAX_VLAN = 4094

GUEST_OFFLOADS = sum(
    1 << bit
    for bit in (
        abi.F_GUEST_CSUM,
        abi.F_GUEST_TSO4,
        abi.F_GUEST_TSO6,
        abi.F_GUEST_ECN,
        abi.F_GUEST_UFO,
    )
)


def guest_offloads(features: int) -> int:
    """What the driver takes at first: all that it negotiated (§5.1.6.5.6)."""
    return features & GUEST_OFFLOADS


class Control:
    """The driver's wishes; a value: ``obey`` gives another one."""

    def __init__(self, mac: bytes, features: int, max_pairs: int) -> None:
        vlans: frozenset[int] | None = frozenset() if features >> abi.F_CTRL_VLAN & 1 else None
        self.features = features
        self.filter = Filter(mac, vlans=vlans)
        self.pairs = 1
        self.offloads = guest_offloads(features)
        self.acknowledged = False
        """The last command was that an announcement was sent."""
        self._max_pairs = max_pairs

    def obey(self, command: bytes) -> Control | None:
        if len(command) < abi.CTRL_HDR.size:
            return None
        group, number = abi.CTRL_HDR.unpack_from(command)
        feature, act = _COMMANDS.get((group, number), (None, None))
        if feature is None or act is None or not self.features >> feature & 1:
            return None
        return act(self, command[abi.CTRL_HDR.size :])

    def _but(self, filter: Filter | None = None, **changes: Any) -> Control:
        other = Control.__new__(Control)
        other.__dict__.update({**self.__dict__, "acknowledged": False, **changes})
        if filter is not None:
            other.filter = filter
        return other

    def _with_filter(self, **changes: Any) -> Control:
        return self._but(msgspec.structs.replace(self.filter, **changes))

    # -- commands -------------------------------------------------------------------------------

    def _set_mode(self, field: str, data: bytes) -> Control | None:
        return self._with_filter(**{field: bool(data[0])}) if len(data) == 1 else None

    def _set_table(self, data: bytes) -> Control | None:
        """§5.1.6.5.2: two tables, each its length in 4 bytes and that many addresses."""
        tables = []
        for _ in range(2):
            count = int.from_bytes(data[:4], "little")
            end = 4 + MAC_SIZE * count
            if len(data) < end:
                return None
            tables.append([data[at : at + MAC_SIZE] for at in range(4, end, MAC_SIZE)])
            data = data[end:]
        if data:
            return None
        unicast, multicast = tables
        return self._with_filter(unicast=frozenset(unicast), multicast=frozenset(multicast))

    def _set_address(self, data: bytes) -> Control | None:
        return self._with_filter(mac=data) if len(data) == MAC_SIZE else None

    def _add_vlan(self, data: bytes) -> Control | None:
        vlan = _vlan(data)
        return None if vlan is None else self._with_filter(vlans=self._vlans | {vlan})

    def _remove_vlan(self, data: bytes) -> Control | None:
        vlan = _vlan(data)
        return None if vlan is None else self._with_filter(vlans=self._vlans - {vlan})

    @property
    def _vlans(self) -> frozenset[int]:
        return self.filter.vlans or frozenset()

    def _acknowledge(self, data: bytes) -> Control | None:
        return None if data else self._but(acknowledged=True)

    def _set_pairs(self, data: bytes) -> Control | None:
        pairs = int.from_bytes(data, "little")
        if len(data) != 2 or not 1 <= pairs <= self._max_pairs:
            return None
        return self._but(pairs=pairs)

    def _set_offloads(self, data: bytes) -> Control | None:
        """§5.1.6.5.6.2: none that was not negotiated."""
        offloads = int.from_bytes(data, "little")
        if len(data) != 8 or offloads & ~guest_offloads(self.features):
            return None
        return self._but(offloads=offloads)

    # -- snapshots ------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "filter": msgspec.to_builtins(self.filter),
            "pairs": self.pairs,
            "offloads": self.offloads,
        }

    @classmethod
    def load(cls, state: dict[str, Any], max_pairs: int) -> Control:
        filter = msgspec.convert(state["filter"], Filter)
        control = cls(filter.mac, state["features"], max_pairs)
        return control._but(filter, pairs=state["pairs"], offloads=state["offloads"])


def _vlan(data: bytes) -> int | None:
    number = int.from_bytes(data, "little")
    return number if len(data) == 2 and number <= MAX_VLAN else None


Command = Callable[[Control, bytes], Control | None]


def _mode(field: str) -> Command:
    return lambda control, data: control._set_mode(field, data)


_COMMANDS: dict[tuple[int, int], tuple[int, Command]] = {
    (abi.CTRL_RX, abi.CTRL_RX_PROMISC): (abi.F_CTRL_RX, _mode("promiscuous")),
    (abi.CTRL_RX, abi.CTRL_RX_ALLMULTI): (abi.F_CTRL_RX, _mode("all_multicast")),
    (abi.CTRL_RX, abi.CTRL_RX_ALLUNI): (abi.F_CTRL_RX_EXTRA, _mode("all_unicast")),
    (abi.CTRL_RX, abi.CTRL_RX_NOMULTI): (abi.F_CTRL_RX_EXTRA, _mode("no_multicast")),
    (abi.CTRL_RX, abi.CTRL_RX_NOUNI): (abi.F_CTRL_RX_EXTRA, _mode("no_unicast")),
    (abi.CTRL_RX, abi.CTRL_RX_NOBCAST): (abi.F_CTRL_RX_EXTRA, _mode("no_broadcast")),
    (abi.CTRL_MAC, abi.CTRL_MAC_TABLE_SET): (abi.F_CTRL_RX, Control._set_table),
    (abi.CTRL_MAC, abi.CTRL_MAC_ADDR_SET): (abi.F_CTRL_MAC_ADDR, Control._set_address),
    (abi.CTRL_VLAN, abi.CTRL_VLAN_ADD): (abi.F_CTRL_VLAN, Control._add_vlan),
    (abi.CTRL_VLAN, abi.CTRL_VLAN_DEL): (abi.F_CTRL_VLAN, Control._remove_vlan),
    (abi.CTRL_ANNOUNCE, abi.CTRL_ANNOUNCE_ACK): (abi.F_GUEST_ANNOUNCE, Control._acknowledge),
    (abi.CTRL_MQ, abi.CTRL_MQ_VQ_PAIRS_SET): (abi.F_MQ, Control._set_pairs),
    (abi.CTRL_GUEST_OFFLOADS, abi.CTRL_GUEST_OFFLOADS_SET): (
        abi.F_CTRL_GUEST_OFFLOADS,
        Control._set_offloads,
    ),
}
"""(class, number) → the feature it needs, and what it does."""
