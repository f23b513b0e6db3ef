"""The three boot protocols as layouts: Linux's (Documentation/arch/x86/boot.rst), PVH, multiboot 1.

No I/O. ``SetupHeader`` and ``BootParams`` are compared with ``<asm/bootparam.h>`` by a compiled probe;
the PVH structures are those of Xen's public/arch-x86/hvm/start_info.h, the multiboot ones those of
the Multiboot Specification 0.6.96.
"""

import ctypes
from ctypes import Array
from typing import Annotated

from .kvm_types import layout, u8, u16, u32, u64

# --- memory map -----------------------------------------------------------------------------------------

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3
"""Tables that the operating system may reclaim once it has read them."""


@layout
class E820Entry(ctypes.Structure):
    """struct boot_e820_entry."""

    _pack_ = 1
    addr: u64
    size: u64
    type: u32


E820_MAX_ENTRIES = 128

# --- Linux ----------------------------------------------------------------------------------------------

SETUP_HEADER_OFFSET = 0x1F1
"""Of the setup header, both in a bzImage and in the zero page."""
BOOT_FLAG = 0xAA55
HEADER_MAGIC = 0x5372_6448
"""``HdrS``."""
VERSION_PAYLOAD = 0x0208
"""The first protocol that names the compressed payload."""
VERSION_INIT_SIZE = 0x020A
VERSION_XLOADFLAGS = 0x020C
"""The first protocol that says whether there is a 64-bit entry."""

LOADED_HIGH = 1 << 0
CAN_USE_HEAP = 1 << 7
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
TYPE_OF_LOADER_UNDEFINED = 0xFF
ENTRY64_OFFSET = 0x200
"""startup_64, from where the protected-mode code was loaded."""
SECTOR = 512
DEFAULT_SETUP_SECTS = 4
DEFAULT_CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE of x86, less the NUL: for an ELF, which has no setup header."""
DEFAULT_INITRD_ADDR_MAX = 0x7FFF_FFFF

SETUP_RNG_SEED = 9


@layout
class SetupHeader(ctypes.Structure):
    """struct setup_header."""

    _pack_ = 1
    setup_sects: u8
    root_flags: u16
    syssize: u32
    ram_size: u16
    vid_mode: u16
    root_dev: u16
    boot_flag: u16
    jump: u16
    header: u32
    version: u16
    realmode_swtch: u32
    start_sys_seg: u16
    kernel_version: u16
    type_of_loader: u8
    loadflags: u8
    setup_move_size: u16
    code32_start: u32
    ramdisk_image: u32
    ramdisk_size: u32
    bootsect_kludge: u32
    heap_end_ptr: u16
    ext_loader_ver: u8
    ext_loader_type: u8
    cmd_line_ptr: u32
    initrd_addr_max: u32
    kernel_alignment: u32
    relocatable_kernel: u8
    min_alignment: u8
    xloadflags: u16
    cmdline_size: u32
    hardware_subarch: u32
    hardware_subarch_data: u64
    payload_offset: u32
    payload_length: u32
    setup_data: u64
    pref_address: u64
    init_size: u32
    handover_offset: u32
    kernel_info_offset: u32


@layout
class BootParams(ctypes.Structure):
    """struct boot_params, the zero page: the fields that we write."""

    _pack_ = 1
    _screen_info: Annotated[Array[ctypes.c_uint8], ctypes.c_uint8 * 0x70]
    acpi_rsdp_addr: u64
    _pad1: Annotated[Array[ctypes.c_uint8], ctypes.c_uint8 * 0x48]
    ext_ramdisk_image: u32
    ext_ramdisk_size: u32
    ext_cmd_line_ptr: u32
    _pad2: Annotated[Array[ctypes.c_uint8], ctypes.c_uint8 * 0x11C]
    e820_entries: u8
    _pad3: Annotated[Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
    hdr: SetupHeader
    _pad4: Annotated[
        Array[ctypes.c_uint8],
        ctypes.c_uint8 * (0x2D0 - SETUP_HEADER_OFFSET - ctypes.sizeof(SetupHeader)),
    ]
    e820_table: Annotated[Array[E820Entry], E820Entry * E820_MAX_ENTRIES]
    _pad5: Annotated[Array[ctypes.c_uint8], ctypes.c_uint8 * 0x330]


@layout
class SetupData(ctypes.Structure):
    """struct setup_data, before its bytes."""

    _pack_ = 1
    next: u64
    type: u32
    len: u32


# --- PVH ------------------------------------------------------------------------------------------------

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


# --- multiboot 1 ----------------------------------------------------------------------------------------

MULTIBOOT_HEADER_MAGIC = 0x1BAD_B002
MULTIBOOT_LOADER_MAGIC = 0x2BAD_B002
"""In EAX at the entry."""
MULTIBOOT_SEARCH = 8192
"""The header lies wholly within the first so many bytes, 4-byte aligned (§3.1)."""
MULTIBOOT_PAGE_ALIGN = 1 << 0
MULTIBOOT_MEMORY_INFO = 1 << 1
MULTIBOOT_VIDEO_MODE = 1 << 2
MULTIBOOT_REQUIRED = 0xFFFF
"""Flags that a loader must refuse if it does not know them (§3.1.1)."""
MULTIBOOT_AOUT_KLUDGE = 1 << 16


@layout
class MultibootHeader(ctypes.Structure):
    """§3.1.1. The addresses count only with MULTIBOOT_AOUT_KLUDGE."""

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
