"""The machine's ACPI tables: how a kernel learns of CPUs, interrupts, PCI, and how to end.

::

    ACPI_ADDRESS   RSDP, where a kernel without our help scans for it
                   ├─ RSDT   32-bit addresses, for kernels that know no other
                   └─ XSDT   FADT ── FACS, DSDT
                             MADT    LAPICs, IOAPIC, the timer's and the SCI's overrides
                             MCFG    ECAM

Rules: what is described is there; what is left out of a description on purpose has its reason at
``AcpiConfig``. The DSDT has data only and no methods: there is nothing to interpret at run time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from hostel.abi import acpi as abi
from hostel.errors import SpecError
from hostel.memory import GuestMemory
from hostel.vmm import layout

from . import aml

_FACS_SIZE = 64
_FADT_SIZE = 276
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_RSDP = struct.Struct("<8sB6sBIIQB3x")
_GAS = struct.Struct("<BBBBQ")


class MmioDevice(msgspec.Struct, frozen=True):
    """One virtio-mmio slot."""

    address: int
    size: int
    gsi: int


class PciPin(msgspec.Struct, frozen=True):
    """A PCI function that interrupts by a wire: its device number, and where its INTA# leads."""

    device: int
    gsi: int


class AcpiConfig(msgspec.Struct, frozen=True):
    """What the tables describe."""

    apic_ids: Sequence[int]
    """Of each vCPU, in order."""
    pci: bool = True
    mmio64: tuple[int, int] | None = None
    """The 64-bit PCI window: address and size."""
    pci_pins: Sequence[PciPin] = ()
    com1: bool = True
    rtc: bool = False
    """Say that there is a CMOS RTC. A Linux with kvm-clock has a better one, and would spend some
    hundred exits on this and then set its clock by it, to the second."""
    i8042: bool = False
    """Say that there is a keyboard controller. It has no keyboard: it is there to reset the machine
    for those who know nothing better, and they ask no table. Linux would spend exits on probing it."""
    virtio_mmio: Sequence[MmioDevice] = ()


def write_tables(memory: GuestMemory, config: AcpiConfig) -> int:
    """Put the tables into guest memory; the address of the RSDP."""
    memory.write(layout.ACPI_ADDRESS, build_tables(config))
    return layout.ACPI_ADDRESS


