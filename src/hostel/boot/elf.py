"""ELF as a kernel loader reads it: where each segment goes, where to enter, which notes it carries.

Addresses are physical throughout. What is checked here holds for whoever loads the result: every
segment's bytes are in the file, no two segments overlap, none wraps or lies below 1 MiB (where the boot
data of ``vmm/layout.py`` are), and the entry lies in one of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec
from msgspec.structs import astuple

from hostel.abi import elf as abi
from hostel.errors import ImageError
from hostel.vmm import layout

from .source import Source

_MAX_PHDRS = 128
_MAX_ADDRESS = 1 << 48
_MAX_NOTES = 1 << 20
_HEADER = 64
_PAGE = 4096


class Segment(msgspec.Struct, frozen=True):
    """``filesz`` bytes of the file at ``offset`` go to ``paddr``; the rest of ``memsz`` is zero."""

    paddr: int
    memsz: int
    offset: int
    filesz: int
    vaddr: int

    @property
    def end(self) -> int:
        return self.paddr + self.memsz


class Note(msgspec.Struct, frozen=True):
    owner: bytes
    type: int
    data: bytes


class ElfFile(msgspec.Struct, frozen=True):
    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[Note, ...]

    def note(self, owner: bytes, type: int) -> Note | None:
        return next((n for n in self.notes if n.owner == owner and n.type == type), None)

    def is_linux(self) -> bool:
        """Linux puts notes of its own name into every vmlinux (include/linux/elfnote.h, 2.6.23)."""
        return any(note.owner == abi.NOTE_LINUX for note in self.notes)


def parse(source: Source) -> ElfFile:
    """``ImageError`` for whatever is no executable for x86."""
    bits, header = _read_header(source)
    phdrs = _read_phdrs(source, bits, header)
    segments = tuple(_segments(source, phdrs))
    if not segments:
        raise ImageError(f"{source.name} has no segment to load")
    entry = _physical(header.e_entry, segments)
    return ElfFile(bits, entry, segments, tuple(_notes(source, phdrs)))


def check_entry(source: Source, entry: int, segments: tuple[Segment, ...]) -> None:
    if not any(segment.paddr <= entry < segment.end for segment in segments):
        raise ImageError(f"{source.name}: the entry {entry:#x} lies in no segment")


def check_segments(source: Source, segments: list[Segment]) -> None:
    """Each one's place, and that no two overlap."""
    last = 0
    for segment in sorted(segments, key=lambda segment: segment.paddr):
        if segment.end > _MAX_ADDRESS:
            raise ImageError(f"{source.name}: a segment at {segment.paddr:#x} is absurd")
        if segment.paddr < layout.KERNEL_ADDRESS:
            raise ImageError(
                f"{source.name}: a segment at {segment.paddr:#x} lies below 1 MiB, where boot data are",
                cure="link the kernel at 1 MiB or above",
            )
        if segment.paddr < last:
            raise ImageError(f"{source.name}: two segments overlap at {segment.paddr:#x}")
        last = segment.end


def write_compact(source: Source, file: ElfFile, fd: int) -> None:
    """The same kernel as a new ELF64 file: notes and segments only, trailing zeros of those cut off."""
    notes = b"".join(_pack_note(note) for note in file.notes)
    notes_at = abi.EHDR64.size + (len(file.segments) + 1) * abi.PHDR64.size
    phdrs = [abi.Phdr(abi.PT_NOTE, 4, notes_at, 0, 0, len(notes), len(notes), 4)]
    offset = _align(notes_at + len(notes), _PAGE)
    for segment in file.segments:
        data = source.read(segment.offset, segment.filesz).rstrip(b"\0")
        phdrs.append(
            abi.Phdr(
                *(abi.PT_LOAD, 7, offset, segment.vaddr, segment.paddr),
                *(len(data), segment.memsz, _PAGE),
            )
        )
        _write_at(fd, data, offset)
        offset = _align(offset + len(data), _PAGE)
    table = b"".join(abi.PHDR64.pack(*astuple(phdr)) for phdr in phdrs)
    _write_at(fd, _pack_header(file.entry, len(phdrs)) + table + notes, 0)


def _pack_header(entry: int, phnum: int) -> bytes:
    header = abi.Ehdr(
        *(abi.ET_EXEC, abi.EM_X86_64, 1, entry, abi.EHDR64.size, 0, 0),
        *(abi.EHDR64.size, abi.PHDR64.size, phnum, 0, 0, 0),
    )
    ident = abi.MAGIC + bytes((abi.ELFCLASS64, abi.ELFDATA2LSB, 1))
    return ident.ljust(abi.EI_NIDENT, b"\0") + abi.EHDR64.pack(*astuple(header))[abi.EI_NIDENT :]


