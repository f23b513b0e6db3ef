"""Kernel modules: what a name needs, in which order, however the kernel's package stores it."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hostel.boot.modules import Module, elf_section, find, name_of
from hostel.errors import HostError
from hostel.host import kernels


def module(depends: str = "", softdep: str = "", wide: bool = True) -> bytes:
    """A little ELF object with a .modinfo section, as a module has it."""
    info = b"license=GPL\0depends=%s\0" % depends.encode()
    info += b"softdep=%s\0" % softdep.encode() if softdep else b""
    names = b"\0.modinfo\0.shstrtab\0"
    header = 64 if wide else 52
    table = header + len(info) + len(names)

    def section(name: int, offset: int, size: int) -> bytes:
        if wide:
            return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)
        return struct.pack("<IIIIIIIIII", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    size = 64 if wide else 40
    fields = (1, 62 if wide else 3, 1, 0, 0, table, 0, header, 0, 0, size, 3, 2)
    sections = section(0, 0, 0) + section(1, header, len(info))
    sections += section(10, header + len(info), len(names))
    return ident + struct.pack(layout, *fields) + info + names + sections


MODULES = {
    "drivers/virtio/virtio_ring.ko": module(),
    "drivers/virtio/virtio.ko": module("virtio_ring"),
    "drivers/virtio/virtio_pci.ko": module("virtio,virtio_ring"),
    "drivers/char/hw_random/virtio-rng.ko": module("virtio"),
    "fs/fuse/fuse.ko": module(wide=False),
    "fs/fuse/virtiofs.ko": module("fuse,virtio,virtio_ring"),
    "fs/big.ko": module("", "pre: crc32c absent post: fuse"),
    "crypto/crc32c_generic.ko": module(),
    "fs/lonely.ko": module("nobody"),
    "fs/one.ko": module("two"),
    "fs/two.ko": module("one"),
}

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def make(suffix: str = "", pack: Callable[[bytes], bytes] = bytes, index: str = "") -> Path:
        for name, content in MODULES.items():
            path = tmp_path / "kernel" / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(content))
        (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/fs/crypto-x.ko\n")
        if index:
            (tmp_path / index).write_text("".join(f"kernel/{name}\n" for name in MODULES))
        return tmp_path

    return make


def names(found: list[Module]) -> list[str]:
    return [module.name for module in found]


@pytest.mark.parametrize("index", ["", "modules.order"])
def test_dependencies_come_first(tree: Tree, index: str) -> None:
    found = names(find(tree(index=index), "6.1", ["virtio_pci", "virtiofs"]))
    assert found == ["virtio_ring", "virtio", "virtio_pci", "fuse", "virtiofs"]


def test_modules_dep_is_believed(tree: Tree) -> None:
    """depmod lists all dependencies, the deepest last; here one that .modinfo does not know of."""
    directory = tree()
    lines = [
        "kernel/fs/fuse/virtiofs.ko: kernel/fs/big.ko kernel/drivers/virtio/virtio_ring.ko",
        "kernel/fs/big.ko: kernel/drivers/virtio/virtio_ring.ko",
        "kernel/drivers/virtio/virtio_ring.ko:",
        "kernel/crypto/crc32c_generic.ko:",
    ]
    (directory / "modules.dep").write_text("\n".join(lines))
    found = names(find(directory, "6.1", ["virtiofs"]))
    assert found == ["virtio_ring", "crc32c_generic", "big", "virtiofs"]


PACKERS = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("index", ["", "modules.order"])
def test_compressed_modules(tree: Tree, suffix: str, index: str) -> None:
    """modules.order names the files as they were before compression."""
    found = find(tree(suffix, PACKERS[suffix], index), "6.1", ["virtio-pci"])
    assert names(found) == ["virtio_ring", "virtio", "virtio_pci"]
    assert found[0].read() == MODULES["drivers/virtio/virtio_ring.ko"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_damaged_module(tree: Tree, suffix: str) -> None:
    with pytest.raises(HostError, match=r"virtio_pci\.ko.* is damaged"):
        find(tree(suffix, lambda data: b"no archive" + data), "6.1", ["virtio_pci"])


def test_dash_and_underscore_are_one(tree: Tree) -> None:
    directory = tree()
    for spelling in ("virtio-rng", "virtio_rng"):
        assert names(find(directory, "6.1", [spelling]))[-1] == "virtio_rng"
    assert name_of("kernel/drivers/char/hw_random/virtio-rng.ko.zst") == "virtio_rng"


def test_built_in_needs_no_file(tree: Tree) -> None:
    assert find(tree(), "6.1", ["ext4", "crypto_x"]) == []


def test_missing_module_is_named(tree: Tree) -> None:
    with pytest.raises(HostError, match=r"kernel 6\.1 has no module xfs,"):
        find(tree(), "6.1", ["xfs"])
    with pytest.raises(HostError, match=r"no module nobody \(needed by lonely\)"):
        find(tree(), "6.1", ["lonely"])


def test_missing_optional_module_is_left_out(tree: Tree) -> None:
    assert names(find(tree(), "6.1", ["fuse"], ["xfs", "virtio_ring"])) == ["fuse", "virtio_ring"]


def test_soft_dependencies(tree: Tree) -> None:
    """Before it, where they exist; not those after it."""
    assert names(find(tree(), "6.1", ["big"])) == ["crc32c_generic", "big"]


def test_circles_end(tree: Tree) -> None:
    assert sorted(names(find(tree(), "6.1", ["one"]))) == ["one", "two"]


def test_unreadable_directory(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no module virtio"):
        find(tmp_path / "nothing", "6.1", ["virtio"])


@given(st.binary(max_size=200))
def test_any_bytes_may_claim_to_be_elf(data: bytes) -> None:
    assert isinstance(elf_section(b"\x7fELF\x02\x01" + data, b".modinfo"), bytes)


def test_truncated_modules_say_nothing() -> None:
    whole = module("virtio")
    for size in range(len(whole)):
        assert len(elf_section(whole[:size], b".modinfo")) <= len(whole)


def test_a_real_kernel() -> None:
    """Against objcopy's reading of the same sections, and every dependency before its user."""
    kernel = next((k for k in kernels.survey() if k.modules and not k.problem), None)
    if kernel is None or kernel.modules is None:
        pytest.skip("no guest kernel with modules here: hostel kernel fetch")
    wanted = ["virtio_pci", "virtio_console", "virtio_blk", "virtiofs", "overlay"]
    found = find(kernel.modules, kernel.release, wanted, ["btrfs", "xfs", "virtio_rng"])
    seen: set[str] = set()
    for item in found:
        dump = subprocess.run(
            ["objcopy", "-O", "binary", "--only-section=.modinfo", item.path, "/dev/stdout"],
            capture_output=True,
            check=True,
        ).stdout
        if item.path.suffix == ".ko":
            assert dump == elf_section(item.read(), b".modinfo")
        entries = dict(e.split(b"=", 1) for e in dump.split(b"\0") if b"=" in e)
        needs = {n.replace("-", "_") for n in entries[b"depends"].decode().split(",") if n}
        assert needs <= seen | _builtin(kernel.modules)
        seen.add(item.name)


def _builtin(directory: Path) -> set[str]:
    return {name_of(line) for line in (directory / "modules.builtin").read_text().splitlines()}
