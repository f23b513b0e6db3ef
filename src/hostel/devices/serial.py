"""The serial port: a 16550A UART (National Semiconductor PC16550D data sheet, June 1995).

::

    offset   read             write            with LCR bit 7 (divisor latch)
      0      RBR received     THR to transmit  DLL
      1      IER              IER              DLM
      2      IIR              FCR
      3      LCR              LCR
      4      MCR              MCR
      5      LSR              -
      6      MSR              -
      7      SCR              SCR

The line's speed is of no interest: a byte is transmitted as soon as it is written, and the input
FIFO is refilled from the host as soon as the guest has emptied it. Input is pulled (``source``), never
pushed, so nothing is lost to a slow guest.

Output is handed on in batches: at each newline, when 256 bytes have come together, and otherwise a
moment later (``later`` is asked to call ``flush`` in a few milliseconds, as the bus enters a device).

The interrupt is a level here: high while an enabled cause is pending (data sheet §8.5). Whoever wires
it to an edge-triggered pin gets one edge each time it rises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from hostel.vmm.irq import Interrupt

REGISTERS = 8
FIFO_SIZE = 16
BATCH = 256

IER_RX, IER_THRE, IER_LSR, IER_MSR = 1, 2, 4, 8
IIR_NONE, IIR_THRE, IIR_RX, IIR_LSR, IIR_TIMEOUT, IIR_MSR = 0x01, 0x02, 0x04, 0x06, 0x0C, 0x00
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
TRIGGER = (1, 4, 8, 14)

_PLAIN = ("ier", "fcr", "lcr", "mcr", "msr_delta", "scratch", "divisor", "thre_pending", "overrun")


class Serial:
    """One port. ``source(n)`` gives up to ``n`` bytes that the host has for the guest."""

    def __init__(
        self,
        interrupt: Interrupt,
        output: Callable[[bytes], None],
        *,
        source: Callable[[int], bytes] = lambda limit: b"",
        later: Callable[[Serial], None] | None = None,
    ) -> None:
        self._interrupt = interrupt
        self._output = output
        self._source = source
        self._later = later
        self._flush_is_due = False
        self._batch = bytearray()
        self.reset()

    def reset(self) -> None:
        """Master reset (data sheet §8.1, table I)."""
        self.flush()
        self.ier = self.fcr = self.lcr = self.mcr = self.msr_delta = self.scratch = 0
        self.divisor = 12  # 9600 baud
        self.thre_pending = False
        self.overrun = False
        self.fifo: deque[int] = deque()
        self._update()

    def flush(self) -> None:
        """Hand on what the guest has written so far."""
        self._flush_is_due = False
        if self._batch:
            data, self._batch = bytes(self._batch), bytearray()
            self._output(data)

    def poll_input(self) -> None:
        """The host has something to read: take what fits."""
        room = (FIFO_SIZE if self.fcr & FCR_ENABLE else 1) - len(self.fifo)
        if not self.mcr & MCR_LOOP and room > 0 and (data := self._source(room)):
            self.fifo.extend(data)
            self._update()

    # -- registers ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        return bytes((self._READ[offset](self),))

    def write(self, offset: int, data: bytes) -> None:
        if handler := self._WRITE.get(offset):
            handler(self, data[0])

    def _read_data(self) -> int:
        if self.lcr & LCR_DLAB:
            return self.divisor & 0xFF
        value = self.fifo.popleft() if self.fifo else 0
        if not self.fifo:
            self.poll_input()
        self._update()
        return value

    def _write_data(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF00 | value
            return
        if self.mcr & MCR_LOOP:
            self._loop_back(value)
        else:
            self._transmit(value)
        self.thre_pending = True  # it is gone already
        self._update()

    def _transmit(self, value: int) -> None:
        self._batch.append(value)
        if value == 0x0A or len(self._batch) >= BATCH or self._later is None:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            self._later(self)

    def _loop_back(self, value: int) -> None:
        if len(self.fifo) < (FIFO_SIZE if self.fcr & FCR_ENABLE else 1):
            self.fifo.append(value)
        else:
            self.overrun = True

    def _read_ier(self) -> int:
        return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier

    def _write_ier(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF | value << 8
            return
        if value & ~self.ier & IER_THRE:  # enabling it with an empty transmitter interrupts at once
            self.thre_pending = True
        self.ier = value & 0x0F
        self._update()

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:  # reading it is the acknowledgement (data sheet table III)
            self.thre_pending = False
            self._update()
        return cause | (IIR_FIFO if self.fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
            self.fifo.clear()
        self.fcr = value & 0xC9
        self.poll_input()
        self._update()

    def _write_lcr(self, value: int) -> None:
        self.lcr = value

    def _write_mcr(self, value: int) -> None:
        before = self._lines()
        self.mcr = value & 0x1F
        changed = before ^ self._lines()
        fallen_ri = before & changed & MSR_RI  # the ring indicator reports its trailing edge only
        self.msr_delta |= (changed & ~MSR_RI | fallen_ri) >> 4
        self.poll_input()
        self._update()

    def _read_lsr(self) -> int:
        value = LSR_THRE | LSR_TEMT | (LSR_DR if self.fifo else 0)
        if self.overrun:
            self.overrun = False
            self._update()
            value |= LSR_OE
        return value

    def _read_msr(self) -> int:
        value = self._lines() | self.msr_delta
        if self.msr_delta:
            self.msr_delta = 0
            self._update()
        return value

    def _write_scratch(self, value: int) -> None:
        self.scratch = value

    def _lines(self) -> int:
        """The modem's lines: a carrier is there; in loopback they mirror our own outputs (§8.6.7)."""
        if not self.mcr & MCR_LOOP:
            return MSR_DCD | MSR_DSR | MSR_CTS
        mirror = ((MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(line for output, line in mirror if self.mcr & output)

    # -- the interrupt ------------------------------------------------------------------------

    def _cause(self) -> int:
        """What IIR shows: the pending cause of highest priority (data sheet table III)."""
        if self.ier & IER_LSR and self.overrun:
            return IIR_LSR
        if self.ier & IER_RX and self.fifo:
            full = not self.fcr & FCR_ENABLE or len(self.fifo) >= TRIGGER[self.fcr >> 6]
            return IIR_RX if full else IIR_TIMEOUT
        if self.ier & IER_THRE and self.thre_pending:
            return IIR_THRE
        if self.ier & IER_MSR and self.msr_delta:
            return IIR_MSR
        return IIR_NONE

    def _update(self) -> None:
        self._interrupt.set(self._cause() != IIR_NONE)

    # -- state --------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PLAIN} | {"fifo": list(self.fifo)}

    def load(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.fifo = deque(state["fifo"])
        self._update()

    _READ: tuple[Callable[[Serial], int], ...] = (
        _read_data,
        _read_ier,
        _read_iir,
        lambda self: self.lcr,
        lambda self: self.mcr,
        _read_lsr,
        _read_msr,
        lambda self: self.scratch,
    )
    _WRITE: dict[int, Callable[[Serial, int], None]] = {  # noqa: RUF012 — a constant
        0: _write_data,
        1: _write_ier,
        2: _write_fcr,
        3: _write_lcr,
        4: _write_mcr,
        7: _write_scratch,
    }
