"""What kernel a file holds, by its content and never by its name, and how it is entered.

::

    bzImage ── payload unpacked ──> ELF ─┐
            └─ left to the guest ────────┼─────────> linux      64-bit boot protocol
    ELF64, a Linux or with nothing else ─┘
    multiboot 1 header, in an ELF or flat ─────────> multiboot  32-bit, information in EBX
    ELF with a PVH note ───────────────────────────> pvh        32-bit, start info in EBX
    512 bytes that end with 55 AA ─────────────────> sector     real mode, at 0x7C00

A Linux that could be entered in several ways is entered in 64-bit mode: it is the shortest way. Of
multiboot and PVH multiboot comes first, as in QEMU, where such kernels are tried.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from hostel.abi import boot as abi
from hostel.abi import elf as elf_abi
from hostel.errors import ImageError
from hostel.vmm import layout

from . import bzimage, decompress, elf
from .elf import Segment
from .source import Source

_SECTOR = 512
_SIGNATURE = b"\x55\xaa"

BootProtocol = Literal["linux", "pvh", "multiboot", "sector"]


class KernelImage(msgspec.Struct, frozen=True):
    """An open kernel whose parts have been checked. A context manager."""

    protocol: BootProtocol
    source: Source
    segments: tuple[Segment, ...]
    entry: int
    header: abi.SetupHeader | None = None
    """Of the bzImage it came from."""

    @property
    def end(self) -> int:
        """The first address behind all of it."""
        return max(segment.end for segment in self.segments)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> KernelImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_kernel(path: Path) -> KernelImage:
    """``ImageError`` says what the file is, if it is no kernel that this machine can enter."""
    source = Source.open(path)
    image = None
    try:
        image = _recognise(source)
        elf.check_entry(image.source, image.entry, image.segments)
        return image
    except BaseException:
        if image is not None:
            image.close()
        source.close()
        raise


def vmlinux_for(path: Path) -> Path:
    """The unpacked kernel of a bzImage, in the cache; ``path`` itself where there is none to be had."""
    with open_kernel(path), Source.open(path) as source:
        return (decompress.cached_path(source) if _is_bzimage(source) else None) or path


def _is_bzimage(source: Source) -> bool:
    return bzimage.is_bzimage(source.head(bzimage.HEAD))


def _recognise(source: Source) -> KernelImage:
    if _is_bzimage(source):
        return _from_bzimage(source)
    from . import multiboot_header  # not for the kernel that nearly all machines have

    head = source.head(multiboot_header.SEARCH)
    if head.startswith(elf_abi.MAGIC):
        return _from_elf(source, head)
    header = multiboot_header.find(head)
    if header is None:
        if source.size == _SECTOR and head.endswith(_SIGNATURE):
            at = layout.BOOT_SECTOR
            segment = Segment(at, _SECTOR, 0, _SECTOR, at)
            return KernelImage("sector", source, (segment,), at)
        raise ImageError(f"{source.name} is {describe(head)}")
    multiboot_header.check_flags(source, header)
    segment, entry = multiboot_header.flat_segment(source, header)
    return KernelImage("multiboot", source, (segment,), entry)


def _from_bzimage(source: Source) -> KernelImage:
    image = bzimage.parse(source)
    if image.payload_size:
        try:
            inner = decompress.vmlinux(source, image.payload_offset, image.payload_size)
        except decompress.UnknownPayloadError:
            pass  # The guest can do it: enter the bzImage as it is.
        else:
            return _from_payload(source, inner, image.header)
    segment = bzimage.segment(source, image)
    entry = segment.paddr + abi.ENTRY64_OFFSET
    return KernelImage("linux", source, (segment,), entry, image.header)


def _from_payload(source: Source, inner: Source, header: abi.SetupHeader) -> KernelImage:
    try:
        kernel = elf.parse(inner)
    except ImageError:
        inner.close()
        raise
    source.close()
    return KernelImage("linux", inner, kernel.segments, kernel.entry, header)


def _from_elf(source: Source, head: bytes) -> KernelImage:
    from . import multiboot_header

    kernel = elf.parse(source)
    linux = kernel.bits == 64 and kernel.is_linux()
    if not linux and (header := multiboot_header.find(head)) is not None:
        multiboot_header.check_flags(source, header)
        if multiboot_header.names_addresses(header):
            segment, entry = multiboot_header.flat_segment(source, header)
            return KernelImage("multiboot", source, (segment,), entry)
        return KernelImage("multiboot", source, kernel.segments, kernel.entry)
    note = kernel.note(elf_abi.NOTE_XEN, elf_abi.XEN_ELFNOTE_PHYS32_ENTRY)
    if not linux and note is not None and len(note.data) in (4, 8):
        entry = int.from_bytes(note.data, "little")
        return KernelImage("pvh", source, kernel.segments, entry)
    if kernel.bits == 32:
        raise ImageError(
            f"{source.name} is a kernel for i386 with neither a PVH note nor a multiboot header",
            cure="take a kernel for x86-64",
        )
    return KernelImage("linux", source, kernel.segments, kernel.entry)


# --- what a file is that is no kernel for us -----------------------------------------------------------

_MAGICS = (
    (0x38, b"ARM\x64", "a kernel for aarch64 (Image); this machine is x86-64"),
    (0x38, b"RSC\x05", "a kernel for riscv (Image); this machine is x86-64"),
    (0x24, b"\x18\x28\x6f\x01", "a kernel for arm (zImage); this machine is x86-64"),
    (4, b"zimg", "an EFI zboot image, no kernel for this machine; unpack it first"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it first (gunzip)"),
    (0, b"\xfd7zXZ\0", "compressed by xz; unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first (unzstd)"),
    (0, b"BZh", "compressed by bzip2; unpack it first (bunzip2)"),
    (0, b"\x02\x21\x4c\x18", "compressed by lz4; unpack it first (unlz4)"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; unpack it first (unlz4)"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image, no kernel for this machine"),
    (0, b"QFI\xfb", "a qcow2 disk image, not a kernel"),
    (0, b"MZ", "an EFI or DOS program, not a kernel"),
    (0, b"070701", "a cpio archive (an initramfs?), not a kernel"),
    (0x1FE, b"\x55\xaa", "a boot sector or a disk image, not a kernel"),
)
_MULTIBOOT2_MAGIC = b"\xd6\x50\x52\xe8"


def describe(head: bytes) -> str:
    """What a file is that begins so, for an error message."""
    for offset, magic, text in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return text
    if _MULTIBOOT2_MAGIC in head:
        return "a multiboot 2 kernel; only multiboot 1 is booted"
    if _is_text(head):
        return "a text file, not a kernel"
    return "not a kernel: neither bzImage nor ELF nor multiboot"


def _is_text(head: bytes) -> bool:
    try:
        text = head[:512].decode()
    except UnicodeDecodeError as error:
        # A character cut in two by the limit is no reason to doubt.
        text = head[: error.start].decode() if error.start > 500 else "\0"
    return all(character.isprintable() or character in "\t\n\r\f\x1b" for character in text)
