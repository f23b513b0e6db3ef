"""PCI: configuration space through ECAM, functions, BARs.

::

    ECAM + (device << 15 | function << 12 | register) ─► PciBus ─► PciFunction.config
                                  COMMAND, BARs written ─► BAR ─► MMIO or port bus, at its address

Rules:

* One bus, ECAM only (described by MCFG): ports 0xcf8/0xcfc are nobody's, so they read as all ones and
  a kernel finds no "mechanism #1", which would cost it thousands of exits.
* Which bits of config space a guest may write is a mask beside it; everything else follows from what
  then stands there. A BAR's size is told by the bits of its register that stay 0 (PCI Local Bus 3.0
  §6.2.5.1), which is the mask again.
* Reading config space has no effect, so it need not be an exit: ECAM is memory that the guest may read
  (a read-only memory slot), and ``config`` is a page of it. Only writes come here. A function whose
  reads must come here from now on says so with ``reads_exit``.
* We are the firmware: each BAR has an address before the guest starts, and a kernel keeps it. A guest
  may move a BAR wherever it likes. Where somebody else is already, the BAR answers nowhere.
* A function that interrupts by a wire (INTx) is given one: level-triggered, its own (``connect``); the
  _PRT of the ACPI tables says which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hostel.abi import pci as abi
from hostel.vmm.bus import Bus, Device

from . import layout
from .irq import Interrupt

HOST_BRIDGE_ID = (0x1B36, 0x0008)
"""The generic host bridge that QEMU registered: no driver binds to it, and none is needed."""
CLASS_HOST_BRIDGE = 0x06_0000


def _nothing() -> None:
    pass


class Bar:
    """One BAR: where the guest put it, and whether it answers there."""

    def __init__(self, index: int, size: int, device: Device, *, wide: bool, io: bool) -> None:
        self.index = index
        self.size = size
        self.device = device
        self.wide = wide
        self.io = io
        """In the ports' address space."""
        self.home = 0
        """The address that the firmware gave it."""
        self.mapped: int | None = None
        self.on_move: Callable[[int | None, int | None], None] | None = None
        """Told the old and the new address."""

    @property
    def register(self) -> int:
        return abi.BASE_ADDRESS_0 + 4 * self.index

    @property
    def width(self) -> int:
        return 8 if self.wide else 4

    @property
    def flags(self) -> int:
        """The register's read-only bits (PCI Local Bus 3.0 §6.2.5.1)."""
        if self.io:
            return abi.BASE_ADDRESS_SPACE_IO
        return abi.BASE_ADDRESS_MEM_TYPE_64 if self.wide else 0


