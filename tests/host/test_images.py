"""Image formats: by header and name; backing files are followed by us, and only so far."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from host.image_tools import create, needs_qemu_img, qemu_img
from hostel.errors import ImageError
from hostel.host import images
from hostel.host.images import Layer

MIB = 1 << 20


def qcow2(backing: str, *, version: int = 3, place: int = 512, features: int = 0) -> bytes:
    """A header with the name of a backing file, true or not."""
    name = backing.encode()
    header = images._QCOW2.pack(b"QFI\xfb", version, place, len(name), 16, MIB, 0).ljust(72, b"\0")
    header += images._QCOW2_V3.pack(features, 0, 0, 4, 104)
    return header.ljust(place, b"\0") + name + bytes(1024)


@needs_qemu_img
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx"])
def test_header_and_name_say_it(tmp_path: Path, format: str) -> None:
    image = create(tmp_path / f"disk.{format}", format)
    assert images.format_of(image) == format
    layer = images.layer(image, format)
    assert images.chain(image, format) == (layer,)
    assert images.size_of(layer) == 64 * MIB
    renamed = image.rename(tmp_path / "disk.img")
    assert images.format_of(renamed) == "raw", "a guest can write the header of a raw disk"
    assert f"format={format}" in images.doubt(renamed, "raw")
    assert images.format_of(renamed, format) == format, "the user's word counts"
    assert not images.doubt(renamed, format)


def test_name_and_header_quarrel(tmp_path: Path) -> None:
    """Taken as raw, a guest could write that header, and it would be followed at the next start."""
    image = tmp_path / "disk.qcow2"
    image.write_bytes(bytes(MIB))
    with pytest.raises(ImageError, match="named like a qcow2 image and is none"):
        images.format_of(image)
    assert images.format_of(image, "raw") == "raw"
    with pytest.raises(ImageError, match="no vmdk image"):
        images.format_of(image, "vmdk")


@needs_qemu_img
def test_a_row_of_backing_files(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(MIB))
    (tmp_path / "sub").mkdir()
    middle = create(tmp_path / "middle.qcow2", "qcow2", MIB, "-b", "base.img", "-F", "raw")
    top = create(
        tmp_path / "sub" / "top.qcow2", "qcow2", MIB, "-b", "../middle.qcow2", "-F", "qcow2"
    )
    assert images.chain(top, "qcow2") == (
        Layer(top, "qcow2"),
        Layer(middle, "qcow2"),
        Layer(base, "raw"),
    )


@pytest.mark.parametrize(
    "name",
    ["json:{}", "nbd://localhost", "fat:/etc", "file:/etc/passwd", "/etc", "absent.img", "a\0b"],
)
def test_backing_files_that_are_none(tmp_path: Path, name: str) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(qcow2(name))
    with pytest.raises(ImageError, match="its backing file"):
        images.chain(image, "qcow2")


def test_a_backing_file_is_not_probed(tmp_path: Path) -> None:
    """A raw base whose first bytes a guest wrote: its name says raw, and so it is."""
    (tmp_path / "base.img").write_bytes(qcow2("/etc/passwd"))
    image = tmp_path / "disk.qcow2"
    image.write_bytes(qcow2("base.img"))
    assert images.chain(image, "qcow2")[1:] == (Layer(tmp_path / "base.img", "raw"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_backing_file_that_the_caller_may_not_read(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(qcow2("/etc/shadow"))
    with pytest.raises(ImageError, match="cannot be read"):
        images.chain(image, "qcow2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (qcow2("disk.qcow2"), "have no end"),
        (qcow2("x", version=9), "version 9"),
        (qcow2("x", features=4), "keeps its data in another file"),
        (qcow2("x" * 1024), "1024 bytes"),
        (images._QCOW2.pack(b"QFI\xfb", 3, 0, 0, 16, MIB, 2), "encrypted"),
        (b"QFI\xfb", "version 0"),
    ],
)
def test_hostile_qcow2_headers(tmp_path: Path, content: bytes, message: str) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        images.chain(image, "qcow2")


@pytest.mark.parametrize(
    ("capacity", "text"), [(0, b""), (2048, b'parentFileNameHint="/etc/passwd"')]
)
def test_a_vmdk_that_points_elsewhere(tmp_path: Path, capacity: int, text: bytes) -> None:
    image = tmp_path / "disk.vmdk"
    header = images._VMDK.pack(b"KDMV", 1, 3, capacity, 128, 1, 20)
    image.write_bytes(header.ljust(512, b"\0") + text + bytes(4096))
    with pytest.raises(ImageError, match="several files"):
        images.chain(image, "vmdk")


@needs_qemu_img
@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_a_vmdk_that_is_a_list_of_files(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", str(image), "1M")
    for format in ("auto", "vmdk"):
        with pytest.raises(ImageError, match="several files; qemu-img convert"):
            images.format_of(image, format)


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "raw"])
def test_a_damaged_size(tmp_path: Path, format: str) -> None:
    image = tmp_path / f"disk.{format}"
    image.write_bytes(b"")
    with pytest.raises(ImageError, match="empty, or its header is damaged"):
        images.size_of(images.layer(image, format))


@needs_qemu_img
@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 1 << 40, 20 << 40])
def test_our_qcow2_is_one(tmp_path: Path, size: int) -> None:
    image = tmp_path / "overlay.qcow2"
    image.write_bytes(images.empty_qcow2(size))
    assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == size
    qemu_img("check", "-q", image)
