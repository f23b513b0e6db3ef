"""A bzImage's payload, unpacked once on the host and kept in the user's cache.

Entering the ELF that a bzImage carries saves the guest its own decompression, and the memory for it.

::

    bzImage ── payload ──(unpack)── vmlinux ──(only what is loaded, trailing zeros cut)── cache file
    $XDG_CACHE_HOME/hostel/vmlinux/<key>

*The key* is the image's size, its modification time and a checksum of its first and last 4 KiB, not a
hash of all its bytes: 60 µs instead of 8–40 ms at every boot, and still one entry for one kernel wherever
it lies. The first page holds the version with its build time; a package's files keep their modification
time.

*The cache file* is written beside its name, synchronised and renamed: it is whole or it is not there,
whoever else writes it at the same time. It is an ELF in which nothing but loaded bytes remain; the
zeros that kernels carry for their bss are cut off, so that loading does not touch that memory. A
cache that cannot be written (full, read-only, no home) costs the time of unpacking at every boot and
nothing else. The newest ``KEEP`` entries stay.
"""

from __future__ import annotations

import binascii
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from hostel import cache
from hostel.errors import HostError, ImageError

from . import elf
from .bzimage import ONLY_32_BIT
from .source import Source

KEEP = 4
"""Cached kernels: about 45 MB each."""
MAX_UNPACKED = 1 << 30
"""No kernel is larger; a payload that claims so is broken or means harm."""

_FORMAT = "-2"
"""Part of the key: raise it whenever what is written changes."""
_LZ4_BLOCK = 8 << 20
"""The largest block of a legacy frame, uncompressed."""


class UnknownPayloadError(Exception):
    """A compression that we cannot undo; the guest can. Never leaves this package."""


def cache_directory() -> Path:
    return cache.home() / "vmlinux"


def vmlinux(source: Source, offset: int, length: int) -> Source:
    """The ELF inside a bzImage, open, from the cache or unpacked now.

    UnknownPayloadError if it must be left to the guest; ImageError if it is broken.
    """
    path = _cache_path(source)
    if path is not None and (cached := _open_cached(path)) is not None:
        return cached
    name = f"the kernel in {source.name}"
    unpacked = Source.of_bytes(unpack(source, offset, length), name)
    try:
        kernel = elf.parse(unpacked)
        if kernel.bits != 64:
            raise ImageError(ONLY_32_BIT.format(name=source.name), cure="take one for x86-64")
        if path is None or (cached := _cache(unpacked, kernel, path)) is None:
            return unpacked
    except BaseException:
        unpacked.close()
        raise
    unpacked.close()
    return cached


def _cache(unpacked: Source, kernel: elf.ElfFile, path: Path) -> Source | None:
    """The entry, open; None if the cache cannot be written."""
    with contextlib.suppress(OSError, HostError):
        _store(unpacked, kernel, path)
        _evict(path.parent)
    return _open_cached(path)


def cached_path(source: Source) -> Path | None:
    """Where the unpacked kernel of this image lies, if it does."""
    path = _cache_path(source)
    return path if path is not None and path.is_file() else None


def unpack(source: Source, offset: int, length: int) -> bytes:
    """The payload at ``offset``, uncompressed."""
    payload = source.read(offset, length)
    decompress = next((run for magic, run in _FORMATS if payload.startswith(magic)), None)
    if decompress is None:
        raise UnknownPayloadError(f"{source.name}: unknown compression {payload[:4].hex()}")
    # The kernel's build appends the size where the format does not end in it anyway, as gzip does
    # (Linux scripts/Makefile.lib, "size_append").
    size = int.from_bytes(payload[-4:], "little")
    try:
        if size > MAX_UNPACKED:
            raise ValueError(f"it claims {size} bytes")
        data = decompress(payload, size)
        if len(data) != size:
            raise ValueError(f"it holds {len(data)} bytes of {size}")
    except UnknownPayloadError as error:
        raise UnknownPayloadError(f"{source.name}: {error}") from None
    except Exception as error:
        # Each library has an exception of its own; all of them mean this, and input is all they had.
        raise ImageError(f"{source.name}: its compressed kernel is broken: {error}") from None
    return data


# --- compressions: (payload, size) -> data; a byte more than ``size`` is enough to know it is wrong ------


def _unlz4(payload: bytes, size: int) -> bytes:
    """The legacy frame: blocks, each behind its compressed size (lz4 doc/lz4_Frame_format.md)."""
    import lz4.block

    parts: list[bytes] = []
    offset = 4
    while size > 0:
        start = offset + 4
        offset = start + int.from_bytes(payload[offset:start], "little")
        if not start < offset <= len(payload):
            raise ValueError("it ends too early")
        block = lz4.block.decompress(
            memoryview(payload)[start:offset], uncompressed_size=min(size, _LZ4_BLOCK)
        )
        parts.append(block)
        size -= len(block)
    return b"".join(parts)


def _unzstd(payload: bytes, size: int) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)


def _ungzip(payload: bytes, size: int) -> bytes:
    import zlib

    return zlib.decompressobj(wbits=31).decompress(payload, size + 1)


def _unxz(payload: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, size + 1)


def _unlzma(payload: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, size + 1)


def _unbzip2(payload: bytes, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size + 1)


def _unlzo(payload: bytes, size: int) -> bytes:
    raise UnknownPayloadError("LZO is not unpacked on the host")


_FORMATS: tuple[tuple[bytes, Callable[[bytes, int], bytes]], ...] = (
    (b"\x02\x21\x4c\x18", _unlz4),
    (b"\x28\xb5\x2f\xfd", _unzstd),
    (b"\x1f\x8b", _ungzip),
    (b"\xfd7zXZ\0", _unxz),
    (b"BZh", _unbzip2),
    (b"\x5d\0\0", _unlzma),
    (b"\x89LZO\0", _unlzo),
)


# --- the cache -----------------------------------------------------------------------------------------


def _cache_path(source: Source) -> Path | None:
    page = min(4096, source.size)
    checksum = binascii.crc32(source.read(0, page) + source.read(source.size - page, page))
    try:
        return cache_directory() / f"{source.size:x}-{source.modified:x}-{checksum:08x}{_FORMAT}"
    except HostError:  # no home directory
        return None


def _open_cached(path: Path) -> Source | None:
    try:
        source = Source.open(path)
    except ImageError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # for _evict
    return source


def _store(unpacked: Source, kernel: elf.ElfFile, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with cache.workshop(path.parent) as work, (work / "vmlinux").open("wb") as file:
        elf.write_compact(unpacked, kernel, file.fileno())
        os.fsync(file.fileno())
        os.replace(file.name, path)


def _evict(directory: Path) -> None:
    """Forget the entries used longest ago."""
    entries = [entry for entry in directory.iterdir() if not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True)[KEEP:]:
        entry.unlink()
