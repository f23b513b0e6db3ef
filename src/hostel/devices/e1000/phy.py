"""The transceiver: registers behind MDIO, and a link of 1000 Mbit/s that is up or down at once.

8254x SDM §13.4.7 (MDIC) and §13.5 (its registers); IEEE 802.3 clause 22. Auto-negotiation is over as
soon as it starts: the other end takes whatever there is.
"""

from __future__ import annotations

from typing import Any

from hostel.abi import e1000 as abi

_CTRL_AT_RESET = abi.PHY_CTRL_AUTONEG | abi.PHY_CTRL_FULL_DUPLEX | abi.PHY_CTRL_SPEED_1000
_STATUS = 0x7949
"""All of 10 and 100 Mbit/s in both duplexes, extended status, auto-negotiation, extended registers."""
_ALL_SPEEDS = 0x01E1
_LP_ALL_SPEEDS = 0x4000 | _ALL_SPEEDS
_1000T_CTRL = 0x0300
_1000T_STATUS = 0x3C00
"""The other end does 1000BASE-T; both receivers are fine."""
_EXT_STATUS = 0x3000
_SPEC_STATUS_LINKED = 0xAC00
"""1000 Mbit/s, full duplex, resolved, link (§13.5, register 17)."""
_ID = (0x0141, 0x0C20)
"""Marvell 88E1011, revision 0."""

_AT_RESET = {
    abi.PHY_CTRL: _CTRL_AT_RESET,
    abi.PHY_ID1: _ID[0],
    abi.PHY_ID2: _ID[1],
    abi.PHY_ADV: _ALL_SPEEDS,
    abi.PHY_1000T_CTRL: _1000T_CTRL,
    abi.PHY_EXT_STATUS: _EXT_STATUS,
    abi.PHY_SPEC_CTRL: 0x0360,
    abi.PHY_EXT_SPEC_CTRL: 0x0D60,
}
_WRITABLE = {
    abi.PHY_CTRL,
    abi.PHY_ADV,
    abi.PHY_1000T_CTRL,
    abi.PHY_SPEC_CTRL,
    abi.PHY_EXT_SPEC_CTRL,
}
_SELF_CLEARING = abi.PHY_CTRL_RESET | abi.PHY_CTRL_RESTART


class Phy:
    def __init__(self) -> None:
        self.carrier = True
        """Whether there is something at the other end of the cable."""
        self.reset()

    def reset(self) -> None:
        self._registers = dict(_AT_RESET)

    @property
    def link(self) -> bool:
        return self.carrier and not self._registers[abi.PHY_CTRL] & abi.PHY_CTRL_POWER_DOWN

    def command(self, mdic: int) -> int:
        """What MDIC holds after this was written to it."""
        register, operation = mdic >> 16 & 0x1F, mdic >> 26 & 3
        result = mdic & ~abi.MDIC_ERROR | abi.MDIC_READY
        if mdic >> 21 & 0x1F != abi.PHY_ADDRESS or operation not in (abi.MDIC_READ, abi.MDIC_WRITE):
            return result | abi.MDIC_ERROR
        if operation == abi.MDIC_WRITE:
            self._write(register, mdic & 0xFFFF)
            return result
        return result & ~0xFFFF | self._read(register)

    def _read(self, register: int) -> int:
        linked = {
            abi.PHY_STATUS: abi.PHY_STATUS_LINK | abi.PHY_STATUS_AUTONEG_DONE,
            abi.PHY_LP_ABILITY: _LP_ALL_SPEEDS,
            abi.PHY_EXPANSION: 1,
            abi.PHY_1000T_STATUS: _1000T_STATUS,
            abi.PHY_SPEC_STATUS: _SPEC_STATUS_LINKED,
        }
        value = self._registers.get(register, 0)
        if register == abi.PHY_STATUS:
            value = _STATUS
        return value | linked.get(register, 0) if self.link else value

    def _write(self, register: int, value: int) -> None:
        if register == abi.PHY_CTRL and value & abi.PHY_CTRL_RESET:
            self.reset()
        elif register in _WRITABLE:
            keep = ~_SELF_CLEARING if register == abi.PHY_CTRL else 0xFFFF
            self._registers[register] = value & keep

    def save(self) -> dict[str, Any]:
        registers = {str(register): value for register, value in self._registers.items()}
        return {"carrier": self.carrier, "registers": registers}

    def load(self, state: dict[str, Any]) -> None:
        self.carrier = state["carrier"]
        self._registers = {int(register): value for register, value in state["registers"].items()}
