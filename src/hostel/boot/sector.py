"""A boot sector: 512 bytes that end with 55 AA, entered in real mode at 0x7C00 as a PC's firmware does.

There is no firmware to call: no INT 10h, no INT 13h. The sector is all that is loaded.
"""

from __future__ import annotations

from hostel.memory import GuestMemory
from hostel.vmm import layout

from .entry import EntryState
from .image import KernelImage
from .info import BootInfo

_DISK = 0x80
"""What firmware passes in DL: the first hard disk."""


def build(memory: GuestMemory, image: KernelImage, info: BootInfo) -> EntryState:
    registers = {"rdx": _DISK, "rsp": layout.BOOT_SECTOR}
    return EntryState("real", image.entry, registers)
