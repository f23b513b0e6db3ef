"""Every fixed address, port and interrupt of the machine, in one place.

::

    0x0000_0000  RAM (low), up to 3 GiB
    0xC000_0000  PCI MMIO window, 32-bit
    0xE000_0000  PCI ECAM (MCFG), one bus: 1 MiB
    0xE800_0000  virtio-mmio slots, 4 KiB each
    0xFEC0_0000  IOAPIC
    0xFEE0_0000  LAPIC
    0xFFFB_C000  four pages for the hypervisor (KVM's identity map and TSS: Intel without unrestricted guest)
    4 GiB        RAM (high)
    end of RAM   PCI MMIO window, 64-bit, from the next 1 GiB boundary
"""

from __future__ import annotations

GIB = 1 << 30

LOW_RAM_END = 0xC000_0000
HIGH_RAM_START = 4 * GIB

PCI_MMIO32_START = 0xC000_0000
PCI_MMIO32_END = 0xE000_0000
PCI_MMIO64_SIZE = 64 * GIB
ECAM_START = 0xE000_0000
ECAM_BUSES = 1
ECAM_SIZE = ECAM_BUSES << 20
VIRTIO_MMIO_START = 0xE800_0000
VIRTIO_MMIO_STRIDE = 0x1000

IOAPIC_ADDRESS = 0xFEC0_0000
LAPIC_ADDRESS = 0xFEE0_0000
HYPERVISOR_PAGES = 0xFFFB_C000

# Low memory, as a boot loader uses it.
GDT_ADDRESS = 0x500
PVH_START_INFO = 0x6000
BOOT_PARAMS = 0x7000
BOOT_SECTOR = 0x7C00
BOOT_STACK = 0x8FF0
BOOT_PAGE_TABLES = 0x9000
CMDLINE_ADDRESS = 0x2_0000
CMDLINE_MAX = 0x1_0000
MULTIBOOT_INFO = 0x3_0000
EBDA_START = 0x9_FC00
ACPI_ADDRESS = 0xE_0000
ACPI_SIZE = 0x1_0000
KERNEL_ADDRESS = 0x10_0000

# Ports.
PORT_I8042_DATA = 0x60
PORT_I8042_COMMAND = 0x64
PORT_RTC = 0x70
PORT_DEBUG_CONSOLE = 0xE9
PORT_DEBUG_EXIT = 0xF4
PORT_COM1 = 0x3F8
PORT_ACPI_PM = 0x600
PORT_RESET = 0xCF9
PCI_IO_START = 0xC000
PCI_IO_END = 0x1_0000

# Global system interrupts: 0–23 are IOAPIC pins, the rest are messages.
GSI_COM1 = 4
GSI_RTC = 8
GSI_SCI = 9
VIRTIO_MMIO_GSIS = (5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
PCI_GSIS = range(16, 24)
"""For functions that interrupt by a wire. A machine has PCI or virtio-mmio, never both."""
GSI_MSI_FIRST = 24
GSI_COUNT = 1024
