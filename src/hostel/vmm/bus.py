"""The bus: from an address to the device that owns it. One bus for ports, one for MMIO.

::

    exit ──► Bus.handle_pio / handle_mmio ──► the owner of the address ──► device.read(offset, size)
                                          └─► nobody: counted; reads as all ones, writes are dropped

Rules:

* A device sees offsets from its base and never more than ``width`` bytes at once. A wider access, or
  one that leaves its range, arrives in pieces at ascending addresses, as a PC's chipset splits it for
  a narrow device (the serial port is eight bits wide: ``inw`` reads two registers).
* A device is entered by one thread at a time: the bus holds ``lock(device)`` around each access. Who
  enters a device from elsewhere (input from the host) takes the same lock.
* The table is replaced, never changed: a vCPU that moves a BAR does not disturb one that looks up.
* A bus may be held back: a vCPU that comes to it waits until its devices are seated (``release``).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from hostel.hypervisor import MmioExit, PioExit

MAX_UNCLAIMED = 4096
"""Addresses counted one by one; a guest that touches more adds to the key -1."""


class Device(Protocol):
    """What a bus carries. State is plain data; ``load(save())`` changes nothing."""

    def read(self, offset: int, size: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def reset(self) -> None: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class Claim:
    """One range of the bus and its owner."""

    __slots__ = ("base", "device", "end", "lock", "name", "reads", "width", "writes")

    def __init__(self, device: Device, lock: threading.RLock, *, name: str, width: int) -> None:
        self.base = self.end = 0
        self.device = device
        self.lock = lock
        self.name = name
        self.width = width
        self.reads = 0
        self.writes = 0


class Bus:
    """An address space of devices."""

    def __init__(self) -> None:
        self.unclaimed: Counter[int] = Counter()
        self._held: threading.Event | None = None
        self._change = threading.Lock()
        self._table: tuple[list[int], list[Claim]] = ([], [])

    # -- who is where -------------------------------------------------------------------------

    def add(self, base: int, size: int, device: Device, name: str, *, width: int = 8) -> None:
        """Give ``[base, base + size)`` to ``device``; ``ValueError`` where somebody is already."""
        with self._change:
            bases, claims = list(self._table[0]), list(self._table[1])
            at = bisect_right(bases, base)
            for other in claims[max(at - 1, 0) : at + 1]:
                if base < other.end and other.base < base + size:
                    raise ValueError(f"{name} at {base:#x}+{size:#x} overlaps {other.name}")
            bases.insert(at, base)
            claim = Claim(device, self._lock_for(device), name=name, width=width)
            claim.base, claim.end = base, base + size
            claims.insert(at, claim)
            self._table = (bases, claims)

    def remove(self, base: int) -> None:
        with self._change:
            bases, claims = list(self._table[0]), list(self._table[1])
            at = bases.index(base)
            del bases[at], claims[at]
            self._table = (bases, claims)

    def lock(self, device: Device) -> threading.RLock:
        """What the bus holds around each access to ``device``."""
        for claim in self._table[1]:
            if claim.device is device:
                return claim.lock
        raise ValueError(f"{device!r} is not on this bus")

    def devices(self) -> Iterator[Device]:
        """Every device once, by ascending address."""
        seen: set[int] = set()
        for claim in self._table[1]:
            if id(claim.device) not in seen:
                seen.add(id(claim.device))
                yield claim.device

    def _lock_for(self, device: Device) -> threading.RLock:
        for claim in self._table[1]:
            if claim.device is device:
                return claim.lock
        return threading.RLock()

    def _find(self, address: int) -> Claim | None:
        bases, claims = self._table
        at = bisect_right(bases, address) - 1
        if at >= 0 and address < claims[at].end:
            return claims[at]
        return None

    # -- accesses -----------------------------------------------------------------------------

    def hold(self) -> None:
        """Before a vCPU runs: its exits will wait for ``release``."""
        self._held = threading.Event()

    def release(self) -> None:
        """Idempotent; from any thread."""
        held, self._held = self._held, None
        if held is not None:
            held.set()

    def _wait(self) -> None:
        if (held := self._held) is not None:
            held.wait()

    def read(self, address: int, size: int) -> bytes:
        claim = self._find(address)
        if claim is None:
            return self._read_nobody(address, size)
        if size > claim.width or address + size > claim.end:
            return b"".join(self.read(at, n) for at, n in _pieces(claim, address, size))
        with claim.lock:
            claim.reads += 1
            return claim.device.read(address - claim.base, size)

    def write(self, address: int, data: bytes) -> None:
        claim = self._find(address)
        if claim is None:
            self._count_nobody(address)
        elif len(data) > claim.width or address + len(data) > claim.end:
            for at, n in _pieces(claim, address, len(data)):
                self.write(at, data[at - address : at - address + n])
        else:
            with claim.lock:
                claim.writes += 1
                claim.device.write(address - claim.base, data)

    def handle_pio(self, exit: PioExit) -> None:
        """``rep ins``/``outs`` is one exit with a count: every item goes to the same port."""
        if self._held is not None:
            self._wait()
        port, size, data = exit.port, exit.size, exit.data
        for at in range(0, size * exit.count, size):
            if exit.is_write:
                self.write(port, bytes(data[at : at + size]))
            else:
                data[at : at + size] = self.read(port, size)

    def handle_mmio(self, exit: MmioExit) -> None:
        if self._held is not None:
            self._wait()
        if exit.is_write:
            self.write(exit.address, bytes(exit.data))
        else:
            exit.data[:] = self.read(exit.address, len(exit.data))

    def _read_nobody(self, address: int, size: int) -> bytes:
        """A read that no device answers floats high on a PC's bus."""
        self._count_nobody(address)
        above = self._table[0][bisect_right(self._table[0], address) :][:1]
        if above and above[0] < address + size:  # its tail reaches a device
            return b"".join(self.read(address + n, 1) for n in range(size))
        return b"\xff" * size

    def _count_nobody(self, address: int) -> None:
        with self._change:
            known = address in self.unclaimed or len(self.unclaimed) < MAX_UNCLAIMED
            self.unclaimed[address if known else -1] += 1

    # -- statistics ---------------------------------------------------------------------------

    def statistics(self) -> dict[str, dict[str, int]]:
        """Reads and writes by device name."""
        result: dict[str, dict[str, int]] = {}
        for claim in self._table[1]:
            entry = result.setdefault(claim.name, {"reads": 0, "writes": 0})
            entry["reads"] += claim.reads
            entry["writes"] += claim.writes
        return result


def _pieces(claim: Claim, address: int, size: int) -> Iterator[tuple[int, int]]:
    """``(address, size)`` of the accesses that one too wide for ``claim`` becomes."""
    step = claim.width if address + size <= claim.end else 1
    for at in range(address, address + size, step):
        yield at, min(step, address + size - at)
