"""The ACPI tables: sums, links, and what ACPICA's own compiler makes of them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from hostel.abi import acpi as abi
from hostel.boot import aml
from hostel.boot.acpi import AcpiConfig, MmioDevice, PciPin, build_tables, write_tables
from hostel.errors import SpecError
from hostel.memory import GuestMemory
from hostel.vmm import layout

FULL = AcpiConfig(
    apic_ids=range(32),
    mmio64=(8 << 30, layout.PCI_MMIO64_SIZE),
    rtc=True,
    i8042=True,
    pci_pins=[PciPin(2, 16), PciPin(31, 23)],
    virtio_mmio=[
        MmioDevice(layout.VIRTIO_MMIO_START + index * 0x1000, 0x1000, gsi)
        for index, gsi in enumerate(layout.VIRTIO_MMIO_GSIS)
    ],
)
CONFIGS = {
    "full": FULL,
    "usual": AcpiConfig(apic_ids=(0,)),
    "bare": AcpiConfig(apic_ids=(0, 1), pci=False, com1=False),
    "x2apic": AcpiConfig(apic_ids=(0, 255, 1000)),
}


def at(block: bytes, address: int, size: int) -> bytes:
    offset = address - layout.ACPI_ADDRESS
    assert 0 <= offset <= len(block) - size
    return block[offset : offset + size]


def table(block: bytes, address: int) -> bytes:
    (size,) = struct.unpack("<I", at(block, address + 4, 4))
    return at(block, address, size)


def tables(block: bytes) -> dict[str, bytes]:
    """Every table that is reached from the RSDP, as a kernel reaches it."""
    (xsdt,) = struct.unpack("<Q", block[24:32])
    found = [table(block, xsdt)]
    found += [
        table(block, *struct.unpack("<Q", found[0][n : n + 8])) for n in range(36, len(found[0]), 8)
    ]
    fadt = next(data for data in found if data[:4] == b"FACP")
    found.append(table(block, struct.unpack("<Q", fadt[140:148])[0]))
    found.append(table(block, struct.unpack("<I", fadt[36:40])[0]))
    return {data[:4].decode(): data for data in found}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_sums_are_zero_and_all_links_lead_somewhere(name: str) -> None:
    block = build_tables(CONFIGS[name])
    assert block[:8] == b"RSD PTR "
    assert sum(block[:20]) % 256 == sum(block[:36]) % 256 == 0
    found = tables(block)
    assert {"XSDT", "FACP", "APIC", "DSDT", "FACS"} <= set(found)
    assert ("MCFG" in found) == CONFIGS[name].pci
    for signature, data in found.items():
        assert signature == "FACS" or sum(data) % 256 == 0, signature
    (rsdt,) = struct.unpack("<I", block[16:20])
    old, new = table(block, rsdt), found["XSDT"]
    assert struct.unpack(f"<{len(old[36:]) // 4}I", old[36:]) == struct.unpack(
        f"<{len(new[36:]) // 8}Q", new[36:]
    )


def test_facs_is_aligned() -> None:
    fadt = tables(build_tables(FULL))["FACP"]
    assert struct.unpack("<I", fadt[36:40])[0] % 64 == 0


def test_the_reset_and_power_registers_are_the_devices() -> None:
    fadt = tables(build_tables(FULL))["FACP"]
    assert len(fadt) == 276
    event, _, control, _, _, timer = struct.unpack("<6I", fadt[56:80])
    assert (event, control, timer) == (0x600, 0x604, 0x608)
    assert fadt[116:129] == struct.pack("<BBBBQB", 1, 8, 0, 1, layout.PORT_RESET, abi.RESET_VALUE)
    assert struct.unpack("<I", fadt[48:52])[0] == 0, "no SMI_CMD: ACPI mode for good"


@pytest.mark.parametrize(("rtc", "i8042"), [(False, False), (True, False), (False, True)])
def test_what_is_not_described_is_said_to_be_absent(rtc: bool, i8042: bool) -> None:
    found = tables(build_tables(AcpiConfig(apic_ids=(0,), rtc=rtc, i8042=i8042)))
    (flags,) = struct.unpack("<H", found["FACP"][109:111])
    assert bool(flags & abi.IAPC_NO_CMOS_RTC) == (not rtc)
    assert bool(flags & abi.IAPC_8042) == i8042
    assert (aml.eisa_id("PNP0B00") in found["DSDT"]) == rtc
    assert (aml.eisa_id("PNP0303") in found["DSDT"]) == i8042


def test_madt_lists_every_cpu_once() -> None:
    madt = tables(build_tables(FULL))["APIC"]
    cpus, offset = [], 44
    while offset < len(madt):
        if madt[offset] == abi.MADT_LOCAL_APIC:
            cpus.append((madt[offset + 2], madt[offset + 3]))
        offset += madt[offset + 1]
    assert offset == len(madt)
    assert cpus == [(index, index) for index in range(32)]


def test_they_are_written_where_kernels_look() -> None:
    with GuestMemory(2 << 20) as memory:
        assert write_tables(memory, FULL) == layout.ACPI_ADDRESS
        assert memory.read(layout.ACPI_ADDRESS, 8) == b"RSD PTR "


def test_more_than_the_place_holds() -> None:
    with pytest.raises(SpecError, match="the ACPI tables need"):
        build_tables(AcpiConfig(apic_ids=range(3000)))


# --- AML -------------------------------------------------------------------------------------------------


def test_eisa_ids_as_the_specification_encodes_them() -> None:
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x100, b"\x0b\x00\x01"),
        (0x1_0000, b"\x0c\x00\x00\x01\x00"),
        (1 << 32, b"\x0e" + (1 << 32).to_bytes(8, "little")),
    ],
)
def test_integers_are_short(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


@pytest.mark.parametrize("size", [0, 50, 56, 57, 58, 59, 4000, 4090, 5000, 0xFFFFF])
def test_a_package_length_counts_itself(size: int) -> None:
    scope = aml.scope("_SB_", bytes(size))
    lead, more = scope[1], scope[1] >> 6
    length = lead & 0x3F
    if more:
        length = lead & 0xF | int.from_bytes(scope[2 : 2 + more], "little") << 4
    assert length == len(scope) - 1


@pytest.mark.parametrize("seg", ["abc", "toolong", "1ABC", "AB C", ""])
def test_bad_names(seg: str) -> None:
    with pytest.raises(ValueError, match="not an AML name"):
        aml.name_seg(seg)


# --- ACPICA ----------------------------------------------------------------------------------------------


def iasl(directory: Path, *arguments: str) -> str:
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("no iasl (apt-get install acpica-tools)")
    done = subprocess.run(
        [program, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CONFIGS)
def test_acpica_reads_every_table_without_a_word(name: str, tmp_path: Path) -> None:
    for signature, data in tables(build_tables(CONFIGS[name])).items():
        (tmp_path / f"{signature}.dat").write_bytes(data)
        said = iasl(tmp_path, "-d", f"{signature}.dat")
        text = (tmp_path / f"{signature}.dsl").read_text()
        for word in ("warning", "error", "invalid", "incorrect"):
            assert word not in (said + text).lower(), said + text


def test_acpica_compiles_the_dsdt_back(tmp_path: Path) -> None:
    """Disassembled and compiled again it is the same machine, and lint finds nothing to say."""
    dsdt = tables(build_tables(FULL))["DSDT"]
    (tmp_path / "dsdt.dat").write_bytes(dsdt)
    iasl(tmp_path, "-d", "dsdt.dat")
    said = iasl(tmp_path, "-oa", "-p", "again", "dsdt.dsl")
    assert "0 Errors, 0 Warnings, 0 Remarks" in said
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == dsdt[36:]


def test_the_dsdt_describes_the_machine(tmp_path: Path) -> None:
    (tmp_path / "dsdt.dat").write_bytes(tables(build_tables(FULL))["DSDT"])
    iasl(tmp_path, "-d", "dsdt.dat")
    text = " ".join((tmp_path / "dsdt.dsl").read_text().split())
    for device in ("PNP0A08", "PNP0A03", "PNP0C02", "PNP0501", "PNP0B00", "PNP0303"):
        assert f'EisaId ("{device}")' in text
    assert text.count('"LNRO0005"') == len(layout.VIRTIO_MMIO_GSIS)
    assert text.count('"ACPI0007"') == 32
    assert "Memory32Fixed (ReadWrite, 0xE0000000, // Address Base 0x00100000" in text
    assert (
        "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite"
        in text
    )
    assert "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange," in text
    assert "0xC000, // Range Minimum 0xFFFF, // Range Maximum" in text
    assert "Package (0x04) { 0x001FFFFF, Zero, Zero, 0x17 }" in text
    assert "0x0000000200000000, // Range Minimum 0x00000011FFFFFFFF, // Range Maximum" in text
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000017, }" in text
    assert "Name (_S5" in text
