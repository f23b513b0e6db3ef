"""Which kernel modules a guest needs, in the order in which they must be loaded.

Dependencies come from ``modules.dep`` (written by depmod) where there is one, otherwise from the
modules themselves: the ELF section ``.modinfo`` holds NUL-separated ``key=value`` strings, among them
``depends=a,b`` and ``softdep=pre: c post: d`` (kmod, modules.dep(5), modprobe.d(5)). An unpacked Debian
kernel package has no ``modules.dep``.

A name means the same with ``-`` and ``_``. What is in ``modules.builtin`` needs no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from hostel.errors import HostError

_FILE = re.compile(r"(.+)\.ko(\.xz|\.zst|\.gz)?")
_MAX_MODULE = 256 << 20


class Module(msgspec.Struct, frozen=True):
    """One module file."""

    name: str
    path: Path

    def read(self) -> bytes:
        """The ELF object, decompressed: the guest's kernel may not be able to."""
        try:
            return _decompress(self.path, self.path.read_bytes())
        except OSError as error:
            raise HostError(f"kernel module {self.path} cannot be read: {error.strerror}") from None


def find(
    directory: Path, release: str, wanted: Sequence[str], optional: Sequence[str] = ()
) -> list[Module]:
    """The modules for ``wanted`` and all they depend on, in the order of loading.

    ``directory`` is ``lib/modules/<release>``. One of ``optional`` that does not exist is left out.
    """
    return _Search(directory, release).order(wanted, optional)


def name_of(path: str) -> str:
    """``kernel/drivers/char/hw_random/virtio-rng.ko.xz`` is ``virtio_rng``."""
    match = _FILE.fullmatch(path.rpartition("/")[2])
    return match[1].replace("-", "_") if match else ""


class _Search:
    def __init__(self, directory: Path, release: str) -> None:
        self.directory = directory
        self.release = release
        self.found: dict[str, Module] = {}
        self.builtin = {name_of(line) for line in _lines(self.directory / "modules.builtin")}
        self.dependencies = dict(_read_dep(self.directory / "modules.dep"))
        self.files = {name_of(path): self.directory / path for path in self._paths()}

    def _paths(self) -> Iterator[str]:
        """modules.dep and modules.order spare a walk over thousands of files."""
        listed = [line.partition(":")[0] for line in _lines(self.directory / "modules.dep")]
        if listed := listed or _lines(self.directory / "modules.order"):
            yield from listed
            return
        for folder, _, names in os.walk(self.directory):
            for name in names:
                if _FILE.fullmatch(name):
                    yield os.path.relpath(os.path.join(folder, name), self.directory)

    def order(self, wanted: Iterable[str], optional: Iterable[str]) -> list[Module]:
        for name in wanted:
            self.add(name.replace("-", "_"), needed_by="")
        for name in optional:
            self.add_if_there(name)
        return list(self.found.values())

    def add(self, name: str, needed_by: str, pending: tuple[str, ...] = ()) -> None:
        """Dependencies first. A circle cannot be loaded by any kernel; it is cut, not followed."""
        if name in self.found or name in self.builtin or name in pending:
            return
        module = self._module(name, needed_by)
        hard, soft = self._needs(module)
        for other in soft:
            self.add_if_there(other, (*pending, name))
        for other in hard:
            self.add(other, name, (*pending, name))
        self.found[name] = module

    def add_if_there(self, name: str, pending: tuple[str, ...] = ()) -> None:
        """Soft dependencies may be aliases of the crypto API: ``crc32c`` is ``crc32c_generic``."""
        name = name.replace("-", "_")
        for candidate in (name, f"{name}_generic"):
            if candidate in self.builtin or self._file(candidate):
                self.add(candidate, "", pending)
                return

    def _file(self, name: str) -> Path | None:
        """modules.order says .ko even where the installed files are compressed."""
        listed = self.files.get(name)
        if listed is None:
            return None
        plain = listed.with_name(listed.name.partition(".ko")[0] + ".ko")
        choices = (
            listed,
            *(plain.with_name(plain.name + end) for end in ("", ".xz", ".zst", ".gz")),
        )
        return next((path for path in choices if path.is_file()), None)

    def _module(self, name: str, needed_by: str) -> Module:
        path = self._file(name)
        if path is None:
            reason = f" (needed by {needed_by})" if needed_by else ""
            raise HostError(
                f"kernel {self.release} has no module {name}{reason}, built in or in {self.directory}",
                cost="the guest cannot reach its devices or its root without it",
                cure="take a kernel that has it (hostel kernel ls), or fetch Debian's large one:"
                " hostel kernel fetch linux-image-amd64",
            )
        return Module(name, path)

    def _needs(self, module: Module) -> tuple[list[str], list[str]]:
        info = list(_modinfo(module))
        hard = self.dependencies.get(module.name)
        if hard is None:
            hard = [name for key, value in info if key == "depends" for name in value.split(",")]
        soft = [name for key, value in info if key == "softdep" for name in _soft(value)]
        return [name.replace("-", "_") for name in hard if name], soft


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_dep(path: Path) -> Iterator[tuple[str, list[str]]]:
    """``kernel/a.ko: kernel/b.ko kernel/c.ko``: all dependencies, the deepest last."""
    for line in _lines(path):
        module, _, needs = line.partition(":")
        yield name_of(module), [name_of(need) for need in reversed(needs.split())]


def _soft(value: str) -> Iterator[str]:
    """The names after ``pre:`` in ``pre: a b post: c``."""
    before = False
    for word in value.split():
        if word.endswith(":"):
            before = word == "pre:"
        elif before:
            yield word


def _modinfo(module: Module) -> Iterator[tuple[str, str]]:
    for entry in elf_section(module.read(), b".modinfo").split(b"\0"):
        key, separator, value = entry.partition(b"=")
        if separator:
            yield key.decode(errors="replace"), value.decode(errors="replace")


def elf_section(data: bytes, wanted: bytes) -> bytes:
    """The bytes of a section of an ELF object, 32 or 64 bits, little endian (ELF, "Sections")."""
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[5] != 1:
        return b""
    wide = data[4] == 2
    table = _number(data, 0x28 if wide else 0x20, 8 if wide else 4)
    size, count, names = (_number(data, (0x3A if wide else 0x2E) + i, 2) for i in (0, 2, 4))

    def section(index: int) -> tuple[int, bytes]:
        header = table + index * size
        offset, length = (
            (_number(data, header + 0x18, 8), _number(data, header + 0x20, 8))
            if wide
            else (_number(data, header + 0x10, 4), _number(data, header + 0x14, 4))
        )
        return _number(data, header, 4), data[offset : offset + length]

    strings = section(names)[1]
    for index in range(count):
        name, content = section(index)
        if strings[name : name + len(wanted) + 1] == wanted + b"\0":
            return content
    return b""


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _decompress(path: Path, data: bytes) -> bytes:
    try:
        if path.suffix == ".xz":
            import lzma

            return lzma.decompress(data)
        if path.suffix == ".gz":
            import gzip

            return gzip.decompress(data)
        if path.suffix == ".zst":
            import zstandard

            return zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_MODULE)
    except Exception as error:
        raise HostError(f"kernel module {path} is damaged: {error}") from None
    return data
