"""The 64-bit Linux boot protocol: the zero page (Linux Documentation/arch/x86/boot.rst, zero-page.rst).

A kernel from a bzImage gets its own setup header back, filled in; an ELF without one gets a header of
the newest protocol, with the limits that boot.rst names as defaults.
"""

from __future__ import annotations

import ctypes

from hostel.abi import boot as abi
from hostel.memory import GuestMemory
from hostel.vmm import layout

from .entry import EntryState
from .image import KernelImage
from .info import BootInfo

_PROTOCOL = 0x020F


def build(memory: GuestMemory, image: KernelImage, info: BootInfo) -> EntryState:
    params = abi.BootParams()
    params.hdr = image.header or _header()
    params.hdr.type_of_loader = abi.TYPE_OF_LOADER_UNDEFINED
    params.hdr.loadflags |= abi.LOADED_HIGH
    params.hdr.cmd_line_ptr = info.cmdline.address
    if info.seed:
        params.hdr.setup_data = _write_seed(memory, info.cmdline.end + 1, info.seed)
    if info.initrd is not None:
        params.hdr.ramdisk_image = info.initrd.address
        params.hdr.ramdisk_size = info.initrd.size
    params.acpi_rsdp_addr = info.rsdp
    params.e820_entries = len(info.map)
    for slot, entry in zip(params.e820_table, info.map, strict=False):
        slot.addr, slot.size, slot.type = entry.addr, entry.size, entry.type
    memory.write(layout.BOOT_PARAMS, bytes(params))
    registers = {"rsi": layout.BOOT_PARAMS, "rsp": layout.BOOT_STACK}
    return EntryState("long", image.entry, registers)


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
    head = abi.SetupData(next=0, type=abi.SETUP_RNG_SEED, len=len(seed))
    memory.write(address, bytes(head))
    memory.write(address + ctypes.sizeof(head), seed)
    return address
