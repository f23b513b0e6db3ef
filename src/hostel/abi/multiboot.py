"""Multiboot 1, by the Multiboot Specification 0.6.96. No I/O."""

import ctypes
from ctypes import Array
from typing import Annotated

from .kvm_types import layout, u32, u64

HEADER_MAGIC = 0x1BAD_B002
LOADER_MAGIC = 0x2BAD_B002
"""In EAX at the entry."""
SEARCH = 8192
"""The header lies wholly within the first so many bytes, 4-byte aligned (§3.1)."""
PAGE_ALIGN = 1 << 0
MEMORY_INFO = 1 << 1
VIDEO_MODE = 1 << 2
REQUIRED = 0xFFFF
"""Flags that a loader must refuse if it does not know them (§3.1.1)."""
AOUT_KLUDGE = 1 << 16


@layout
class MultibootHeader(ctypes.Structure):
    """§3.1.1. The addresses count only with AOUT_KLUDGE."""

    magic: u32
    flags: u32
    checksum: u32
    header_addr: u32
    load_addr: u32
    load_end_addr: u32
    bss_end_addr: u32
    entry_addr: u32


# Which fields of the information structure are valid (§3.3).
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9


@layout
class MultibootInfo(ctypes.Structure):
    """§3.3, up to the APM table; the VBE fields that follow are not valid here."""

    flags: u32
    mem_lower: u32
    mem_upper: u32
    boot_device: u32
    cmdline: u32
    mods_count: u32
    mods_addr: u32
    syms: Annotated[Array[ctypes.c_uint32], ctypes.c_uint32 * 4]
    mmap_length: u32
    mmap_addr: u32
    drives_length: u32
    drives_addr: u32
    config_table: u32
    boot_loader_name: u32
    apm_table: u32


@layout
class MultibootModule(ctypes.Structure):
    mod_start: u32
    mod_end: u32
    string: u32
    reserved: u32


@layout
class MultibootMmapEntry(ctypes.Structure):
    """``size`` does not count itself. Types are those of e820."""

    _pack_ = 1
    size: u32
    addr: u64
    len: u64
    type: u32
