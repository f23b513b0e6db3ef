"""The 64-bit Linux boot protocol: the zero page (Linux Documentation/arch/x86/boot.rst, zero-page.rst).

A kernel from a bzImage gets its own setup header back, filled in; an ELF without one gets a header of
the newest protocol, with the limits that boot.rst names as defaults.
"""

from __future__ import annotations

from struct import Struct

from hostel.abi import boot as abi
from hostel.memory import GuestMemory
from hostel.vmm import layout

from .entry import EntryState
from .image import KernelImage
from .info import BootInfo

_PROTOCOL = 0x020F
_U64 = Struct("<Q")


def build(memory: GuestMemory, image: KernelImage, info: BootInfo) -> EntryState:
    header = abi.SetupHeader.from_buffer_copy(image.header or _header())
    header.type_of_loader = abi.TYPE_OF_LOADER_UNDEFINED
    header.loadflags |= abi.LOADED_HIGH
    header.cmd_line_ptr = info.cmdline.address
    if info.seed:
        header.setup_data = _write_seed(memory, info.cmdline.end + 1, info.seed)
    if info.initrd is not None:
        header.ramdisk_image = info.initrd.address
        header.ramdisk_size = info.initrd.size
    memory.write(layout.BOOT_PARAMS, _zero_page(header, info))
    registers = {"rsi": layout.BOOT_PARAMS, "rsp": layout.BOOT_STACK}
    return EntryState("long", image.entry, registers)


def _zero_page(header: abi.SetupHeader, info: BootInfo) -> bytearray:
    page = bytearray(abi.BOOT_PARAMS_SIZE)
    _U64.pack_into(page, abi.ACPI_RSDP_ADDR, info.rsdp)
    page[abi.E820_ENTRIES] = len(info.map)
    data = bytes(header)
    page[abi.SETUP_HEADER_OFFSET : abi.SETUP_HEADER_OFFSET + len(data)] = data
    for index, entry in enumerate(info.map):
        at = abi.E820_TABLE + index * abi.E820_ENTRY.size
        abi.E820_ENTRY.pack_into(page, at, entry.addr, entry.size, entry.type)
    return page


def _header() -> abi.SetupHeader:
    return abi.SetupHeader(
        boot_flag=abi.BOOT_FLAG,
        header=abi.HEADER_MAGIC,
        version=_PROTOCOL,
        initrd_addr_max=abi.DEFAULT_INITRD_ADDR_MAX,
        cmdline_size=abi.DEFAULT_CMDLINE_SIZE,
        kernel_alignment=2 << 20,
        xloadflags=abi.XLF_KERNEL_64,
    )


def _write_seed(memory: GuestMemory, address: int, seed: bytes) -> int:
    """Randomness for the guest's generator, so that nothing in it waits for any (Linux 6.0).

    An older kernel passes over a type that it does not know.
    """
    address = -(-address // 8) * 8
    memory.write(address, abi.SETUP_DATA.pack(0, abi.SETUP_RNG_SEED, len(seed)) + seed)
    return address
