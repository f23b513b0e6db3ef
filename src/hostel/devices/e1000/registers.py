"""What reading and writing the card's registers does, and the two windows on them.

Registers are 32 bits wide and taken whole (8254x SDM §13.2). ``READS`` and ``WRITES`` are the ones that do
something; ``plain`` ones keep what is written; all others read as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hostel.abi import e1000 as abi

from .ring import HEAD, LENGTH

if TYPE_CHECKING:
    from .card import E1000

_INDEX_MASK = 0xFFFF
_LENGTH_MASK = 0xF_FF80  # §13.4.26: a multiple of 128 bytes
_BASE_MASK = 0xFFFF_FFF0
_PLAIN = {
    *(abi.CTRL_EXT, abi.FCAL, abi.FCAH, abi.FCT, abi.VET, abi.FCTTV, abi.TXCW, abi.TIPG, abi.AIFS),
    *(abi.LEDCTL, abi.PBA, abi.FCRTL, abi.FCRTH, abi.RDTR, abi.RXDCTL, abi.RADV, abi.RSRPD),
    *(abi.TIDV, abi.TXDCTL, abi.TADV, abi.TSPMT, abi.RXCSUM, abi.WUC, abi.WUFC, abi.MANC),
    *(abi.RDBAH, abi.TDBAH),
}
_TABLES = (
    (abi.MTA, 4 * abi.MTA_SIZE),
    (abi.RAL, 8 * abi.RA_COUNT),
    (abi.VFTA, 4 * abi.VFTA_SIZE),
)


def plain(offset: int) -> bool:
    return offset in _PLAIN or any(at <= offset < at + size for at, size in _TABLES)


# --- General -----------------------------------------------------------------------------------


def _write_ctrl(card: E1000, value: int) -> None:
    if value & abi.CTRL_RST:
        card.power_up()
        return
    if value & abi.CTRL_PHY_RST:
        card.phy.reset()
    before = _read_status(card)
    card.registers[abi.CTRL] = value & ~abi.CTRL_PHY_RST
    if _read_status(card) != before:
        card.raise_causes(abi.INT_LSC)


def _read_status(card: E1000) -> int:
    """§13.4.2: the MAC sees the link once the driver set it up (CTRL.SLU)."""
    up = card.phy.link and card.registers.get(abi.CTRL, 0) & abi.CTRL_SLU
    return abi.STATUS_FD | abi.STATUS_SPEED_1000 | (abi.STATUS_LU if up else 0)


def _write_mdic(card: E1000, value: int) -> None:
    linked = card.phy.link
    card.registers[abi.MDIC] = card.phy.command(value)
    causes = abi.INT_MDAC if value & abi.MDIC_INTERRUPT else 0
    if card.phy.link != linked:
        causes |= abi.INT_LSC
    if causes:
        card.raise_causes(causes)


def _write_eerd(card: E1000, value: int) -> None:
    card.registers[abi.EERD] = card.eeprom.read_word(value)


# --- Interrupts (§13.4.17 – 13.4.21) ---------------------------------------------------------------


def _read_icr(card: E1000) -> int:
    """Reading acknowledges."""
    causes, card.icr = card.icr, 0
    card.update_interrupt()
    return causes


def _write_icr(card: E1000, value: int) -> None:
    card.icr &= ~value
    card.update_interrupt()


def _write_ics(card: E1000, value: int) -> None:
    card.raise_causes(value & abi.INT_ALL)


def _write_ims(card: E1000, value: int) -> None:
    card.ims |= value & abi.INT_ALL
    card.update_interrupt()


def _write_imc(card: E1000, value: int) -> None:
    card.ims &= ~value
    card.update_interrupt()


# --- Rings -------------------------------------------------------------------------------------


def _masked(offset: int, mask: int) -> Callable[[E1000, int], None]:
    def write(card: E1000, value: int) -> None:
        card.registers[offset] = value & mask

    return write


def _write_receive_tail(card: E1000, value: int) -> None:
    card.registers[abi.RDT] = value & _INDEX_MASK
    card.receive_again()


def _write_receive_control(card: E1000, value: int) -> None:
    card.registers[abi.RCTL] = value
    card.receive_again()


def _write_transmit_tail(card: E1000, value: int) -> None:
    card.registers[abi.TDT] = value & _INDEX_MASK
    card.transmit()


def _write_transmit_control(card: E1000, value: int) -> None:
    card.registers[abi.TCTL] = value
    card.transmit()


READS: dict[int, Callable[[E1000], int]] = {
    abi.STATUS: _read_status,
    abi.EECD: lambda card: card.eeprom.pins,
    abi.ICR: _read_icr,
    abi.IMS: lambda card: card.ims,
}
WRITES: dict[int, Callable[[E1000, int], None]] = {
    abi.CTRL: _write_ctrl,
    abi.EECD: lambda card, value: card.eeprom.set_pins(value),
    abi.EERD: _write_eerd,
    abi.MDIC: _write_mdic,
    abi.ICR: _write_icr,
    abi.ICS: _write_ics,
    abi.IMS: _write_ims,
    abi.IMC: _write_imc,
    abi.RCTL: _write_receive_control,
    abi.TCTL: _write_transmit_control,
    abi.RDT: _write_receive_tail,
    abi.TDT: _write_transmit_tail,
}
WRITES[abi.ITR] = _masked(abi.ITR, 0xFFFF)
for _first in (abi.RDBAL, abi.TDBAL):
    WRITES[_first] = _masked(_first, _BASE_MASK)
    WRITES[_first + LENGTH] = _masked(_first + LENGTH, _LENGTH_MASK)
    WRITES[_first + HEAD] = _masked(_first + HEAD, _INDEX_MASK)


# --- Windows -----------------------------------------------------------------------------------


class _Window:
    """Part of what the bus asks of a device: the function resets, saves and loads all of it."""

    def reset(self) -> None: ...

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None: ...


class Window(_Window):
    """BAR 0: the registers as memory."""

    def __init__(self, card: E1000) -> None:
        self._card = card

    def read(self, offset: int, size: int) -> bytes:
        word = self._card.read_register(offset & ~3).to_bytes(4, "little")
        return word[offset & 3 :][:size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        if len(data) == 4 and not offset & 3:
            self._card.write_register(offset, int.from_bytes(data, "little"))


class Ports(_Window):
    """BAR 2 (§13.3.1): a register's offset in the first four ports, its value in the next four."""

    def __init__(self, card: E1000) -> None:
        self._card = card
        self.address = 0

    def read(self, offset: int, size: int) -> bytes:
        value = 0
        if offset == abi.IOADDR:
            value = self.address
        elif offset == abi.IODATA:
            value = self._card.read_register(self.address & ~3)
        return value.to_bytes(4, "little")[:size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if len(data) != 4:
            return
        if offset == abi.IOADDR:
            self.address = value % abi.REGISTERS_SIZE
        elif offset == abi.IODATA:
            self._card.write_register(self.address & ~3, value)
