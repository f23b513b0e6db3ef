"""Linux's boot protocol as layouts (Documentation/arch/x86/boot.rst). No I/O.

A compiled probe compares them with ``<asm/bootparam.h>``.
"""

import ctypes
from struct import Struct

from .kvm_types import layout, u8, u16, u32, u64

# --- memory map -----------------------------------------------------------------------------------------

E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3
"""Tables that the operating system may reclaim once it has read them."""

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


BOOT_PARAMS_SIZE = 4096
"""struct boot_params, the zero page. Of its fields we write these, and the setup header."""
ACPI_RSDP_ADDR = 0x70
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0
E820_ENTRY = Struct("<QQI")
"""struct boot_e820_entry: address, size, type."""
SETUP_DATA = Struct("<QII")
"""struct setup_data, before its bytes: next, type, length."""