def _pack_note(note: Note) -> bytes:
    name, data = (part.ljust(_align(len(part), 4), b"\0") for part in (note.owner, note.data))
    return abi.NHDR.pack(len(note.owner), len(note.data), note.type) + name + data


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _read_header(source: Source) -> tuple[int, abi.Ehdr]:
    head = source.read(0, min(_HEADER, source.size))
    if len(head) < _HEADER:
        raise ImageError(f"{source.name} is a truncated ELF file: {source.size} bytes")
    if not head.startswith(abi.MAGIC):
        raise ImageError(f"{source.name} is no ELF file")
    _check_machine(source, head)
    if head[abi.EI_CLASS] == abi.ELFCLASS64:
        bits, header = 64, abi.Ehdr(*abi.EHDR64.unpack_from(head))
    elif head[abi.EI_CLASS] == abi.ELFCLASS32:
        bits, header = 32, abi.Ehdr(*abi.EHDR32.unpack_from(head))
    else:
        raise ImageError(f"{source.name} is an ELF file of unknown class {head[abi.EI_CLASS]}")
    if header.e_type not in (abi.ET_EXEC, abi.ET_DYN):
        raise ImageError(
            f"{source.name} is an ELF file but no executable (e_type {header.e_type})",
            cure="link it: an object file, module or core dump cannot be booted",
        )
    return bits, header


def _check_machine(source: Source, head: bytes) -> None:
    order = ">H" if head[abi.EI_DATA] == abi.ELFDATA2MSB else "<H"
    (machine,) = struct.unpack_from(order, head, abi.EI_NIDENT + 2)
    if machine not in (abi.EM_386, abi.EM_X86_64) or order == ">H":
        cpu = abi.MACHINES.get(machine, f"CPU number {machine}")
        raise ImageError(f"{source.name} is a kernel for {cpu}; this machine is x86-64")


def _read_phdrs(source: Source, bits: int, header: abi.Ehdr) -> list[abi.Phdr]:
    size = abi.PHDR64.size if bits == 64 else abi.PHDR32_SIZE
    if header.e_phnum == 0 or header.e_phnum > _MAX_PHDRS or header.e_phentsize != size:
        raise ImageError(
            f"{source.name}: {header.e_phnum} program headers of {header.e_phentsize} bytes are absurd"
        )
    table = source.read(header.e_phoff, size * header.e_phnum)
    parse_one = abi.parse_phdr64 if bits == 64 else abi.parse_phdr32
    return [parse_one(table, index * size) for index in range(header.e_phnum)]


def _segments(source: Source, phdrs: list[abi.Phdr]) -> list[Segment]:
    segments = []
    for phdr in phdrs:
        if phdr.p_type != abi.PT_LOAD or phdr.p_memsz == 0:
            continue
        if phdr.p_filesz > phdr.p_memsz:
            raise ImageError(f"{source.name}: a segment has more bytes in the file than in memory")
        if phdr.p_offset + phdr.p_filesz > source.size:
            raise ImageError(
                f"{source.name} is truncated: a segment ends at byte {phdr.p_offset + phdr.p_filesz}"
                f" of {source.size}"
            )
        segments.append(
            Segment(phdr.p_paddr, phdr.p_memsz, phdr.p_offset, phdr.p_filesz, phdr.p_vaddr)
        )
    check_segments(source, segments)
    return segments


def _physical(entry: int, segments: tuple[Segment, ...]) -> int:
    """Linux names its entry by its physical address; a higher-half kernel by its virtual one."""
    if any(segment.paddr <= entry < segment.end for segment in segments):
        return entry
    for segment in segments:
        if segment.vaddr <= entry < segment.vaddr + segment.memsz:
            return entry - segment.vaddr + segment.paddr
    return entry


def _notes(source: Source, phdrs: list[abi.Phdr]) -> Iterator[Note]:
    """A note section that is broken ends its list; it is no reason not to boot."""
    for phdr in phdrs:
        if phdr.p_type != abi.PT_NOTE or phdr.p_filesz > _MAX_NOTES:
            continue
        data = source.read(phdr.p_offset, phdr.p_filesz)
        offset = 0
        while offset + abi.NHDR.size <= len(data):
            name_size, size, kind = abi.NHDR.unpack_from(data, offset)
            name_at = offset + abi.NHDR.size
            data_at = name_at + _align(name_size, 4)
            if data_at + size > len(data):
                break
            yield Note(data[name_at : name_at + name_size], kind, data[data_at : data_at + size])
            offset = data_at + _align(size, 4)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to
