"""Disk images: which format a file has, and which other files it stands on.

::

    raw      its bytes are the disk's
    qcow2    own header ── may name a backing file ── which may name another …
    vmdk, vhdx   a container alone; parents and extents in other files are refused

Whose word counts: a guest with a raw disk writes its first bytes, and may write there the header of a
qcow2 image with /etc/shadow as its backing file. So a file is no container because its header says so;
its name, which no guest can change, has to say it too, or the user.

Nothing that opens an image follows a name in it by itself: ``chain`` reads the names, checks that they
are plain paths that the caller may read, and hands out the whole row, each with its format.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import msgspec

from hostel.errors import ImageError

Format = Literal["raw", "qcow2", "vmdk", "vhdx"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MAGIC: dict[bytes, Format] = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}
_SUFFIXES: dict[str, Format] = {
    ".qcow2": "qcow2",
    ".qcow": "qcow2",
    ".vmdk": "vmdk",
    ".vhdx": "vhdx",
}
DEPTH = 16
"""The longest row of backing files."""
NAME_BYTES = 1023  # QEMU docs/interop/qcow2.txt, "backing_file_size"

# docs/interop/qcow2.txt, "Header": magic, version, backing file's place and length, cluster bits, size,
# encryption; at 72, from version 3 on: incompatible features.
_QCOW2 = struct.Struct(">4sIQIIQI")
_QCOW2_V3 = struct.Struct(">QQQII")
_V3_AT = 72
_EXTERNAL_DATA = 1 << 2
_BACKING_FORMAT = 0xE2792ACA
# Sparse extent header of VMDK: magic, version, flags, capacity, grain size, descriptor's place and size.
_VMDK = struct.Struct("<4sIIQQQQ")
_VMDK_LIST = b"# Disk DescriptorFile"
_VMDK_TEXT = 20 << 9
"""Bytes of an embedded descriptor that are looked at: vmkfstools writes 20 sectors."""


class Layer(msgspec.Struct, frozen=True):
    """One file of a row; the first is the disk, each stands on the next."""

    path: Path
    format: Format


def format_of(path: Path, given: str = "auto") -> Format:
    """The format that ``path`` is to be opened with; ``ImageError`` where its name and header quarrel."""
    found = _by_header(path)
    named = _SUFFIXES.get(path.suffix.lower(), "raw")
    wanted = named if given == "auto" else given
    if wanted == "vmdk" and _read(path, 0, len(_VMDK_LIST)) == _VMDK_LIST:
        raise _in_pieces(path)
    if given != "auto":
        if given not in ("raw", found):
            raise ImageError(f"disk {path} is no {given} image: its header is that of {found}")
        return given  # type: ignore[return-value]  # one of FORMATS: the spec has been checked
    if named not in ("raw", found):
        raise ImageError(
            f"disk {path} is named like a {named} image and is none",
            cure=f"give format={found}, or rename it",
        )
    return named


def doubt(path: Path, taken: str) -> str:
    """A word for the user, where a file that is taken as raw looks like a container."""
    found = _by_header(path) if taken == "raw" else "raw"
    if found == "raw":
        return ""
    return (
        f"disk {path} is taken as raw, by its name; it begins like a {found} image: "
        f"if it is one, say format={found}"
    )


def layer(path: Path, format: str) -> Layer:
    """``format``: as ``format_of`` says."""
    assert format in FORMATS
    return Layer(path, format)


def chain(path: Path, format: str) -> tuple[Layer, ...]:
    """The image and all that it stands on, from the top; every one a readable file."""
    row = [layer(path, format)]
    while below := _below(row[-1]):
        if len(row) == DEPTH or any(os.path.samefile(below.path, one.path) for one in row):
            raise ImageError(f"disk {path}: its backing files have no end")
        row.append(below)
    return tuple(row)


def _by_header(path: Path) -> Format:
    head = _read(path, 0, 8)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "raw")


def _below(layer: Layer) -> Layer | None:
    if layer.format == "qcow2":
        return _qcow2_backing(layer.path)
    if layer.format == "vmdk":
        _check_vmdk(layer.path)
    return None


def _qcow2_backing(path: Path) -> Layer | None:
    header = _read(path, 0, 104).ljust(104, b"\0")
    _, version, place, length, _, _, encrypted = _QCOW2.unpack_from(header)
    if version not in (2, 3):
        raise ImageError(f"disk {path}: qcow2 version {version} is not known")
    if encrypted:
        raise ImageError(f"disk {path} is encrypted; hostel takes no keys")
    incompatible, _, _, _, size = _QCOW2_V3.unpack_from(header, _V3_AT)
    if version == 3 and incompatible & _EXTERNAL_DATA:
        raise ImageError(
            f"disk {path} keeps its data in another file",
            cure=f"qemu-img convert -O qcow2 {path} NEW",
        )
    if not place:
        return None
    if not 0 < length <= NAME_BYTES:
        raise ImageError(f"disk {path}: the name of its backing file has {length} bytes")
    name = os.fsdecode(_read(path, place, length))
    backing = _plain_path(path, name)
    told = dict(_extensions(path, size if version == 3 else _V3_AT, place)).get(_BACKING_FORMAT)
    return Layer(backing, format_of(backing, _known(path, told)))


def _known(path: Path, told: bytes | None) -> str:
    name = "auto" if told is None else told.decode(errors="replace")
    if name not in ("auto", *FORMATS):
        raise ImageError(f"disk {path}: its backing file is a {name!r} image, which is not known")
    return name


def _extensions(path: Path, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Type and data of each header extension; they lie before the backing file's name."""
    while at + 8 <= end:
        kind, length = struct.unpack(">II", _read(path, at, 8).ljust(8, b"\0"))
        if not kind or length > end - at:
            return
        yield kind, _read(path, at + 8, length)
        at += 8 + -(-length // 8) * 8


def _plain_path(path: Path, name: str) -> Path:
    """QEMU would take ``json:{…}`` and ``nbd://host`` too: an image must not reach so far."""
    if "\0" in name or ":" in name.partition("/")[0]:
        raise ImageError(f"disk {path}: its backing file is {name!r}; only files are followed")
    backing = Path(os.path.abspath(path.resolve().parent / name))
    if not os.access(backing, os.R_OK) or backing.is_dir():
        reason = "cannot be read" if backing.exists() else "is not there"
        raise ImageError(f"disk {path}: its backing file {backing} {reason}")
    return backing


def _check_vmdk(path: Path) -> None:
    """Only a monolithic sparse image is whole in itself; a capacity of 0 points to other files."""
    fields = _VMDK.unpack(_read(path, 0, _VMDK.size).ljust(_VMDK.size, b"\0"))
    capacity, descriptor = fields[3], fields[5]
    text = _read(path, descriptor << 9, _VMDK_TEXT)
    parent = b"parentFileNameHint" in text
    if not capacity or parent:
        raise _in_pieces(path)


def _in_pieces(path: Path) -> ImageError:
    return ImageError(
        f"disk {path} is part of a VMDK of several files",
        cure=f"qemu-img convert -O qcow2 {path} NEW.qcow2",
    )


def _read(path: Path, offset: int, size: int) -> bytes:
    """What is there of it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"disk {path}: {error.strerror}") from None
    try:
        return os.pread(fd, size, offset)
    except (OSError, OverflowError):
        return b""
    finally:
        os.close(fd)


# -- sizes --------------------------------------------------------------------------------------


def size_of(layer: Layer) -> int:
    """Bytes of the disk that the image shows."""
    if layer.format == "qcow2":
        size = int(_QCOW2.unpack(_read(layer.path, 0, _QCOW2.size).ljust(_QCOW2.size, b"\0"))[5])
    elif layer.format == "vmdk":
        size = _VMDK.unpack(_read(layer.path, 0, _VMDK.size).ljust(_VMDK.size, b"\0"))[3] << 9
    elif layer.format == "vhdx":
        size = _vhdx_size(layer.path)
    else:
        size = _raw_size(layer.path)
    if not 0 < size < 1 << 63:
        raise ImageError(f"disk {layer.path} is empty, or its header is damaged")
    return size


def _raw_size(path: Path) -> int:
    """A part of a sector at the end is shown as a whole one, as QEMU does it."""
    with path.open("rb") as file:
        return -(-file.seek(0, os.SEEK_END) >> 9 << 9)


# MS-VHDX §2.2.3 (region table), §2.6 (metadata): identifiers, as they lie in the file.
_VHDX_REGIONS = 192 << 10
_VHDX_METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_DISK_SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")


def _vhdx_size(path: Path) -> int:
    metadata = _vhdx_entry(path, _VHDX_REGIONS, 16, _VHDX_METADATA, "<Q")
    item = _vhdx_entry(path, metadata, 32, _VHDX_DISK_SIZE, "<I")
    return int.from_bytes(_read(path, metadata + item, 8), "little")


def _vhdx_entry(path: Path, table: int, header: int, wanted: bytes, kind: str) -> int:
    """The offset beside an identifier; both tables have entries of 32 bytes."""
    entries = _read(path, table + header, 32 * 64)
    for at in range(0, len(entries) - 31, 32):
        if entries.startswith(wanted, at):
            return int(struct.unpack_from(kind, entries, at + 16)[0])
    return 0


# -- overlays -----------------------------------------------------------------------------------

_CLUSTER = 64 << 10
_L2_COVERS = _CLUSTER * _CLUSTER // 8


def empty_qcow2(size: int) -> bytes:
    """A qcow2 image without data: header, refcount table, refcount block, L1 table (qcow2.txt).

    It names no backing file: who opens it says what lies below.
    """
    entries = -(-size // _L2_COVERS)
    clusters = 3 + -(-entries * 8 // _CLUSTER)
    header = _QCOW2.pack(b"QFI\xfb", 3, 0, 0, 16, size, 0)
    header += struct.pack(">IQQIIQ", entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0)
    header += _QCOW2_V3.pack(0, 0, 0, 4, 104)
    table = (2 * _CLUSTER).to_bytes(8, "big")
    counts = b"\0\1" * clusters
    parts = (header, table, counts)
    return b"".join(part.ljust(_CLUSTER, b"\0") for part in parts) + bytes(
        _CLUSTER * (clusters - 3)
    )
