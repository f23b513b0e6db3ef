"""A device that moves memory by itself: the smallest thing that makes an IOMMU needed.

::

    0x00  identity, "HDMA"      0x18  length in bytes
    0x08  source address        0x20  command: 1 copies; reads 0 when done
    0x10  destination           0x28  status: 0 idle, 1 done, 2 failed    0x30  the address that failed

Its registers are one page. Used in two ways: *emulated*, the page traps and the monitor is the device
(``read``, ``write``); *passed through*, the page is memory of the guest's own that the device looks at
(``poll``), as a controller with its doorbells in memory does: no exit. What it reaches is its ``Port``:
the same engine behind a bounds check, a raw bus, or an IOMMU.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Protocol

from hostel.errors import MemoryFault

from .iommu import Iommu, Memory, Refusal

ID, SOURCE, DESTINATION, LENGTH, COMMAND, STATUS, FAILED = range(0, 0x38, 8)
IDENTITY = int.from_bytes(b"HDMA", "little")
SIZE = 4096
IDLE, DONE, ERROR = range(3)
COPY = 1
_LONGEST = 1 << 20
"""Bytes of one command; more is refused, so that no guest keeps the host busy."""
_U64 = Struct("<Q")


class Denied(Exception):
    """The bus did not carry the access."""

    def __init__(self, address: int) -> None:
        super().__init__(f"DMA to {address:#x} denied")
        self.address = address


class Port(Protocol):
    """The device's way to memory."""

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...


class DirectPort:
    """No translation. Given a machine's memory, a guest address is checked against it; given the host's,
    whatever the device names is reached."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def read(self, address: int, size: int) -> bytes:
        try:
            return self._memory.read(address, size)
        except MemoryFault:
            raise Denied(address) from None

    def write(self, address: int, data: bytes) -> None:
        try:
            self._memory.write(address, data)
        except MemoryFault:
            raise Denied(address) from None


class TranslatedPort:
    """Through an IOMMU, as ``source``: page by page."""

    def __init__(self, iommu: Iommu, memory: Memory, source: int) -> None:
        self._iommu, self._source = iommu, source
        self._direct = DirectPort(memory)

    def _pieces(self, address: int, size: int, *, is_write: bool) -> list[tuple[int, int]]:
        pieces = []
        while size:
            try:
                hpa, contiguous = self._iommu.translate(self._source, address, is_write=is_write)
            except Refusal:
                raise Denied(address) from None
            length = min(size, contiguous)
            pieces.append((hpa, length))
            address, size = address + length, size - length
        return pieces

    def read(self, address: int, size: int) -> bytes:
        pieces = self._pieces(address, size, is_write=False)
        return b"".join(self._direct.read(hpa, length) for hpa, length in pieces)

    def write(self, address: int, data: bytes) -> None:
        at = 0
        for hpa, length in self._pieces(address, len(data), is_write=True):
            self._direct.write(hpa, data[at : at + length])
            at += length


class CopyEngine:
    """``page`` holds the registers: a frame that a guest has mapped, or bytes of our own."""

    def __init__(self, port: Port, page: memoryview | None = None) -> None:
        self._port = port
        self._page = memoryview(bytearray(SIZE)) if page is None else page
        self.copies = 0
        self.reset()

    def reset(self) -> None:
        self._page[:] = bytes(SIZE)
        self._set(ID, IDENTITY)

    # --- Emulated: a Device of the bus ---

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._page[offset : offset + size]).ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        if offset >= SOURCE and offset + len(data) <= STATUS:
            self._page[offset : offset + len(data)] = data
            self.poll()

    def save(self) -> dict[str, Any]:
        return {"page": bytes(self._page)}

    def load(self, state: dict[str, Any]) -> None:
        self._page[:] = state["page"]

    # --- Passed through: what the device does while nobody looks ---

    def poll(self) -> bool:
        """Do what the command register asks; whether it asked."""
        if self._get(COMMAND) != COPY:
            return False
        self._set(COMMAND, 0)
        try:
            self._copy(self._get(SOURCE), self._get(DESTINATION), self._get(LENGTH))
        except Denied as denied:
            self._set(FAILED, denied.address)
            self._set(STATUS, ERROR)
        else:
            self._set(STATUS, DONE)
        return True

    def _copy(self, source: int, destination: int, length: int) -> None:
        if length > _LONGEST:
            raise Denied(source)
        self._port.write(destination, self._port.read(source, length))
        self.copies += 1

    def _get(self, register: int) -> int:
        value: int = _U64.unpack_from(self._page, register)[0]
        return value

    def _set(self, register: int, value: int) -> None:
        _U64.pack_into(self._page, register, value & (1 << 64) - 1)
