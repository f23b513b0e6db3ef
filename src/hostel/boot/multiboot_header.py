"""The header by which a kernel says that it is for a multiboot loader (Multiboot 0.6.96 §3.1)."""

from __future__ import annotations

import ctypes

import msgspec

from hostel.abi import multiboot as abi
from hostel.errors import ImageError

from .elf import Segment, check_segments
from .source import Source

_MAGIC = abi.HEADER_MAGIC.to_bytes(4, "little")
_SIZE = ctypes.sizeof(abi.MultibootHeader)
SEARCH = abi.SEARCH


class Header(msgspec.Struct, frozen=True):
    offset: int
    """In the file."""
    flags: int
    fields: abi.MultibootHeader


def find(head: bytes) -> Header | None:
    """The first aligned place with the magic whose three words add up to zero."""
    at = head.find(_MAGIC)
    while at >= 0:
        fields = abi.MultibootHeader.from_buffer_copy(head[at : at + _SIZE].ljust(_SIZE, b"\0"))
        total = fields.magic + fields.flags + fields.checksum
        if at % 4 == 0 and at + 12 <= len(head) and total & 0xFFFF_FFFF == 0:
            return Header(at, fields.flags, fields)
        at = head.find(_MAGIC, at + 1)
    return None


def names_addresses(header: Header) -> bool:
    """Its own; else those of the ELF that it is in count."""
    return bool(header.flags & abi.AOUT_KLUDGE)


def check_flags(source: Source, header: Header) -> None:
    """A loader must refuse what it does not know (§3.1.1). A video mode is a wish, not a need."""
    known = abi.PAGE_ALIGN | abi.MEMORY_INFO | abi.VIDEO_MODE
    if unknown := header.flags & abi.REQUIRED & ~known:
        raise ImageError(f"{source.name}: its multiboot header needs unknown features {unknown:#x}")


def flat_segment(source: Source, header: Header) -> tuple[Segment, int]:
    """Segment and entry of a kernel that names its own addresses ("the a.out kludge", §3.1.3)."""
    fields = header.fields
    if not names_addresses(header):
        raise ImageError(
            f"{source.name} has a multiboot header without load addresses, and is no ELF file",
            cure="set bit 16 of its flags, or link it as ELF",
        )
    offset = header.offset - (fields.header_addr - fields.load_addr)
    if not 0 <= offset <= header.offset:
        raise ImageError(f"{source.name}: the load address in its multiboot header is absurd")
    filesz = (
        fields.load_end_addr - fields.load_addr if fields.load_end_addr else source.size - offset
    )
    if filesz <= 0:
        raise ImageError(f"{source.name}: the end in its multiboot header lies before its begin")
    if offset + filesz > source.size:
        raise ImageError(
            f"{source.name} is truncated: its multiboot header leads to byte {offset + filesz}"
            f" of {source.size}"
        )
    memsz = max(filesz, fields.bss_end_addr - fields.load_addr)
    segment = Segment(fields.load_addr, memsz, offset, filesz, fields.load_addr)
    check_segments(source, [segment])
    return segment, fields.entry_addr
