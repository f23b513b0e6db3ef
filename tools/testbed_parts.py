"""What the testbed boots: the guest kernel's files, and an initramfs of testbed_init.c with its modules.

Rules: standard library only; everything is made once and kept in the cache, under the hash of what went
in, and put there by a rename, so that two testbeds may start at once.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostel"
BOOT_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "overlay")


class TestbedError(Exception):
    """One line for the user: what is wrong, and what to do."""


def program(*names: str) -> str:
    for name in names:
        if found := shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            return found
    raise TestbedError(f"{names[-1]}: not found; run `./dev setup`")


def newest_kernel() -> Path:
    """The directory of one unpacked kernel package: boot/vmlinuz-*, lib/modules/*."""
    found = [path.parent.parent for path in (CACHE / "kernels").glob("*/boot/vmlinuz-*")]
    if not found:
        raise TestbedError(f"no kernel in {CACHE / 'kernels'}; run `./dev setup`")
    return max(found, key=_rank)


def _rank(kernel: Path) -> tuple[bool, list[int]]:
    """A cloud kernel before one for real machines, whose boot is slower; then by version."""
    return "cloud" in kernel.name, [int(number) for number in re.findall(r"\d+", kernel.name)]


def module_directory(kernel: Path) -> Path:
    """Its modules, with modprobe's tables, which a package that was only unpacked lacks."""
    found = [*kernel.glob("lib/modules/*"), *kernel.glob("usr/lib/modules/*")]
    if not found:
        raise TestbedError(f"{kernel}: no modules in it; run `hostel kernel fetch`")
    directory = found[0]
    if not (directory / "modules.dep.bin").exists():
        subprocess.run([program("depmod"), "-b", str(kernel), directory.name], check=True)
    return directory


def module_files(directory: Path) -> list[Path]:
    """What the initramfs must load, each after those it needs (modules.dep lists them in that order)."""
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        name, _, rest = line.partition(":")
        needs[Path(name).name.split(".")[0].replace("-", "_")] = [*reversed(rest.split()), name]
    files = [file for name in BOOT_MODULES for file in needs[name]]
    return [directory / file for file in dict.fromkeys(files)]


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """The `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def cached(name: str, recipe: bytes, make: Callable[[Path], None]) -> Path:
    """The file of this name and recipe: from the cache, or made in a folder beside and moved there."""
    stem, suffix = name.split(".")
    target = CACHE / "testbed" / f"{stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            scratch = Path(folder, name)
            make(scratch)
            scratch.rename(target)
    return target


def compile_c(source: Path, target: Path, *flags: str) -> None:
    compiler = [program("gcc", "cc"), "-O1", "-Wall", *flags]
    subprocess.run([*compiler, "-o", str(target), str(source)], check=True)


def build_initramfs(directory: Path) -> Path:
    source = TOP / "tools" / "testbed_init.c"
    modules = module_files(directory)

    def make(target: Path) -> None:
        init = target.with_name("init")
        compile_c(source, init, "-static")
        target.write_bytes(pack(init, modules))

    recipe = (
        source.read_bytes() + Path(__file__).read_bytes() + "\n".join(map(str, modules)).encode()
    )
    return cached("initramfs.cpio", recipe, make)


def build_noatime_shim() -> Path:
    source = TOP / "tools" / "testbed_noatime.c"

    def make(target: Path) -> None:
        compile_c(source, target, "-shared", "-fPIC")

    return cached("noatime.so", source.read_bytes(), make)


def module_bytes(module: Path) -> bytes:
    """Debian compresses modules from release 13 on; the boot is quicker without."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def pack(init: Path, modules: list[Path]) -> bytes:
    parts = [cpio_entry(name, 0o040755) for name in ("dev", "lower", "rw", "root", "modules")]
    parts.append(cpio_entry("dev/console", 0o020600, device=(5, 1)))
    parts.append(cpio_entry("init", 0o100755, init.read_bytes()))
    parts += [cpio_entry(f"modules/{m.name}", 0o100644, module_bytes(m)) for m in modules]
    names = "".join(f"/modules/{module.name}\n" for module in modules)
    parts.append(cpio_entry("modules/list", 0o100644, names.encode()))
    parts.append(cpio_entry("TRAILER!!!", 0))
    return b"".join(parts)
