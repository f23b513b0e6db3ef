"""A driver for the emulated 82540EM, as a guest's would be: by its BAR, its rings and its wire."""

from __future__ import annotations

import struct

from hostel.abi import e1000 as abi
from hostel.abi import pci
from hostel.devices.e1000.card import E1000, UNLIMITED
from hostel.spec import Limits
from hostel.virtio.net_port import NetPort
from hostel.vmm import layout
from virtio.netns import GUEST_MAC
from virtio.rig import Rig, eventually

GSI = 16
RING = 16
RX_RING, TX_RING = 0x10_0000, 0x11_0000
RX_BUFFERS, TX_BUFFERS = 0x20_0000, 0x40_0000
BUFFER = 2048
EOP, IFCS, RS = abi.TX_CMD_EOP, 1 << 25, abi.TX_CMD_RS
LAST = EOP | IFCS | RS
DATA = abi.TX_CMD_DEXT | abi.TX_DTYP_DATA


class CardDriver:
    def __init__(self, rig: Rig, port: NetPort, limits: Limits = UNLIMITED) -> None:
        self.rig = rig
        self.memory = rig.memory
        self.faults: list[str] = []
        self.card = E1000(rig.loop, rig.memory, port, mac=GUEST_MAC, limits=limits)
        self.card.on_fault = lambda card, error: self.faults.append(str(error))
        self.card.connect(rig.irqs.line(GSI))
        self.config = layout.ECAM_START + (rig.pci.add(self.card) << 15)
        self.command(pci.COMMAND_IO | pci.COMMAND_MEMORY | pci.COMMAND_MASTER)
        self.bar = rig.read(self.config + 0x10, 4) & ~0xF
        self.ports = rig.read(self.config + 0x18, 4) & ~3
        self.tail = self.received = 0

    def command(self, value: int) -> None:
        self.rig.write(self.config + pci.COMMAND, 2, value)

    def get(self, register: int) -> int:
        return self.rig.read(self.bar + register, 4)

    def set(self, register: int, value: int) -> None:
        self.rig.write(self.bar + register, 4, value)

    @property
    def level(self) -> bool:
        return self.rig.vm.levels.get(GSI, False)

    # -- set-up -----------------------------------------------------------------------------------

    def start(self, control: int = 0, *, receive: int = RING - 1) -> None:
        """Reset, both rings, link up, all interrupts; ``control``: bits of RCTL besides EN and BAM."""
        self.set(abi.CTRL, abi.CTRL_RST)
        self.set(abi.CTRL, abi.CTRL_SLU | abi.CTRL_FD)
        self.memory.write(RX_RING, bytes(16 * RING))
        for index in range(RING):
            self.memory.write_u64(RX_RING + 16 * index, RX_BUFFERS + BUFFER * index)
        for first, base in ((abi.RDBAL, RX_RING), (abi.TDBAL, TX_RING)):
            self.set(first, base)
            self.set(first + 4, 0)
            self.set(first + 8, 16 * RING)
            self.set(first + 0x10, 0)
            self.set(first + 0x18, 0)
        self.tail = self.received = 0
        self.set(abi.RDT, receive)
        self.set(abi.IMS, abi.INT_ALL)
        self.get(abi.ICR)
        self.set(abi.TCTL, abi.TCTL_EN | abi.TCTL_PSP)
        self.set(abi.RCTL, abi.RCTL_EN | abi.RCTL_BAM | abi.RCTL_SECRC | control)

    # -- frames -----------------------------------------------------------------------------------

    def descriptor(self, raw: bytes) -> None:
        self.memory.write(TX_RING + 16 * self.tail, raw)
        self.tail = (self.tail + 1) % RING

    def piece(self, data: bytes, lower: int, options: int = 0, special: int = 0) -> None:
        """A data descriptor, or a legacy one; its bytes have a buffer of 256 KiB to themselves."""
        address = TX_BUFFERS + (self.tail << 18)
        self.memory.write(address, data)
        self.descriptor(abi.TX_DESC.pack(address, len(data) | lower, 0, options, special))

    def context(
        self, starts: tuple[int, int, int, int], *, hdrlen: int = 0, mss: int = 0, bits: int = 0
    ) -> None:
        """``starts``: where IP and its sum are, where TCP or UDP and its sum are."""
        ip, ip_sum, transport, transport_sum = starts
        end = transport - 1
        fields = (
            ip,
            ip_sum,
            end,
            transport,
            transport_sum,
            0,
            abi.TX_CMD_DEXT | bits,
            0,
            hdrlen,
            mss,
        )
        self.descriptor(abi.TX_CONTEXT.pack(*fields))

    def kick(self) -> None:
        self.set(abi.TDT, self.tail)

    def send(self, data: bytes) -> None:
        self.piece(data, LAST)
        self.kick()

    @property
    def sent(self) -> bool:
        """Whether the last descriptor is done."""
        at = TX_RING + 16 * ((self.tail - 1) % RING)
        return bool(self.memory.read(at + abi.TX_STATUS_OFFSET, 1)[0] & abi.TX_DD)

    def receive(self) -> tuple[bytes, int, int]:
        """The next frame, its status and its VLAN tag; the descriptors are free again."""
        data = b""
        while True:
            at = RX_RING + 16 * self.received
            assert eventually(lambda at=at: bool(self.memory.read(at + 12, 1)[0] & abi.RX_DD)), (  # type: ignore[misc]
                self.faults
            )
            length, _, status, _, special = struct.unpack("<HHBBH", self.memory.read(at + 8, 8))
            data += self.memory.read(self.memory.read_u64(at), length)
            self.memory.write(at + 8, bytes(8))
            self.received = (self.received + 1) % RING
            if status & abi.RX_EOP:
                self.set(abi.RDT, (self.received - 1) % RING)
                return data, status, special
