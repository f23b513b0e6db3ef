"""What a file is, by its content; and one precise line for each that is no kernel for this machine."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest

from guests import kernels
from hostel.boot import decompress
from hostel.boot.image import open_kernel, vmlinux_for
from hostel.errors import ImageError

LINUX_NOTE = struct.pack("<III", 6, 4, 0x101) + b"Linux\0\0\0" + bytes(4)
PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x10_0000)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hostel/vmlinux"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some-file"


def refused(path: Path) -> str:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        open_kernel(path)
    assert set(os.listdir("/proc/self/fd")) == before, "a file descriptor was left open"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def multiboot_header(flags: int, *addresses: int) -> bytes:
    return struct.pack(
        f"<III{len(addresses)}I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF, *addresses
    )


# --- what is recognised -------------------------------------------------------------------------------


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "bzImage.gz"
    path.write_bytes(kernels.elf())
    with open_kernel(path) as image:
        assert image.protocol == "linux"


@pytest.mark.parametrize(
    ("data", "protocol", "entry"),
    [
        (bytes(510) + b"\x55\xaa", "sector", 0x7C00),
        (kernels.elf(), "linux", MIB),
        (kernels.elf(entry=MIB + 16), "linux", MIB + 16),
        (kernels.elf(note=LINUX_NOTE), "linux", MIB),
        (kernels.elf(note=PVH_NOTE), "pvh", MIB),
        (kernels.elf(note=PVH_NOTE, bits=32, machine=3), "pvh", MIB),
        (kernels.elf(note=PVH_NOTE + LINUX_NOTE), "linux", MIB),
        (kernels.elf(note=PVH_NOTE, segments=((MIB, 64, multiboot_header(3)),)), "multiboot", MIB),
        (kernels.elf(bits=32, machine=3, segments=((MIB, 64, multiboot_header(0)),)), "multiboot", MIB),
        (multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB + 8), "multiboot", MIB + 8),
    ],
)  # fmt: skip
def test_how_a_kernel_is_entered(file: Path, data: bytes, protocol: str, entry: int) -> None:
    file.write_bytes(data)
    with open_kernel(file) as image:
        assert (image.protocol, image.entry) == (protocol, entry)


def test_a_higher_half_kernel_names_its_entry_by_a_virtual_address(file: Path) -> None:
    data = bytearray(kernels.elf(entry=0xFFFF_8000_0010_0008))
    struct.pack_into("<Q", data, 64 + 16, 0xFFFF_8000_0010_0000)  # p_vaddr
    file.write_bytes(data)
    with open_kernel(file) as image:
        assert image.entry == 0x10_0008


def test_flat_multiboot_is_loaded_where_its_header_says(file: Path) -> None:
    """The header is 16 bytes into what is loaded, the file has 8 bytes before that."""
    header = multiboot_header(
        1 << 16, 2 * MIB + 16, 2 * MIB, 2 * MIB + 100, 2 * MIB + 4096, 2 * MIB + 60
    )
    file.write_bytes(bytes(24) + header + bytes(200))
    with open_kernel(file) as image:
        (segment,) = image.segments
        assert (segment.paddr, segment.offset, segment.filesz, segment.memsz) == (
            2 * MIB,
            8,
            100,
            4096,
        )


def test_a_bzimage_is_its_payload(file: Path, cache: Path) -> None:
    inner = kernels.elf(entry=MIB + 4, note=PVH_NOTE)
    file.write_bytes(kernels.bzimage(gzip.compress(inner)))
    with open_kernel(file) as image:
        assert (image.protocol, image.entry) == ("linux", MIB + 4)
        assert image.header is not None
        assert image.header.cmdline_size == 2047
    assert vmlinux_for(file).parent == cache
    with open_kernel(vmlinux_for(file)) as image:
        assert image.protocol == "pvh", "the notes are kept"


def test_vmlinux_for_what_is_no_bzimage_is_the_file_itself(file: Path) -> None:
    file.write_bytes(kernels.elf())
    assert vmlinux_for(file) == file


@pytest.mark.parametrize("magic", [b"\x89LZO\0\r\n\x1a\n", b"????"])
def test_a_payload_left_to_the_guest(file: Path, cache: Path, magic: bytes) -> None:
    file.write_bytes(kernels.bzimage(magic + bytes(100)))
    with open_kernel(file) as image:
        (segment,) = image.segments
        assert (image.entry, segment.paddr, segment.memsz) == (16 * MIB + 0x200, 16 * MIB, MIB)
        assert segment.offset == 3 * 512
    assert not cache.exists()


# --- what is refused ------------------------------------------------------------------------------------


def test_missing_directory_empty_device(tmp_path: Path, file: Path) -> None:
    assert "there is no kernel at" in refused(tmp_path / "nothing")
    assert "is a directory" in refused(tmp_path)
    file.touch()
    assert "is an empty file" in refused(file)
    assert "is no regular file" in refused(Path("/dev/null"))
    assert "cannot open" in refused(Path("a\0b"))
    assert "cannot open" in refused(file / "below")


def test_unreadable(file: Path) -> None:
    file.write_bytes(kernels.elf())
    file.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "no permission to read" in refused(file)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"#!/bin/sh\necho hello\n", "a text file"),
        ("Grüße, Welt\n".encode() * 100, "a text file"),
        (gzip.compress(kernels.elf()), "compressed by gzip; unpack it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed by zstd"),
        (b"\xfd7zXZ\0" + bytes(64), "compressed by xz"),
        (bytes(0x38) + b"ARM\x64" + bytes(64), "aarch64"),
        (bytes(0x38) + b"RSC\x05" + bytes(64), "riscv"),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(64), "aarch64"),
        (b"MZ\0\0zimg" + bytes(64), "zboot"),
        (b"MZ" + bytes(600), "an EFI or DOS program"),
        (bytes(510) + b"\x55\xaa" + bytes(512), "a boot sector or a disk image"),
        (b"070701" + bytes(100), "a cpio archive"),
        (b"QFI\xfb" + bytes(100), "a qcow2 disk image"),
        (bytes(64) + b"\xd6\x50\x52\xe8" + bytes(64), "multiboot 2"),
        (bytes(range(256)) * 4, "not a kernel: neither bzImage nor ELF nor multiboot"),
        (kernels.elf(machine=183), "a kernel for aarch64; this machine is x86-64"),
        (kernels.elf(machine=243), "a kernel for riscv"),
        (kernels.elf(machine=22, order=">"), "a kernel for s390x"),
        (kernels.elf(machine=8, order=">", bits=32), "a kernel for mips"),
        (kernels.elf(machine=999), "a kernel for CPU number 999"),
        (kernels.elf(machine=3, bits=32), "a kernel for i386 with neither"),
        (kernels.elf(machine=3, bits=32, note=LINUX_NOTE), "a kernel for i386 with neither"),
        (kernels.elf(kind=1), "no executable (e_type 1)"),
        (kernels.elf(kind=4), "no executable (e_type 4)"),
        (kernels.elf(segments=()), "0 program headers of 56 bytes are absurd"),
        (kernels.elf(entry=5 * MIB), "the entry 0x500000 lies in no segment"),
        (kernels.elf(segments=((MIB, 0, b""),)), "has no segment to load"),
        (kernels.elf(segments=((MIB, 4, b"12345"),)), "more bytes in the file than in memory"),
        (kernels.elf(segments=((0x7000, 64, b"1"),)), "lies below 1 MiB"),
        (kernels.elf(segments=((MIB, 8, b"1"), (MIB + 4, 8, b"1"))), "overlap at 0x100004"),
        (kernels.elf(segments=((1 << 60, 64, b"1"),)), "absurd"),
        (kernels.elf(segments=((2**64 - 16, 64, b"1"),)), "absurd"),
        (kernels.elf(segments=((MIB, 2**63, b"1"),)), "absurd"),
        (kernels.elf()[:40], "a truncated ELF file: 40 bytes"),
        (kernels.elf()[:100], "is truncated"),
        (kernels.elf()[:-1], "is truncated: a segment ends at byte 121 of 120"),
        (b"\x7fELF\x09" + kernels.elf()[5:], "unknown class 9"),
        (multiboot_header(3), "a multiboot header without load addresses"),
        (multiboot_header(1 << 16 | 8, MIB, MIB, 0, 0, MIB), "unknown features 0x8"),
        (multiboot_header(1 << 16, MIB, MIB + 8, 0, 0, MIB), "load address in its multiboot header"),
        (multiboot_header(1 << 16, 2 * MIB, MIB, 0, 0, MIB), "load address in its multiboot header"),
        (multiboot_header(1 << 16, MIB, MIB, MIB - 1, 0, MIB), "lies before its begin"),
        (multiboot_header(1 << 16, MIB, MIB, MIB + 4096, 0, MIB), "truncated"),
        (multiboot_header(1 << 16, MIB, MIB, 0, 0, 0), "the entry 0x0 lies in no segment"),
        (kernels.bzimage(b"x" * 64, xloadflags=0), "a 32-bit kernel (i386)"),
        (kernels.bzimage(b"x" * 64, version=0x0204), "speaks boot protocol 2.04, which is too old"),
        (kernels.bzimage(b"x" * 64, version=0x0208), "nothing says that it has a 64-bit entry"),
        (kernels.bzimage(b"x" * 4096)[:4000], "a truncated bzImage: 4000 bytes of"),
        (kernels.bzimage(b"x" * 64)[:600], "a truncated bzImage"),
        (kernels.bzimage(b"x" * 64)[:0x210], "a truncated bzImage"),
        (kernels.bzimage(b"????" + bytes(60), init_size=0xFFFF_FFFF), "asks for 4294967295 bytes of memory"),
        (kernels.bzimage(gzip.compress(kernels.elf())[:-20] + bytes(20)), "its compressed kernel is broken"),
        (kernels.bzimage(gzip.compress(kernels.elf(bits=32, machine=3))), "a 32-bit kernel (i386)"),
        (kernels.bzimage(gzip.compress(b"no ELF" * 20)), "is no ELF file"),
    ],
)  # fmt: skip
def test_what_is_no_kernel_for_us(file: Path, data: bytes, said: str) -> None:
    file.write_bytes(data)
    assert said in refused(file)


def test_every_cut_of_a_kernel_is_refused_or_whole(file: Path) -> None:
    """No length of a truncated file leads to anything but an ImageError or a checked image."""
    whole = kernels.bzimage(b"????" + bytes(200))
    for data in (whole, kernels.elf(note=PVH_NOTE), multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB)):
        for size in range(1, len(data), 7):
            file.write_bytes(data[:size])
            try:
                open_kernel(file).close()
            except ImageError:
                continue


def test_any_byte_of_a_header_may_lie(file: Path) -> None:
    for data, header in (
        (kernels.elf(note=PVH_NOTE), 176),
        (kernels.bzimage(b"????" + bytes(60)), 0x26C),
    ):
        for at in range(header):
            lie = bytearray(data)
            lie[at] ^= 0xFF
            file.write_bytes(lie)
            try:
                open_kernel(file).close()
            except ImageError:
                continue


def test_a_payload_is_not_unpacked_beyond_reason(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "MAX_UNPACKED", 1000)
    file.write_bytes(kernels.bzimage(gzip.compress(bytes(1001))))
    assert "it claims 1001 bytes" in refused(file)
