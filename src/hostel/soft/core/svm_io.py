"""May this code use this port, and does it exit? Unicorn asks neither, so the core does."""

from __future__ import annotations

from collections.abc import Callable

from hostel.soft.physical import PhysicalMemory
from hostel.soft.silicon import Controls, PageFault, Primary
from hostel.soft.state import CR0_PE, RFLAGS_IOPL, RFLAGS_VM, CpuState


def port_permitted(
    state: CpuState, port: int, size: int, read: Callable[[int, int], bytes]
) -> bool:
    """CPL against IOPL, then the TSS's I/O permission bit map (SDM vol. 1 §19.5). ``read``: linear."""
    virtual = bool(state.rflags & RFLAGS_VM)
    if not state.cr0 & CR0_PE or (not virtual and state.cpl <= (state.rflags & RFLAGS_IOPL) >> 12):
        return True
    if state.tr.rights & 0xD != 9 or state.tr.limit < 0x67:
        return False
    try:
        at = int.from_bytes(read(state.tr.base + 0x66, 2), "little") + port // 8
        if at + 1 > state.tr.limit:
            return False
        bits = int.from_bytes(read(state.tr.base + at, 2), "little")
    except PageFault:
        return False
    return not bits >> (port & 7) & (1 << size) - 1


def io_exits(controls: Controls, physical: PhysicalMemory, port: int, size: int) -> bool:
    """SDM vol. 3C §24.6.4, §25.1.3: the bit of each port touched; beyond the last port, always."""
    if not controls.primary & Primary.IO_BITMAPS:
        return bool(controls.primary & Primary.UNCONDITIONAL_IO)
    if port + size > 0x10000:
        return True
    pages = controls.io_bitmap_a, controls.io_bitmap_b
    return any(
        physical.read(pages[p >> 15] + (p & 0x7FFF) // 8, 1)[0] >> (p & 7) & 1
        for p in range(port, port + size)
    )
