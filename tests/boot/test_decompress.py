"""Payloads of every compression, and the cache of what was unpacked: whole, or not there."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard

from guests import kernels
from hostel.boot import bzimage, decompress, elf
from hostel.boot.source import Source
from hostel.errors import ImageError

MIB = 1 << 20
CODE = bytes(range(256)) * 64
NOTE = b"\6\0\0\0\4\0\0\0\1\1\0\0Linux\0\0\0abcd"
KERNEL = kernels.elf(
    segments=((MIB, 3 * MIB, CODE + bytes(MIB)), (8 * MIB, 64, b"data")), entry=MIB, note=NOTE
)


def lz4_legacy(plain: bytes) -> bytes:
    blocks = [plain[at : at + (8 << 20)] for at in range(0, len(plain), 8 << 20)]
    packed = (lz4.block.compress(block, store_size=False) for block in blocks)
    framed = b"".join(len(block).to_bytes(4, "little") + block for block in packed)
    return b"\x02\x21\x4c\x18" + framed


def zstd(plain: bytes) -> bytes:
    """As the kernel's build does, from a pipe: the frame does not tell its size."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    return packer.compress(plain) + packer.flush()


def xz(plain: bytes) -> bytes:
    """As scripts/xz_wrap.sh does: CRC32 and the x86 filter."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lz4_legacy,
    "zstd": zstd,
    "xz": xz,
    "lzma": lambda plain: lzma.compress(plain, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
}


def unpack(packed: bytes) -> bytes:
    with Source.of_bytes(packed, "test") as source:
        return decompress.unpack(source, 0, len(packed))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hostel/vmlinux"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(kernels.bzimage(gzip.compress(KERNEL)))
    return path


def vmlinux(path: Path) -> Source:
    with Source.open(path) as source:
        image = bzimage.parse(source)
        return decompress.vmlinux(source, image.payload_offset, image.payload_size)


# --- compressions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("plain", [KERNEL, bytes(9 << 20), b"x"], ids=["kernel", "9 MiB", "byte"])
def test_each_compression(name: str, plain: bytes) -> None:
    assert unpack(kernels.with_size(FORMATS[name](plain), plain)) == plain


def test_gzip_carries_its_own_size() -> None:
    assert unpack(gzip.compress(KERNEL)) == KERNEL


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", ["cut", "longer", "shorter", "flipped", "huge"])
def test_damage_is_found(name: str, damage: str) -> None:
    packed = bytearray(FORMATS[name](KERNEL))
    size = len(KERNEL)
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "longer":
        size += 1
    elif damage == "shorter":
        size -= 1
    elif damage == "huge":
        size = 0xFFFF_FFFF
    else:
        packed[6:60] = bytes(54)
    with pytest.raises(ImageError, match="its compressed kernel is broken"):
        unpack(bytes(packed) + size.to_bytes(4, "little"))


@pytest.mark.parametrize("magic", [b"\x89LZO\0\r\n\x1a\n", b"\0\0\0\0"])
def test_what_is_left_to_the_guest(magic: bytes) -> None:
    with pytest.raises(decompress.UnknownPayloadError):
        unpack(magic + bytes(60))


# --- the cache -------------------------------------------------------------------------------------------


def test_what_is_cached_is_the_same_kernel_without_its_zeros(image: Path, cache: Path) -> None:
    with vmlinux(image) as source:
        kernel = elf.parse(source)
        assert [(s.paddr, s.memsz) for s in kernel.segments] == [(MIB, 3 * MIB), (8 * MIB, 64)]
        assert source.read(kernel.segments[0].offset, kernel.segments[0].filesz) == CODE
        assert source.read(kernel.segments[1].offset, kernel.segments[1].filesz) == b"data"
        assert kernel.entry == MIB
        assert kernel.is_linux()
        assert source.size < len(KERNEL) - MIB + 8192
    assert len(list(cache.iterdir())) == 1


def test_the_second_time_nothing_is_unpacked(
    image: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmlinux(image).close()
    monkeypatch.setattr(decompress, "unpack", None)
    with vmlinux(image) as source:
        assert elf.parse(source).entry == MIB


def test_another_kernel_in_the_same_place_is_another_entry(image: Path, cache: Path) -> None:
    vmlinux(image).close()
    other = kernels.elf(entry=MIB + 8)
    image.write_bytes(kernels.bzimage(gzip.compress(other)))
    with vmlinux(image) as source:
        assert elf.parse(source).entry == MIB + 8
    assert len(list(cache.iterdir())) == 2


def test_a_copy_that_keeps_its_time_is_the_same_entry(
    image: Path, cache: Path, tmp_path: Path
) -> None:
    vmlinux(image).close()
    copy = tmp_path / "copy"
    copy.write_bytes(image.read_bytes())
    os.utime(copy, ns=(0, image.stat().st_mtime_ns))
    vmlinux(copy).close()
    assert len(list(cache.iterdir())) == 1


def test_a_full_disk_costs_the_cache_and_nothing_else(
    image: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(fd, data[:100])
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    with vmlinux(image) as source:
        assert source.size == len(KERNEL)
        assert elf.parse(source).entry == MIB
    assert written
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("home", ["file", "missing"])
def test_a_cache_that_cannot_be(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" if home == "file" else "relative"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with vmlinux(image) as source:
        assert elf.parse(source).entry == MIB


def test_many_writers_at_once(image: Path, cache: Path) -> None:
    failures: list[Exception] = []

    def unpack_it() -> None:
        try:
            with vmlinux(image) as source:
                assert elf.parse(source).entry == MIB
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=unpack_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(cache.iterdir())) == 1


def test_the_newest_stay(cache: Path, tmp_path: Path) -> None:
    for index in range(decompress.KEEP + 3):
        path = tmp_path / f"bzImage{index}"
        path.write_bytes(kernels.bzimage(gzip.compress(kernels.elf(entry=MIB + index))))
        vmlinux(path).close()
    assert len(list(cache.iterdir())) == decompress.KEEP
