"""PVH: what a kernel that is entered so finds in EBX. No I/O.

The structures are those of Xen's public/arch-x86/hvm/start_info.h.
"""

import ctypes

from .kvm_types import layout, u32, u64

HVM_START_MAGIC = 0x336E_C578
"""``xEn3`` with the top bit of the E set."""
HVM_START_VERSION = 1
"""Version 1 added the memory map."""


@layout
class HvmStartInfo(ctypes.Structure):
    magic: u32
    version: u32
    flags: u32
    nr_modules: u32
    modlist_paddr: u64
    cmdline_paddr: u64
    rsdp_paddr: u64
    memmap_paddr: u64
    memmap_entries: u32
    reserved: u32


@layout
class HvmModlistEntry(ctypes.Structure):
    paddr: u64
    size: u64
    cmdline_paddr: u64
    reserved: u64


@layout
class HvmMemmapEntry(ctypes.Structure):
    """Types are those of e820."""

    addr: u64
    size: u64
    type: u32
    reserved: u32
