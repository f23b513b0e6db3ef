"""Which file system is in a disk image, and where: by its magic numbers, on the host, before the boot.

So the initramfs carries the right driver, and an image that no guest could mount is refused with a
reason instead of a panic. Partition tables (GPT: UEFI 2.10 §5.3; MBR) are followed one level: the
largest partition with a file system we know is the root.

An image is input: every offset in it is checked by reading, and a short read is "not there".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from hostel.errors import ImageError

SECTOR = 512

_MAGIC = (
    ("ext4", 0x438, b"\x53\xef"),
    ("squashfs", 0, b"hsqs"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("erofs", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("isofs", 0x8001, b"CD001"),
)
_MBR_ENTRIES, _MBR_SIGNATURE = 446, 510
_GPT_PROTECTIVE = 0xEE
_MAX_GPT_ENTRIES = 128

MOUNT_NAMES = {"isofs": "iso9660"}
"""Where the driver's name is not the file system's."""


class FileSystem(msgspec.Struct, frozen=True):
    """``driver`` is the kernel module; ``partition`` is 0 for the whole disk."""

    driver: str
    partition: int

    @property
    def type(self) -> str:
        """As mount(2) names it."""
        return MOUNT_NAMES.get(self.driver, self.driver)


def find_root(path: Path) -> FileSystem:
    """The file system to be the root; ``ImageError`` if there is none that Linux guests mount."""
    with _open(path) as disk:
        whole = disk.file_system(0)
        if whole:
            return FileSystem(whole, 0)
        best: tuple[int, FileSystem] | None = None
        for number, start, sectors in disk.partitions():
            driver = disk.file_system(start * SECTOR)
            if driver and (best is None or sectors > best[0]):
                best = sectors, FileSystem(driver, number)
    if best is None:
        known = ", ".join(name for name, _, _ in _MAGIC)
        raise ImageError(
            f"no file system found in {path}", cure=f"known are {known}, also in a partition"
        )
    return best[1]


class _Disk:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except (OSError, OverflowError):
            return b""

    def has(self, offset: int, magic: bytes) -> bool:
        return self.read(offset, len(magic)) == magic

    def number(self, offset: int, size: int) -> int:
        return int.from_bytes(self.read(offset, size), "little")

    def file_system(self, start: int) -> str:
        return next((n for n, offset, magic in _MAGIC if self.has(start + offset, magic)), "")

    def partitions(self) -> Iterator[tuple[int, int, int]]:
        """Number, first sector, sectors."""
        if not self.has(_MBR_SIGNATURE, b"\x55\xaa"):
            return
        for index in range(4):
            entry = _MBR_ENTRIES + 16 * index
            kind = self.number(entry + 4, 1)
            if kind == _GPT_PROTECTIVE:
                yield from self._gpt()
                return
            if kind:
                yield index + 1, self.number(entry + 8, 4), self.number(entry + 12, 4)

    def _gpt(self) -> Iterator[tuple[int, int, int]]:
        if not self.has(SECTOR, b"EFI PART"):
            return
        table, size = self.number(SECTOR + 72, 8) * SECTOR, self.number(SECTOR + 84, 4)
        for index in range(min(self.number(SECTOR + 80, 4), _MAX_GPT_ENTRIES)):
            entry = table + index * size
            first, last = self.number(entry + 32, 8), self.number(entry + 40, 8)
            if first and last >= first:
                yield index + 1, first, last - first + 1


def _open(path: Path) -> _Disk:
    try:
        return _Disk(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise ImageError(f"disk image {path}: {error.strerror}") from None
