"""The initramfs: a cpio archive with the agent as ``/init`` and the kernel modules that it loads.

::

    /init                       the agent
    /dev/console  /dev/null     until devtmpfs is mounted
    /hostel/modules/list        names, in the order of loading
    /hostel/modules/*.ko        decompressed

Format "newc" (kernel: Documentation/driver-api/early-userspace/buffer-format.rst): a header of ``070701``
and 13 numbers of eight hex digits, the name, the data, each padded to 4 bytes; ``TRAILER!!!`` ends it. It
is not compressed: unpacking costs more than copying. The same input gives the same bytes, and an image
that was built once is found in the cache by what went into it, without reading the modules again.

A user's own initrd comes first, padded to 4 bytes; what comes later replaces files of the same name.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hostel import cache
from hostel.errors import HostError, ImageError

from . import modules as kernel_modules

MODULE_DIRECTORY = "hostel/modules"
_FORMAT = b"2"
_INDEX_FILES = ("modules.dep", "modules.order", "modules.builtin", "kernel", ".")


def build(
    modules_directory: Path | None,
    release: str,
    wanted: Sequence[str],
    agent: Path,
    *,
    optional: Sequence[str] = (),
    initrd: Path | None = None,
) -> Path:
    """An initramfs in the cache.

    ``modules_directory`` is ``lib/modules/<release>``; without one the kernel is taken to have all that
    is wanted built in. ``initrd`` is unpacked before ours.
    """
    program = _read(agent)
    key = hashlib.sha256(_FORMAT + program)
    for part in (release, *wanted, "", *optional, "", *_stamps(modules_directory, initrd)):
        key.update(part.encode() + b"\0")
    target = cache.directory("initramfs") / f"{release or 'plain'}-{key.hexdigest()[:16]}.cpio"
    if not target.exists():
        found = (
            kernel_modules.find(modules_directory, release, wanted, optional)
            if modules_directory
            else []
        )
        files = {f"{module.name}.ko": module.read() for module in found}
        before = _read(initrd, ImageError) if initrd else b""
        cache.store(target, before + b"\0" * (-len(before) % 4) + archive(program, files))
    return target


def archive(agent: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive itself. ``modules`` by file name, in the order of loading."""
    order = "".join(f"{name}\n" for name in modules).encode()
    entries = [
        _entry("init", stat.S_IFREG | 0o755, agent),
        _entry("dev", stat.S_IFDIR | 0o755),
        _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
        *(_entry(name, stat.S_IFDIR | 0o755) for name in ("hostel", MODULE_DIRECTORY)),
        _entry(f"{MODULE_DIRECTORY}/list", stat.S_IFREG | 0o644, order),
        *(_entry(f"{MODULE_DIRECTORY}/{n}", stat.S_IFREG | 0o644, d) for n, d in modules.items()),
        _entry("TRAILER!!!", 0),
    ]
    return b"".join(entries)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Inode 0 throughout: the kernel looks at it only for hard links (nlink > 1)."""
    links = 2 if stat.S_ISDIR(mode) else 1
    numbers = (0, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    return header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)


def _stamps(modules_directory: Path | None, initrd: Path | None) -> Iterator[str]:
    """What tells that the modules or the initrd are others than last time, without reading them."""
    paths = [initrd] if initrd else []
    if modules_directory:
        paths += [modules_directory / name for name in _INDEX_FILES]
    for path in paths:
        try:
            info = path.stat()
            yield f"{path.resolve()} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
        except OSError:
            yield f"{path} -"


def _read(path: Path, error_type: type[HostError | ImageError] = HostError) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror}") from None
