"""PVH direct boot: 32-bit, paging off, EBX points to the start info (Xen docs/misc/pvh.pandoc).

::

    PVH_START_INFO   hvm_start_info · module list (the initrd) · memory map
"""

from __future__ import annotations

import ctypes

from hostel.abi import pvh as abi
from hostel.memory import GuestMemory
from hostel.vmm import layout

from .entry import EntryState
from .image import KernelImage
from .info import BootInfo

_MODULES = layout.PVH_START_INFO + ctypes.sizeof(abi.HvmStartInfo)
_MAP = _MODULES + ctypes.sizeof(abi.HvmModlistEntry)


def build(memory: GuestMemory, image: KernelImage, info: BootInfo) -> EntryState:
    start = abi.HvmStartInfo(
        magic=abi.HVM_START_MAGIC,
        version=abi.HVM_START_VERSION,
        cmdline_paddr=info.cmdline.address,
        rsdp_paddr=info.rsdp,
        memmap_paddr=_MAP,
        memmap_entries=len(info.map),
    )
    if info.initrd is not None:
        start.nr_modules, start.modlist_paddr = 1, _MODULES
        module = abi.HvmModlistEntry(paddr=info.initrd.address, size=info.initrd.size)
        memory.write(_MODULES, bytes(module))
    entries = (abi.HvmMemmapEntry(entry.addr, entry.size, entry.type) for entry in info.map)
    memory.write(_MAP, b"".join(map(bytes, entries)))
    memory.write(layout.PVH_START_INFO, bytes(start))
    return EntryState("protected", image.entry, {"rbx": layout.PVH_START_INFO})
