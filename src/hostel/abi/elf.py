"""ELF (System V ABI, gABI chapters 4 and 5): the parts that a kernel loader reads. No I/O.

Field order is that of ``<elf.h>``; a compiled probe compares sizes and offsets.
"""

from __future__ import annotations

from struct import Struct

import msgspec

MAGIC = b"\x7fELF"

# e_ident.
EI_CLASS = 4
EI_DATA = 5
EI_NIDENT = 16
ELFCLASS32 = 1
ELFCLASS64 = 2
ELFDATA2LSB = 1
ELFDATA2MSB = 2

# e_type.
ET_REL = 1
ET_EXEC = 2
ET_DYN = 3
ET_CORE = 4

# e_machine.
EM_386 = 3
EM_X86_64 = 62

MACHINES = {
    0: "no CPU",
    2: "sparc",
    EM_386: "i386",
    8: "mips",
    20: "powerpc",
    21: "ppc64",
    22: "s390x",
    40: "arm",
    42: "sh",
    43: "sparc64",
    50: "ia64",
    EM_X86_64: "x86-64",
    183: "aarch64",
    243: "riscv",
    247: "bpf",
    258: "loongarch",
}
"""The CPU of an e_machine, as people write it."""

PT_LOAD = 1
PT_NOTE = 4

# Notes by which a kernel says what it is.
NOTE_XEN = b"Xen\0"
NOTE_LINUX = b"Linux\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18
"""Physical address of the 32-bit PVH entry (Xen's public/elfnote.h)."""


class Ehdr(msgspec.Struct, frozen=True):
    """Elf32_Ehdr or Elf64_Ehdr, after e_ident."""

    e_type: int
    e_machine: int
    e_version: int
    e_entry: int
    e_phoff: int
    e_shoff: int
    e_flags: int
    e_ehsize: int
    e_phentsize: int
    e_phnum: int
    e_shentsize: int
    e_shnum: int
    e_shstrndx: int


class Phdr(msgspec.Struct, frozen=True):
    """A program header; the order of fields is ours, since the two classes differ."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


EHDR32 = Struct("<16xHHIIIIIHHHHHH")
EHDR64 = Struct("<16xHHIQQQIHHHHHH")
_PHDR32 = Struct("<IIIIIIII")
PHDR64 = Struct("<IIQQQQQQ")
PHDR32_SIZE = _PHDR32.size
NHDR = Struct("<III")
"""Elf32_Nhdr and Elf64_Nhdr alike: n_namesz, n_descsz, n_type."""


def parse_phdr32(data: bytes, offset: int) -> Phdr:
    kind, file, vaddr, paddr, filesz, memsz, flags, align = _PHDR32.unpack_from(data, offset)
    return Phdr(kind, flags, file, vaddr, paddr, filesz, memsz, align)


def parse_phdr64(data: bytes, offset: int) -> Phdr:
    return Phdr(*PHDR64.unpack_from(data, offset))
