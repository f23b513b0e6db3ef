"""``abi.boot`` and ``abi.elf`` against the C compiler's view of <asm/bootparam.h> and <elf.h>.

PVH and multiboot have no headers on a host: tiny kernels with C structures of their own read what we
write (``tests/boot/test_load_kvm.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from struct import Struct
from typing import Any

import pytest

from abi.c_probe import evaluate
from hostel.abi import boot, elf, multiboot, pvh

STRUCTURES = {
    "struct setup_header": boot.SetupHeader,
}
NUMBERS = {
    "sizeof(struct boot_params)": boot.BOOT_PARAMS_SIZE,
    "offsetof(struct boot_params, acpi_rsdp_addr)": boot.ACPI_RSDP_ADDR,
    "offsetof(struct boot_params, e820_entries)": boot.E820_ENTRIES,
    "offsetof(struct boot_params, e820_table)": boot.E820_TABLE,
    "offsetof(struct boot_params, hdr)": boot.SETUP_HEADER_OFFSET,
    "sizeof(struct boot_e820_entry)": boot.E820_ENTRY.size,
    "offsetof(struct boot_e820_entry, size)": 8,
    "offsetof(struct boot_e820_entry, type)": 16,
    "sizeof(struct setup_data)": boot.SETUP_DATA.size,
    "offsetof(struct setup_data, type)": 8,
    "offsetof(struct setup_data, len)": 12,
    "LOADED_HIGH": boot.LOADED_HIGH,
    "XLF_KERNEL_64": boot.XLF_KERNEL_64,
    "SETUP_RNG_SEED": boot.SETUP_RNG_SEED,
    **{
        name: getattr(elf, name)
        for name in ("EI_CLASS", "EI_DATA", "EI_NIDENT", "ELFCLASS32", "ELFCLASS64", "ELFDATA2LSB")
    },
    **{
        name: getattr(elf, name)
        for name in (
            "ELFDATA2MSB",
            "ET_EXEC",
            "ET_DYN",
            "EM_386",
            "EM_X86_64",
            "PT_LOAD",
            "PT_NOTE",
        )
    },
}
CPUS = {
    "EM_NONE": "no CPU",
    "EM_SPARC": "sparc",
    "EM_MIPS": "mips",
    "EM_PPC": "powerpc",
    "EM_PPC64": "ppc64",
    "EM_S390": "s390x",
    "EM_ARM": "arm",
    "EM_SH": "sh",
    "EM_BPF": "bpf",
    "EM_SPARCV9": "sparc64",
    "EM_IA_64": "ia64",
    "EM_AARCH64": "aarch64",
    "EM_RISCV": "riscv",
    "EM_LOONGARCH": "loongarch",
    "EM_386": "i386",
    "EM_X86_64": "x86-64",
}
PACKED = {"Elf32_Ehdr": elf.EHDR32, "Elf64_Ehdr": elf.EHDR64, "Elf64_Phdr": elf.PHDR64}


def expected() -> dict[str, int]:
    """C expression → our value."""
    table = dict(NUMBERS)
    table |= {
        name: next(n for n, cpu in elf.MACHINES.items() if cpu == CPUS[name]) for name in CPUS
    }
    for name, cls in STRUCTURES.items():
        table[f"sizeof({name})"] = ctypes.sizeof(cls)
        for field, kind in fields(cls):
            table[f"offsetof({name}, {field})"] = getattr(cls, field).offset
            table[f"sizeof((({name} *)0)->{field})"] = ctypes.sizeof(kind)
    for name, layout in PACKED.items():
        table[f"sizeof({name})"] = layout.size
    table["sizeof(Elf32_Phdr)"] = elf.PHDR32_SIZE
    table["sizeof(Elf64_Nhdr)"] = elf.NHDR.size
    for field, offset in zip(elf.Ehdr.__struct_fields__, offsets(elf.EHDR64), strict=True):
        table[f"offsetof(Elf64_Ehdr, {field})"] = offset
    for field, offset in zip(elf.Ehdr.__struct_fields__, offsets(elf.EHDR32), strict=True):
        table[f"offsetof(Elf32_Ehdr, {field})"] = offset
    for field, offset in zip(elf.Phdr.__struct_fields__, offsets(elf.PHDR64), strict=True):
        table[f"offsetof(Elf64_Phdr, {field})"] = offset
    return table


def fields(cls: type[ctypes.Structure]) -> Iterator[tuple[str, Any]]:
    """Those that the header has too."""
    for name, kind, *_ in cls._fields_:
        if not name.startswith("_"):
            yield name, kind


def offsets(layout: Struct) -> list[int]:
    """Of each number in a format without padding but at its begin."""
    codes = layout.format.lstrip("<").removeprefix("16x")
    start = 16 if "x" in layout.format else 0
    return [start + Struct(f"<{codes[:index]}").size for index in range(len(codes))]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    headers = ("elf.h", "linux/types.h", "asm/bootparam.h")
    # Newer than Debian 12's headers may be:
    fallback = "#ifndef EM_LOONGARCH\n#define EM_LOONGARCH 258\n#endif"
    return evaluate(expected(), headers, tmp_path_factory.mktemp("probe"), definitions=fallback)


def test_every_size_offset_and_number(found: dict[str, int]) -> None:
    assert found == expected()


def test_the_32_bit_program_header() -> None:
    """Its fields stand in another order; <elf.h>: type, offset, vaddr, paddr, filesz, memsz, flags, align."""
    data = Struct("<8I").pack(1, 2, 3, 4, 5, 6, 7, 8)
    assert elf.parse_phdr32(data, 0) == elf.Phdr(
        p_type=1, p_offset=2, p_vaddr=3, p_paddr=4, p_filesz=5, p_memsz=6, p_flags=7, p_align=8
    )


def test_pvh_and_multiboot_sizes() -> None:
    """As their specifications count them; Xen's start_info.h and Multiboot 0.6.96 §3.3."""
    sizes = {
        pvh.HvmStartInfo: 56,
        pvh.HvmModlistEntry: 32,
        pvh.HvmMemmapEntry: 24,
        multiboot.MultibootHeader: 32,
        multiboot.MultibootInfo: 72,
        multiboot.MultibootModule: 16,
        multiboot.MultibootMmapEntry: 24,
    }
    assert {cls: ctypes.sizeof(cls) for cls in sizes} == sizes
