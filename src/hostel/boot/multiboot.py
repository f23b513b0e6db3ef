"""Multiboot 1: 32-bit, paging off, EAX holds the magic and EBX the information (0.6.96 §3.2, §3.3).

::

    MULTIBOOT_INFO   information · module (the initrd) · memory map · boot loader's name
"""

from __future__ import annotations

import ctypes

from hostel.abi import multiboot as abi
from hostel.memory import GuestMemory
from hostel.vmm import layout

from .e820 import E820
from .entry import EntryState
from .image import KernelImage
from .info import BootInfo

_MODULES = layout.MULTIBOOT_INFO + ctypes.sizeof(abi.MultibootInfo)
_MAP = _MODULES + ctypes.sizeof(abi.MultibootModule)
_LOADER_NAME = b"hostel\0"


def build(memory: GuestMemory, image: KernelImage, info: BootInfo) -> EntryState:
    memory_map = b"".join(map(_map_entry, info.map))
    multiboot = abi.MultibootInfo(
        flags=abi.INFO_MEMORY | abi.INFO_CMDLINE | abi.INFO_MEMORY_MAP | abi.INFO_LOADER_NAME,
        mem_lower=info.map[0].size >> 10,
        mem_upper=_upper(info.map) >> 10,
        cmdline=info.cmdline.address,
        mmap_addr=_MAP,
        mmap_length=len(memory_map),
        boot_loader_name=_MAP + len(memory_map),
    )
    if info.initrd is not None:
        multiboot.flags |= abi.INFO_MODULES
        multiboot.mods_count, multiboot.mods_addr = 1, _MODULES
        # A module's string is its command line; it has none, so it points to the name's NUL.
        string = _MAP + len(memory_map) + len(_LOADER_NAME) - 1
        module = abi.MultibootModule(info.initrd.address, info.initrd.end, string)
        memory.write(_MODULES, bytes(module))
    memory.write(_MAP, memory_map + _LOADER_NAME)
    memory.write(layout.MULTIBOOT_INFO, bytes(multiboot))
    registers = {"rax": abi.LOADER_MAGIC, "rbx": layout.MULTIBOOT_INFO}
    return EntryState("protected", image.entry, registers)


def _map_entry(entry: E820) -> bytes:
    size = ctypes.sizeof(abi.MultibootMmapEntry) - 4
    return bytes(abi.MultibootMmapEntry(size, entry.addr, entry.size, entry.type))


def _upper(map: tuple[E820, ...]) -> int:
    """RAM from 1 MiB to the first hole."""
    return next(entry.size for entry in map if entry.addr == layout.KERNEL_ADDRESS)
