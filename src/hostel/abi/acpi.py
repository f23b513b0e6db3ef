"""ACPI 6.4: the numbers of the fixed hardware and of the tables. No I/O.

The machine is *full* ACPI hardware, not hardware-reduced: PM1a event and control registers and the PM
timer, at the offsets that QEMU's q35 uses from the same base, so that the ``outw(0x604, 0x2000)`` of
hobby kernels powers off here as it does there. Reduced hardware would save Linux about fifty exits,
but it makes Linux drop the PIC and the PIT, and leaves every other kernel without a power-off.

::

    PORT_ACPI_PM  +0  PM1 status   16 bit   write 1 to clear
                  +2  PM1 enable   16 bit
                  +4  PM1 control  16 bit   SCI_EN always set; SLP_EN with SLP_TYP 0 powers off
                  +8  PM timer     24 bit (in a 32-bit port), 3.579545 MHz, free running, no overflow event
    PORT_RESET        reset control  8 bit  RESET_VALUE resets the machine

SMI_CMD is 0: the hardware is in ACPI mode for good (ACPI 6.4 §4.8.1, "SCI_EN"; §5.2.9).
"""

from __future__ import annotations

# --- fixed hardware: offsets from layout.PORT_ACPI_PM (ACPI 6.4 §4.8.3) -------------------------------

PM_BLOCK_SIZE = 12
"""Bytes of ports that the power device occupies."""

PM1_STATUS = 0
PM1_ENABLE = 2
PM1_EVENT_SIZE = 4
"""Status and enable together: PM1_EVT_LEN."""
PM1_CONTROL = 4
PM1_CONTROL_SIZE = 2
PM_TIMER = 8
PM_TIMER_SIZE = 4
PM_TIMER_HZ = 3_579_545
PM_TIMER_MASK = 0x00FF_FFFF
"""24 bits: the TMR_VAL_EXT flag of the FADT is clear."""

# PM1 status and enable bits (§4.8.3.1, tables 4.13 and 4.14).
PM1_TMR = 1 << 0
PM1_BM = 1 << 4
PM1_GBL = 1 << 5
PM1_PWRBTN = 1 << 8
PM1_SLPBTN = 1 << 9
PM1_RTC = 1 << 10
PM1_PCIEXP_WAKE = 1 << 14
PM1_WAK = 1 << 15

# PM1 control bits (§4.8.3.2, table 4.15).
SCI_EN = 1 << 0
SLP_TYP_SHIFT = 10
SLP_TYP_MASK = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13

SLP_TYP_S5 = 0
"""What the DSDT's ``_S5`` names, and what SLP_TYP must hold to power off."""

# Reset register (§4.8.3.6), laid out as Intel's RST_CNT: bit 1 selects a hard reset, bit 2 does it.
RESET_VALUE = 0x06
RESET_DO = 1 << 2

# --- tables (§5.2) -------------------------------------------------------------------------------------

OEM_ID = b"HOSTEL"
OEM_TABLE_ID = b"HOSTELVM"
CREATOR_ID = b"HSTL"

RSDP_SIGNATURE = b"RSD PTR "
RSDP_ALIGNMENT = 16

# Generic Address Structure, address space (§5.2.3.2).
GAS_SYSTEM_MEMORY = 0
GAS_SYSTEM_IO = 1
GAS_BYTE = 1
GAS_WORD = 2
GAS_DWORD = 3

# FADT fixed feature flags (§5.2.9, table 5.10).
FADT_WBINVD = 1 << 0
FADT_PROC_C1 = 1 << 2
FADT_PWR_BUTTON = 1 << 4
"""Set: there is no fixed-hardware power button."""
FADT_SLP_BUTTON = 1 << 5
"""Set: there is no fixed-hardware sleep button."""
FADT_FIX_RTC = 1 << 6
"""Set: the RTC's wake status is not in fixed registers."""
FADT_RESET_REG_SUP = 1 << 10
FADT_HEADLESS = 1 << 12

# FADT IA-PC boot architecture flags (§5.2.9.3, table 5.11).
IAPC_LEGACY_DEVICES = 1 << 0
IAPC_8042 = 1 << 1
IAPC_NO_VGA = 1 << 2
IAPC_NO_ASPM = 1 << 4
IAPC_NO_CMOS_RTC = 1 << 5

# MADT (§5.2.12).
MADT_PCAT_COMPAT = 1 << 0
MADT_LOCAL_APIC = 0
MADT_IO_APIC = 1
MADT_SOURCE_OVERRIDE = 2
MADT_LAPIC_NMI = 4
MADT_LOCAL_X2APIC = 9
MADT_X2APIC_NMI = 10
MADT_ENABLED = 1
MADT_ALL_PROCESSORS = 0xFF
MADT_ALL_X2APIC = 0xFFFF_FFFF
# MPS INTI flags: polarity in bits 0–1, trigger in bits 2–3 (table 5.26).
INTI_ACTIVE_HIGH = 1
INTI_LEVEL = 3 << 2
