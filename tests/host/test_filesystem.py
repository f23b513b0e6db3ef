"""File systems in disk images, made by the tools that make them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from hostel.errors import ImageError
from hostel.host.filesystem import SECTOR, FileSystem, find_root

START = 2048


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    tool = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    if tool is None:
        pytest.skip("no mkfs.ext4 (package e2fsprogs)")
    image = tmp_path / "ext4.img"
    image.write_bytes(b"")
    subprocess.run([tool, "-q", str(image), "4M"], check=True)
    return image


def entry(kind: int, start: int, sectors: int) -> bytes:
    return struct.pack("<4xB3xII", kind, start, sectors)


def mbr(*entries: bytes) -> bytes:
    return bytes(446) + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


def test_whole_disk(ext4: Path) -> None:
    assert find_root(ext4) == FileSystem("ext4", 0)


def test_largest_partition_of_an_mbr(ext4: Path, tmp_path: Path) -> None:
    content = ext4.read_bytes()
    sectors = len(content) // SECTOR
    disk = tmp_path / "mbr.img"
    table = mbr(entry(0x83, START, 8), entry(0x83, START + 8, sectors))
    disk.write_bytes(table.ljust((START + 8) * SECTOR, b"\0") + content)
    assert find_root(disk) == FileSystem("ext4", 2)


def test_gpt(ext4: Path, tmp_path: Path) -> None:
    content = ext4.read_bytes()
    last = START + len(content) // SECTOR - 1
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, 4, 128)
    entries = bytes(128) + bytes(32) + struct.pack("<QQ", START, last)
    head = mbr(entry(0xEE, 1, last)) + header.ljust(SECTOR, b"\0") + entries
    disk = tmp_path / "gpt.img"
    disk.write_bytes(head.ljust(START * SECTOR, b"\0") + content)
    assert find_root(disk) == FileSystem("ext4", 2)


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, bytes(1 << 20), mbr(entry(0x83, 0xFFFFFFFF, 1)), mbr(entry(0xEE, 1, 1))],
)
def test_nothing_there(content: bytes, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(content)
    with pytest.raises(ImageError, match="no file system"):
        find_root(disk)


def test_hostile_gpt_ends(tmp_path: Path) -> None:
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2**63, 0xFFFFFFFF, 0xFFFFFFFF)
    disk = tmp_path / "disk.img"
    disk.write_bytes(mbr(entry(0xEE, 1, 1)) + header)
    with pytest.raises(ImageError):
        find_root(disk)


def test_missing_image() -> None:
    with pytest.raises(ImageError, match="No such file"):
        find_root(Path("/no/such/image"))
