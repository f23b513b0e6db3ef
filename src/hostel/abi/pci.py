"""PCI configuration space: registers and bits (PCI Local Bus 3.0 §6, PCI Express Base 3.1 §7).

Named like <linux/pci_regs.h> without ``PCI_``; the ABI test compares them.
"""

from __future__ import annotations

from .record import Record

VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_PROG = 0x09
HEADER_TYPE = 0x0E
BASE_ADDRESS_0 = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITY_LIST = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
STD_HEADER_SIZEOF = 64

COMMAND_IO = 0x1
COMMAND_MEMORY = 0x2
COMMAND_MASTER = 0x4
COMMAND_INTX_DISABLE = 0x400
STATUS_INTERRUPT = 0x08
STATUS_CAP_LIST = 0x10

BASE_ADDRESS_SPACE_IO = 0x1
BASE_ADDRESS_MEM_TYPE_64 = 0x4
BASE_ADDRESS_MEM_PREFETCH = 0x8

CAP_ID_VNDR = 0x09
CAP_ID_MSIX = 0x11

# Offsets inside the MSI-X capability and its bits.
MSIX_FLAGS = 2
MSIX_TABLE = 4
MSIX_PBA = 8
CAP_MSIX_SIZEOF = 12
MSIX_FLAGS_QSIZE = 0x07FF
MSIX_FLAGS_MASKALL = 0x4000
MSIX_FLAGS_ENABLE = 0x8000

# An entry of the MSI-X table.
MSIX_ENTRY = Record("msix_entry", addr_lo="I", addr_hi="I", data="I", vector_ctrl="I")
MSIX_ENTRY_LOWER_ADDR = 0x0
MSIX_ENTRY_UPPER_ADDR = 0x4
MSIX_ENTRY_DATA = 0x8
MSIX_ENTRY_VECTOR_CTRL = 0xC
MSIX_ENTRY_CTRL_MASKBIT = 0x1

CONFIG_SIZE = 4096
"""One function's configuration space in ECAM; bus, device and function are address bits 20, 15, 12."""
FUNCTIONS = 8
DEVICES = 32
