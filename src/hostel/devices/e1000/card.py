"""The 82540EM as a PCI function: its registers, its interrupts, and who serves its rings.

::

    driver ─ BAR 0 (registers) ─┐                      ┌─ TDT written: Transmitter, on the vCPU's thread
             BAR 2 (two ports) ─┴─► lock ─► registers ─┤
    port ──── readable ─► event loop ─► lock ─► Receiver
                                                       └─► ICR & IMS ─► throttle (ITR) ─► INTA#

Rules:

* ``lock`` guards all of it: a vCPU comes by either BAR or by config space, the port by the event loop.
  Nothing is called with it held that takes another thread's lock.
* INTA# is high while a cause is there that the mask lets through, but not sooner after the last time
  than ITR says (8254x SDM §13.4.18). The delays of single descriptors (TIDV, RDTR …) are a few
  microseconds, less than our own work takes: those causes come at the end of a batch.
* A descriptor or ring that leads outside guest memory stops the card until the driver resets it, as a
  failed bus access would (§13.4.1). There is no DMA unless the driver made the card a bus master.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from hostel.abi import e1000 as abi
from hostel.abi import pci, virtio_net
from hostel.errors import GuestError, HelperError, HostelError
from hostel.memory import GuestMemory
from hostel.spec import Limits
from hostel.virtio.limit import Limiter
from hostel.virtio.net_port import HEADER, MAX_FRAME, NetPort
from hostel.vmm.loop import EventLoop
from hostel.vmm.pci import PciFunction
from hostel.vmm.timer import Timer

from .counters import Counters
from .eeprom import Eeprom
from .phy import Phy
from .receive import Receiver
from .registers import READS, WRITES, Ports, Window, plain
from .transmit import Transmitter

CLASS_ETHERNET = 0x02_0000
SUBSYSTEM = (abi.VENDOR, 0x001E)
REGISTERS_BAR, IO_BAR = 0, 2
BATCH = 64
"""Frames received in one go."""
_ITR_UNIT = 256e-9
UNLIMITED = Limits()


def _unheard(card: E1000, error: HostelError) -> None:
    pass


class E1000(PciFunction):
    """Owns ``port``. Connect an interrupt line, then seat it on a bus."""

    eeprom: Eeprom
    icr: int
    ims: int

    def __init__(
        self,
        loop: EventLoop,
        memory: GuestMemory,
        port: NetPort,
        *,
        mac: bytes,
        name: str = "net0",
        limits: Limits = UNLIMITED,
    ) -> None:
        super().__init__(
            name,
            ids=(abi.VENDOR, abi.DEVICE),
            class_code=CLASS_ETHERNET,
            revision=2,
            subsystem=SUBSYSTEM,
        )
        self.lock = threading.RLock()
        self.on_fault: Callable[[E1000, HostelError], None] = _unheard
        self.fault: HostelError | None = None
        """Why the card stopped until its next reset."""
        self.registers: dict[int, int] = {}
        self.icr = self.ims = 0
        self.eeprom = Eeprom(mac)
        self.phy = Phy()
        self.counters = Counters()
        self.receiver = Receiver(self.registers, memory, self.counters)
        self.transmitter = Transmitter(self.registers, memory, port, self.counters)
        self.transmitter.connected = lambda: self.phy.link
        self.transmitter.pay = self._pay
        self.transmitter.waiting = lambda: self._paused
        self.interrupts = 0
        self._mac = mac
        self._loop = loop
        self._port = port
        self._held: tuple[int, bool] | None = None
        """A frame in ``_scratch`` that waits for descriptors: its length, and whether it was checked."""
        self._scratch = memoryview(bytearray(MAX_FRAME))
        self._watched = (False, False)
        self._closed = False
        self._last_interrupt = 0.0
        self._throttle = Timer(loop, self._throttled)
        self._limiter = Limiter(limits)
        self._paused = False
        """No frame passes until the limiter's debt is paid."""
        self._pause = Timer(loop, self._go_on)
        self.add_bar(REGISTERS_BAR, abi.REGISTERS_SIZE, Window(self))
        self._ports = Ports(self)
        self.add_bar(IO_BAR, abi.IO_SIZE, self._ports, io=True)
        self.power_up()

    # -- reset ----------------------------------------------------------------------------------

    def power_up(self) -> None:
        """What CTRL.RST leaves (§13.4.1): everything as after power-on but PCI and the PHY."""
        with self.lock:
            self.fault = None
            self.registers.clear()
            self.icr = self.ims = 0
            self.registers[abi.RAL] = int.from_bytes(self._mac[:4], "little")
            self.registers[abi.RAH] = int.from_bytes(self._mac[4:], "little") | abi.RAH_AV
            self.registers[abi.CTRL] = abi.CTRL_FD | abi.CTRL_SPEED_1000
            self.transmitter.reset()
            self._held = None
            self.counters.values.clear()
            self.update_interrupt()
            self._watch()

    def reset(self) -> None:
        with self.lock:
            self.phy.reset()
            self.power_up()
            super().reset()

    def close(self) -> None:
        with self.lock:
            super().close()
            if not self._closed:
                self._closed = True
                self._stop_watching()
                self._throttle.close()
                self._pause.close()
                self._port.close()

    # -- registers --------------------------------------------------------------------------------

    def read_register(self, offset: int) -> int:
        with self.lock:
            if abi.STATISTICS <= offset < abi.STATISTICS_END:
                return self.counters.read(offset)
            if (read := READS.get(offset)) is not None:
                return read(self)
            return self.registers.get(offset, 0)

    def write_register(self, offset: int, value: int) -> None:
        with self.lock:
            if (write := WRITES.get(offset)) is not None:
                write(self, value)
            elif plain(offset):
                self.registers[offset] = value

    def write_config(self, offset: int, data: bytes) -> None:
        with self.lock:
            super().write_config(offset, data)
            if offset <= pci.COMMAND < offset + len(data):
                self.transmit()
                self._watch()

    @property
    def may_work(self) -> bool:
        """No DMA without the bus master bit, and none of a card that has stopped or waits."""
        idle = self._closed or self._paused or self.fault is not None
        return not idle and bool(self.command & pci.COMMAND_MASTER)

    # -- link -------------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug the cable in, or pull it."""
        with self.lock:
            self.phy.carrier = up
            self.raise_causes(abi.INT_LSC)

    # -- interrupts -------------------------------------------------------------------------------

    def raise_causes(self, causes: int) -> None:
        self.icr |= causes
        self.update_interrupt()

    def update_interrupt(self) -> None:
        if not self.icr & self.ims:
            self.interrupt(False)
        elif not self._interrupting:
            now = time.monotonic()
            wait = self._last_interrupt + self.registers.get(abi.ITR, 0) * _ITR_UNIT - now
            if wait > 0:
                self._throttle.arm(wait)
            else:
                self._last_interrupt = now
                self.interrupts += 1
                self.interrupt(True)

    def _throttled(self) -> None:
        with self.lock:
            self.update_interrupt()

    # -- frames -----------------------------------------------------------------------------------

    def transmit(self) -> None:
        """The driver offered descriptors, or the port has room again."""
        with self.lock:
            if not self.may_work:
                return
            try:
                causes, more = self.transmitter.work()
            except HostelError as error:
                self._fail(error)
                return
            self._watch()
            if more:
                self._loop.call_soon(self.transmit)
            if causes:
                self.raise_causes(causes)

    def receive_again(self) -> None:
        """The driver offered descriptors: a frame that is held may fit now."""
        if self._held is not None:
            self._loop.call_soon(self._receive)

    def _ready(self) -> None:
        """On the event loop: the port has frames, or room, or has failed."""
        with self.lock:
            if self._watched[1]:
                self._flush()
            self._receive()

    def _flush(self) -> None:
        try:
            self._port.flush()
        except HostelError as error:
            self._fail(error)
        self.transmit()
        self._watch()

    def _receive(self) -> None:
        with self.lock:
            came = False
            try:
                for _ in range(BATCH):
                    if not self.may_work or not self._receive_one():
                        break
                    came = True
                causes = self.receiver.causes if came else 0
            except HostelError as error:
                self._fail(error)
                return
            self._watch()
            if causes:
                self.raise_causes(causes)

    def _receive_one(self) -> bool:
        """Whether there was a frame, and room for it."""
        if self._held is None:
            try:
                size = self._port.receive([self._scratch])
            except BlockingIOError:
                return False
            except OSError as error:
                raise HelperError(
                    f"{self.name}: {error.strerror}", cost="the NIC is cut off"
                ) from None
            checked = self._scratch[0] & virtio_net.HDR_F_DATA_VALID
            self._held = (size, bool(checked))
        size, good = self._held
        if self.phy.link and not self.receiver.put(self._scratch[HEADER:size], checked=good):
            return False
        self._held = None
        self._pay(size - HEADER)
        return True

    def _pay(self, size: int) -> None:
        wait = self._limiter.take(size)
        if wait:
            self._paused = True
            self._pause.arm(wait)

    def _go_on(self) -> None:
        with self.lock:
            self._paused = False
            self.transmit()
            self._watch()
            self.receive_again()

    def _watch(self) -> None:
        """Wait for frames unless one is held, and for room if one could not go."""
        read = self.may_work and self._held is None
        write = self.may_work and (self.transmitter.blocked or not self._port_is_empty())
        if (read, write) != self._watched:
            self._stop_watching()
            if read or write:
                self._loop.add(self._port.fd, self._ready, read=read, write=write)
            self._watched = (read, write)

    def _port_is_empty(self) -> bool:
        try:
            return self._port.flush()
        except HostelError:
            return True  # reading it says so too, and then the card stops

    def _stop_watching(self) -> None:
        self._loop.remove(self._port.fd)
        self._watched = (False, False)

    def _fail(self, error: HostelError) -> None:
        """The card stops. The guest's own doing, or its network is gone."""
        self.fault = error
        if not isinstance(error, GuestError):
            self.set_link(False)
        self._stop_watching()
        self.on_fault(self, error)

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        with self.lock:
            return {
                **super().save(),
                "registers": {str(offset): value for offset, value in self.registers.items()},
                "interrupts": [self.icr, self.ims],
                "phy": self.phy.save(),
                "counters": {str(at): value for at, value in self.counters.values.items()},
                "transmitter": self.transmitter.save(),
                "held": self._held and [self._scratch[: self._held[0]].hex(), self._held[1]],
                "ioaddr": self._ports.address,
            }

    def load(self, state: dict[str, Any]) -> None:
        with self.lock:
            self.power_up()
            self.registers.update({int(at): value for at, value in state["registers"].items()})
            self.icr, self.ims = state["interrupts"]
            self.phy.load(state["phy"])
            self.counters.values.update({int(at): n for at, n in state["counters"].items()})
            self.transmitter.load(state["transmitter"])
            self._ports.address = state["ioaddr"]
            if held := state["held"]:
                frame = bytes.fromhex(held[0])
                self._scratch[: len(frame)] = frame
                self._held = (len(frame), held[1])
            super().load(state)
            self.update_interrupt()
            self.transmit()
            self.receive_again()

    def statistics(self) -> dict[str, Any]:
        with self.lock:
            values = self.counters.values
            return {
                "fault": str(self.fault) if self.fault else "",
                "plane": "python",
                "link_up": self.phy.link,
                "interrupts": self.interrupts,
                "dropped": self.transmitter.dropped,
                "received": values[abi.TPR],
                "sent": values[abi.TPT],
            }
