"""MSI-X: a PCI function's table of messages (PCI Local Bus 3.0 §6.8.2).

::

    table entry: address, data, mask bit ─┐
    capability: enable, function mask ────┴─► MsiSlot: program, mask, unmask

A vector interrupts when MSI-X is enabled and neither the function nor the vector is masked; else the
slot is masked and remembers (see ``irq.py``), and the Pending Bit Array shows it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Any

from hostel.abi import pci as abi
from hostel.hypervisor import MsiMessage

from .irq import MsiSlot
from .pci import PciFunction

PBA_OFFSET = 0x8000
"""Behind the largest table: 2048 entries of 16 bytes."""
BAR_SIZE = 0x1_0000


class MsixTable:
    """The table and the Pending Bit Array, as the device of a BAR of their own."""

    def __init__(self, function: PciFunction, bar: int, slots: Sequence[MsiSlot]) -> None:
        self._slots = slots
        self._function = function
        self._table = bytearray(abi.MSIX_ENTRY.size * len(slots))
        self._lock = threading.Lock()
        function.add_bar(bar, BAR_SIZE, self)
        body = bytearray(abi.CAP_MSIX_SIZEOF)
        body[abi.MSIX_FLAGS : abi.MSIX_TABLE] = (len(slots) - 1).to_bytes(2, "little")
        body[abi.MSIX_TABLE : abi.MSIX_PBA] = bar.to_bytes(4, "little")
        body[abi.MSIX_PBA :] = (PBA_OFFSET | bar).to_bytes(4, "little")
        control = (abi.MSIX_FLAGS_ENABLE | abi.MSIX_FLAGS_MASKALL).to_bytes(2, "little")
        self._control = abi.MSIX_FLAGS + function.add_capability(
            abi.CAP_ID_MSIX, bytes(body[2:]), control
        )
        self._clear()

    @property
    def vectors(self) -> int:
        return len(self._slots)

    def touches(self, offset: int, size: int) -> bool:
        """Whether a config write reaches the control word: then call ``update``."""
        return offset < self._control + 2 and self._control < offset + size

    def update(self) -> None:
        """Bring every slot in line with the table and the control word."""
        with self._lock:
            control = int.from_bytes(self._function.read_config(self._control, 2), "little")
            masked_all = control & abi.MSIX_FLAGS_MASKALL or not control & abi.MSIX_FLAGS_ENABLE
            for vector in range(self.vectors):
                self._apply(vector, bool(masked_all))

    def _apply(self, vector: int, masked_all: bool) -> None:
        slot = self._slots[vector]
        low, high, data, vector_control = abi.MSIX_ENTRY.unpack_from(
            self._table, abi.MSIX_ENTRY.size * vector
        )
        masked = masked_all or bool(vector_control & abi.MSIX_ENTRY_CTRL_MASKBIT)
        if masked:
            if not slot.masked:
                slot.mask()
            return
        slot.program(MsiMessage(high << 32 | low, data))
        if slot.masked:
            slot.unmask()

    # -- the guest's accesses -----------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        if offset >= PBA_OFFSET:
            at = offset - PBA_OFFSET
            return self._pending()[at : at + size].ljust(size, b"\0")
        return bytes(self._table[offset : offset + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Writes to the Pending Bit Array are dropped (§6.8.2)."""
        room = max(len(self._table) - offset, 0)
        if data[:room]:
            with self._lock:
                self._table[offset : offset + len(data[:room])] = data[:room]
            self.update()

    def _pending(self) -> bytes:
        bits = sum(slot.pending << vector for vector, slot in enumerate(self._slots))
        return bits.to_bytes(-(-self.vectors // 64) * 8, "little")

    # -- life cycle ---------------------------------------------------------------------------

    def _clear(self) -> None:
        masked = abi.MSIX_ENTRY.pack(0, 0, 0, abi.MSIX_ENTRY_CTRL_MASKBIT)
        self._table[:] = masked * self.vectors

    def reset(self) -> None:
        """After the function's own reset has cleared the control word."""
        self._clear()
        self.update()
        for slot in self._slots:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(slot.eventfd)

    def close(self) -> None:
        for slot in self._slots:
            slot.free()

    def save(self) -> dict[str, Any]:
        pending = [vector for vector, slot in enumerate(self._slots) if slot.pending]
        return {"table": self._table.hex(), "pending": pending}

    def load(self, state: dict[str, Any]) -> None:
        """After the function's config space, which holds the control word."""
        self._table[:] = bytes.fromhex(state["table"])
        for vector in state["pending"]:
            os.eventfd_write(self._slots[vector].eventfd, 1)
        self.update()