class PciFunction:
    """A function's configuration space. Subclasses add BARs and capabilities, then sit on a bus."""

    def __init__(
        self,
        name: str,
        *,
        ids: tuple[int, int],
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        self.name = name
        self.config: bytearray | memoryview = bytearray(abi.CONFIG_SIZE)
        self.writable = bytearray(abi.CONFIG_SIZE)
        self.bars: dict[int, Bar] = {}
        self.mmio: Bus | None = None
        self.ports: Bus | None = None
        self.reads_exit: Callable[[], None] = _nothing
        """Set by the bus."""
        self._line: Interrupt | None = None
        self._interrupting = False
        self._capabilities_end = abi.STD_HEADER_SIZEOF
        self._last_capability = abi.CAPABILITY_LIST
        self._put(abi.VENDOR_ID, 2, ids[0])
        self._put(abi.DEVICE_ID, 2, ids[1])
        self._put(abi.REVISION_ID, 1, revision)
        self._put(abi.CLASS_PROG, 3, class_code)
        self._put(abi.SUBSYSTEM_VENDOR_ID, 2, subsystem[0])
        self._put(abi.SUBSYSTEM_ID, 2, subsystem[1])
        command = abi.COMMAND_MEMORY | abi.COMMAND_MASTER | abi.COMMAND_INTX_DISABLE
        self._allow(abi.COMMAND, command.to_bytes(2, "little"))
        self._allow(abi.INTERRUPT_LINE, b"\xff")

    # -- building -----------------------------------------------------------------------------

    def add_bar(
        self, index: int, size: int, device: Device, *, wide: bool = False, io: bool = False
    ) -> Bar:
        """A BAR of a power of two, at least 16 bytes; ``wide``: 64 bits, two registers; ``io``: ports."""
        if size < 16 or size & (size - 1):
            raise ValueError(f"a BAR of {size:#x} bytes")
        bar = self.bars[index] = Bar(index, size, device, wide=wide, io=io)
        self._put(bar.register, bar.width, bar.flags)
        self._allow(bar.register, (-size & (1 << 8 * bar.width) - 1).to_bytes(bar.width, "little"))
        self.writable[abi.COMMAND] |= abi.COMMAND_IO * io
        return bar

    def connect(self, line: Interrupt) -> None:
        """Interrupt by this wire, as pin INTA#."""
        self._line = line
        self._put(abi.INTERRUPT_PIN, 1, 1)

    def add_capability(self, kind: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the list; ``body`` follows the ID and the next pointer. Its offset."""
        offset = self._capabilities_end
        self.config[offset] = kind
        self.config[offset + 2 : offset + 2 + len(body)] = body
        self._allow(offset + 2, writable)
        link = abi.CAPABILITY_LIST
        if self._last_capability != link:
            link = self._last_capability + 1
        self.config[link] = offset
        self._last_capability = offset
        self._capabilities_end = offset + (2 + len(body) + 3 & ~3)
        self._put(abi.STATUS, 2, abi.STATUS_CAP_LIST)
        return offset

    def _put(self, offset: int, width: int, value: int) -> None:
        self.config[offset : offset + width] = value.to_bytes(width, "little")

    def _allow(self, offset: int, mask: bytes) -> None:
        self.writable[offset : offset + len(mask)] = mask

    def place(self, mmio: Bus, ports: Bus | None, addresses: dict[int, int]) -> None:
        """Sit on a bus; ``addresses`` are the firmware's, by BAR."""
        self.mmio, self.ports = mmio, ports
        for index, address in addresses.items():
            self.bars[index].home = address
        self._send_bars_home()

    def _send_bars_home(self) -> None:
        for bar in self.bars.values():
            self._put(bar.register, bar.width, bar.home | bar.flags)

    # -- the guest's accesses -----------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        for at, value in enumerate(data, offset):
            mask = self.writable[at]
            self.config[at] = self.config[at] & ~mask | value & mask
        if offset < abi.STD_HEADER_SIZEOF:
            self._move_bars()
            self._drive_line()

    @property
    def command(self) -> int:
        return int.from_bytes(self.config[abi.COMMAND : abi.COMMAND + 2], "little")

    def _move_bars(self) -> None:
        command = self.command
        for bar in self.bars.values():
            enabled = command & (abi.COMMAND_IO if bar.io else abi.COMMAND_MEMORY)
            register = self.config[bar.register : bar.register + bar.width]
            value = int.from_bytes(register, "little")
            wanted = value & -bar.size if enabled else None
            if wanted != bar.mapped:
                self._map(bar, wanted)

    def _map(self, bar: Bar, address: int | None) -> None:
        bus = self.ports if bar.io else self.mmio
        if bus is None:
            return
        before = bar.mapped
        if before is not None:
            bus.remove(before)
            bar.mapped = None
        if address is not None:
            try:
                bus.add(address, bar.size, bar.device, f"{self.name} bar {bar.index}")
                bar.mapped = address
            except ValueError:  # the guest put it on top of another device: it answers nowhere
                pass
        if bar.on_move is not None and before != bar.mapped:
            bar.on_move(before, bar.mapped)

    # -- interrupts ---------------------------------------------------------------------------

    def interrupt(self, level: bool) -> None:
        """Drive INTA#. One thread at a time, and never while another writes the config space."""
        self._interrupting = level
        self._drive_line()

    def _drive_line(self) -> None:
        """The status bit says what the function wants, whether or not the wire may (§6.2.3)."""
        if self._line is not None:
            status = self.config[abi.STATUS] & ~abi.STATUS_INTERRUPT
            self.config[abi.STATUS] = status | abi.STATUS_INTERRUPT * self._interrupting
            self._line.set(self._interrupting and not self.command & abi.COMMAND_INTX_DISABLE)

    # -- life cycle ---------------------------------------------------------------------------

    def reset(self) -> None:
        """As after power-on, with the firmware's work done again."""
        self._interrupting = False
        for at, mask in enumerate(self.writable):
            self.config[at] &= ~mask
        self._send_bars_home()
        self._move_bars()
        self._drive_line()

    def close(self) -> None:
        for bar in self.bars.values():
            self._map(bar, None)

    def save(self) -> dict[str, Any]:
        return {"config": self.config.hex()}

    def load(self, state: dict[str, Any]) -> None:
        saved = bytes.fromhex(state["config"])
        for at, mask in enumerate(self.writable):
            self.config[at] = self.config[at] & ~mask | saved[at] & mask
        self._move_bars()

    def statistics(self) -> dict[str, Any]:
        return {}


class PciBus:
    """Bus 0 and its ECAM window: ``mmio.add(layout.ECAM_START, layout.ECAM_SIZE, pci, "pci")``."""

    def __init__(
        self,
        mmio: Bus,
        ecam: memoryview | None = None,
        reads_exit: Callable[[], None] = _nothing,
        *,
        ports: Bus | None = None,
    ) -> None:
        self.functions: dict[int, PciFunction] = {}
        """By device number; every device has one function."""
        self._ecam = ecam
        """The memory that the guest reads, if it does: all ones, but for the functions."""
        self._reads_exit = reads_exit
        """Takes that memory away, so that reads come here."""
        self._mmio = mmio
        self._ports = ports
        self._window = layout.PCI_MMIO32_START
        self._io_window = layout.PCI_IO_START
        self._lock = threading.Lock()
        self.add(PciFunction("host bridge", ids=HOST_BRIDGE_ID, class_code=CLASS_HOST_BRIDGE))

    def add(self, function: PciFunction) -> int:
        """Seat ``function`` at the next free device number, its BARs assigned; the number."""
        with self._lock:
            number = len(self.functions)
            if number >= abi.DEVICES:
                raise ValueError(f"no slot is left on the PCI bus for {function.name}")
            addresses = {index: self._allocate(bar) for index, bar in function.bars.items()}
            function.place(self._mmio, self._ports, addresses)
            self._show(function, number * abi.FUNCTIONS * abi.CONFIG_SIZE)
            self.functions[number] = function
            return number

    def _show(self, function: PciFunction, offset: int) -> None:
        function.reads_exit = self._reads_exit
        if self._ecam is not None:
            page = self._ecam[offset : offset + abi.CONFIG_SIZE]
            page[:] = function.config
            function.config = page

    def _allocate(self, bar: Bar) -> int:
        """The next address of the 32-bit window, at least a page apart: each can be mapped alone."""
        if bar.io:
            return self._allocate_io(bar.size)
        size = max(bar.size, 4096)
        address = -(-self._window // size) * size
        if address + size > layout.PCI_MMIO32_END:
            raise ValueError(f"the PCI MMIO window has no {size:#x} bytes left")
        self._window = address + size
        return address

    def _allocate_io(self, size: int) -> int:
        port = -(-self._io_window // size) * size
        if port + size > layout.PCI_IO_END:
            raise ValueError(f"the PCI I/O window has no {size:#x} ports left")
        self._io_window = port + size
        return port

    def _find(self, offset: int) -> PciFunction | None:
        device, function = divmod(offset // abi.CONFIG_SIZE, abi.FUNCTIONS)
        return self.functions.get(device) if function == 0 and device < abi.DEVICES else None

    def read(self, offset: int, size: int) -> bytes:
        """An empty slot reads as all ones: that is how a kernel knows (PCI Local Bus 3.0 §6.1)."""
        function = self._find(offset)
        if function is None:
            return b"\xff" * size
        return function.read_config(offset % abi.CONFIG_SIZE, size).ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        if (function := self._find(offset)) is not None:
            at = offset % abi.CONFIG_SIZE
            function.write_config(at, data[: abi.CONFIG_SIZE - at])

    def reset(self) -> None:
        for function in self.functions.values():
            function.reset()

    def close(self) -> None:
        for function in self.functions.values():
            function.close()

    def save(self) -> dict[str, Any]:
        return {str(number): function.save() for number, function in self.functions.items()}

    def load(self, state: dict[str, Any]) -> None:
        for number, saved in state.items():
            self.functions[int(number)].load(saved)

    def statistics(self) -> dict[str, Any]:
        return {
            f.name: statistics for f in self.functions.values() if (statistics := f.statistics())
        }