def build_tables(config: AcpiConfig) -> bytes:
    """All tables as one block for ``layout.ACPI_ADDRESS``; the RSDP is its beginning."""
    block = _Block(layout.ACPI_ADDRESS)
    block.reserve(_RSDP.size)
    facs = block.add(_facs(), align=64)
    dsdt = block.add(_dsdt(config))
    tables = [block.add(_fadt(config, facs, dsdt)), block.add(_madt(config))]
    if config.pci:
        tables.append(block.add(_mcfg()))
    rsdt = block.add(_table(b"RSDT", 1, struct.pack(f"<{len(tables)}I", *tables)))
    xsdt = block.add(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    block.data[: _RSDP.size] = _rsdp(rsdt, xsdt)
    if len(block.data) > layout.ACPI_SIZE:
        raise SpecError(f"the ACPI tables need {len(block.data)} bytes of {layout.ACPI_SIZE}")
    return bytes(block.data)


class _Block:
    """Tables one after the other, each at an aligned address."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.data = bytearray()

    def reserve(self, size: int) -> None:
        self.data += bytes(size)

    def add(self, table: bytes, align: int = 16) -> int:
        self.data += bytes(-len(self.data) % align)
        address = self.address + len(self.data)
        self.data += table
        return address


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes them all add up to zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """§5.2.6: the header that all tables but RSDP and FACS share."""
    size = _HEADER.size + len(body)
    header = (signature, size, revision, 0, abi.OEM_ID, abi.OEM_TABLE_ID, 1, abi.CREATOR_ID, 1)
    table = bytearray(_HEADER.pack(*header) + body)
    table[9] = checksum(table)
    return bytes(table)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """§5.2.5.3: the first checksum covers 20 bytes, as in ACPI 1.0; the second all 36."""
    rsdp = bytearray(_RSDP.pack(abi.RSDP_SIGNATURE, 0, abi.OEM_ID, 2, rsdt, _RSDP.size, xsdt, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    return bytes(rsdp)


def _facs() -> bytes:
    """§5.2.10: hardware signature, waking vectors, global lock: all zero. It has no checksum."""
    return struct.pack("<4sI24xB31x", b"FACS", _FACS_SIZE, 2)


def _fadt(config: AcpiConfig, facs: int, dsdt: int) -> bytes:
    """§5.2.9, table 5.9. SMI_CMD and the GPE blocks are 0: there are none."""
    pm = layout.PORT_ACPI_PM
    event, control, timer = pm + abi.PM1_STATUS, pm + abi.PM1_CONTROL, pm + abi.PM_TIMER
    fadt = bytearray(_FADT_SIZE - _HEADER.size)
    put = _Putter(fadt, _HEADER.size)
    put("<II", 36, facs, dsdt)
    put("<H", 46, layout.GSI_SCI)
    put("<I", 56, event)
    put("<I", 64, control)
    put("<I", 76, timer)
    put("<BB", 88, abi.PM1_EVENT_SIZE, abi.PM1_CONTROL_SIZE)
    put("<B", 91, abi.PM_TIMER_SIZE)
    # Latencies above 100 and 1000 µs say that there is no C2 and no C3 (table 5.9, P_LVLx_LAT).
    put("<HH", 96, 101, 1001)
    put("<B", 108, 0x32 if config.rtc else 0)  # CENTURY
    put("<H", 109, _boot_architecture(config))
    put("<I", 112, _fadt_flags())
    put("<12s", 116, _port(layout.PORT_RESET, 8, abi.GAS_BYTE))
    put("<B", 128, abi.RESET_VALUE)
    put("<B", 131, 4)  # FADT minor version
    put("<Q", 140, dsdt)  # X_FIRMWARE_CTRL is 0: only one of the two may be set
    put("<12s", 148, _port(event, 8 * abi.PM1_EVENT_SIZE, abi.GAS_WORD))
    put("<12s", 172, _port(control, 8 * abi.PM1_CONTROL_SIZE, abi.GAS_WORD))
    put("<12s", 208, _port(timer, 8 * abi.PM_TIMER_SIZE, abi.GAS_DWORD))
    put("<8s", 268, b"HOSTEL")
    return _table(b"FACP", 6, bytes(fadt))


class _Putter:
    """Writes fields at the offsets that the specification's tables give, which count the header."""

    def __init__(self, body: bytearray, header: int) -> None:
        self._body = body
        self._header = header

    def __call__(self, layout: str, offset: int, *values: int | bytes) -> None:
        struct.pack_into(layout, self._body, offset - self._header, *values)


def _fadt_flags() -> int:
    return (
        abi.FADT_WBINVD
        | abi.FADT_PROC_C1
        | abi.FADT_PWR_BUTTON
        | abi.FADT_SLP_BUTTON
        | abi.FADT_FIX_RTC
        | abi.FADT_RESET_REG_SUP
        | abi.FADT_HEADLESS
    )


def _boot_architecture(config: AcpiConfig) -> int:
    flags = abi.IAPC_NO_VGA | abi.IAPC_NO_ASPM
    if config.com1:
        flags |= abi.IAPC_LEGACY_DEVICES
    if config.i8042:
        flags |= abi.IAPC_8042
    if not config.rtc:
        flags |= abi.IAPC_NO_CMOS_RTC
    return flags


def _port(port: int, bits: int, access: int) -> bytes:
    return _GAS.pack(abi.GAS_SYSTEM_IO, bits, 0, access, port)


def _madt(config: AcpiConfig) -> bytes:
    """§5.2.12."""
    parts = [struct.pack("<II", layout.LAPIC_ADDRESS, abi.MADT_PCAT_COMPAT)]
    parts += [_local_apic(uid, apic_id) for uid, apic_id in enumerate(config.apic_ids)]
    parts += [
        struct.pack("<BBBBII", abi.MADT_IO_APIC, 12, 0, 0, layout.IOAPIC_ADDRESS, 0),
        # The timer's GSI 0 is wired to the IOAPIC's pin 2, as on every PC (vmm/irq.py).
        _override(0, 2, 0),
        _override(layout.GSI_SCI, layout.GSI_SCI, abi.INTI_ACTIVE_HIGH | abi.INTI_LEVEL),
        struct.pack("<BBBHB", abi.MADT_LAPIC_NMI, 6, abi.MADT_ALL_PROCESSORS, 0, 1),
    ]
    return _table(b"APIC", 5, b"".join(parts))


def _local_apic(uid: int, apic_id: int) -> bytes:
    if apic_id < 255:
        return struct.pack("<BBBBI", abi.MADT_LOCAL_APIC, 8, uid, apic_id, abi.MADT_ENABLED)
    return struct.pack("<BBHIII", abi.MADT_LOCAL_X2APIC, 16, 0, apic_id, abi.MADT_ENABLED, uid)


def _override(source: int, gsi: int, flags: int) -> bytes:
    return struct.pack("<BBBBIH", abi.MADT_SOURCE_OVERRIDE, 10, 0, source, gsi, flags)


def _mcfg() -> bytes:
    """PCI Firmware 3.2 §4.1.2: one segment group."""
    allocation = struct.pack("<QHBBI", layout.ECAM_START, 0, 0, layout.ECAM_BUSES - 1, 0)
    return _table(b"MCFG", 1, bytes(8) + allocation)


# --- DSDT ----------------------------------------------------------------------------------------------


def _dsdt(config: AcpiConfig) -> bytes:
    devices = [_motherboard(config), *map(_processor, range(len(config.apic_ids)))]
    if config.pci:
        devices.append(_pci_root(config))
    if config.com1:
        crs = aml.resources(aml.io(layout.PORT_COM1, 8), aml.irq(layout.GSI_COM1))
        devices.append(_device("COM1", aml.eisa_id("PNP0501"), 0, crs))
    if config.rtc:
        crs = aml.resources(aml.io(layout.PORT_RTC, 2), aml.irq(layout.GSI_RTC))
        devices.append(_device("RTC_", aml.eisa_id("PNP0B00"), 0, crs))
    if config.i8042:
        ports = (aml.io(port, 1) for port in (layout.PORT_I8042_DATA, layout.PORT_I8042_COMMAND))
        crs = aml.resources(*ports, aml.irq(1))
        devices.append(_device("KBD_", aml.eisa_id("PNP0303"), 0, crs))
    devices += [_virtio_mmio(index, slot) for index, slot in enumerate(config.virtio_mmio)]
    # §7.4.2: SLP_TYPa, SLP_TYPb, two reserved.
    sleep = (aml.integer(value) for value in (abi.SLP_TYP_S5, abi.SLP_TYP_S5, 0, 0))
    body = aml.scope("_SB_", *devices) + aml.name("_S5_", aml.package(*sleep))
    return _table(b"DSDT", 2, body)


def _device(seg: str, hid: bytes, uid: int, crs: bytes | None, *terms: bytes) -> bytes:
    named = [aml.name("_HID", hid), aml.name("_UID", aml.integer(uid))]
    if crs is not None:
        named.append(aml.name("_CRS", crs))
    return aml.device(seg, *named, *terms)


def _motherboard(config: AcpiConfig) -> bytes:
    """What is taken and has no device of its own. Linux uses ECAM only if it finds it here."""
    taken = [aml.io(layout.PORT_ACPI_PM, abi.PM_BLOCK_SIZE), aml.io(layout.PORT_RESET, 1)]
    if config.pci:
        taken.append(aml.memory32(layout.ECAM_START, layout.ECAM_SIZE))
    return _device("MBRD", aml.eisa_id("PNP0C02"), 0, aml.resources(*taken))


def _processor(uid: int) -> bytes:
    """§8.4: every processor of the MADT is declared, by its UID."""
    return _device(f"C{uid:03X}", aml.string("ACPI0007"), uid, None)


def _pci_root(config: AcpiConfig) -> bytes:
    """A PCI Express root bridge. Without a pin there is no _PRT: all functions interrupt by messages."""
    windows = [
        aml.bus_window(0, layout.ECAM_BUSES - 1),
        aml.io_window(layout.PCI_IO_START, layout.PCI_IO_END - 1),
        aml.memory_window32(layout.PCI_MMIO32_START, layout.PCI_MMIO32_END - 1),
    ]
    if config.mmio64 is not None:
        start, size = config.mmio64
        windows.append(aml.memory_window64(start, start + size - 1))
    routes = [aml.name("_PRT", aml.package(*map(_route, config.pci_pins)))]
    return _device(
        "PCI0",
        aml.eisa_id("PNP0A08"),
        0,
        aml.resources(*windows),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        *(routes if config.pci_pins else ()),
    )


def _route(pin: PciPin) -> bytes:
    """§6.2.13: all functions of the device, INTA#, no link device, and so the GSI itself."""
    entry = (pin.device << 16 | 0xFFFF, 0, 0, pin.gsi)
    return aml.package(*map(aml.integer, entry))


def _virtio_mmio(index: int, slot: MmioDevice) -> bytes:
    """virtio 1.2 §4.2.1 leaves the discovery to the platform; LNRO0005 is Linux's name for it."""
    crs = aml.resources(aml.memory32(slot.address, slot.size), aml.edge_interrupt(slot.gsi))
    return _device(f"VR{index:02X}", aml.string("LNRO0005"), index, crs)
