"""Guest kernels on this host: which exist, which one is meant, and how to get one.

Where they are looked for, in this order::

    $XDG_CACHE_HOME/hostel/kernels/<release>/   fetched: an unpacked Debian package
        boot/vmlinuz-<release>
        lib/modules/<release>                   (usr/lib/modules/<release> since Debian 13)
    /boot/vmlinuz-<release>                     the host's own, with /lib/modules/<release>
    /usr/lib/modules/<release>/vmlinuz          the same on distributions that keep it there

The best one is the one a machine gets that names none: it can be read, it has modules, it is a cloud
kernel (made for virtual machines: fewer drivers, a faster boot), it has the highest version.

``host/fetch.py`` brings a new one.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Literal

import msgspec

from hostel import cache
from hostel.errors import ImageError

Source = Literal["fetched", "host", "file"]

FETCH = "fetch one with `hostel kernel fetch`"


class Kernel(msgspec.Struct, frozen=True):
    """One kernel image and the modules that belong to it."""

    release: str
    """As ``uname -r`` says it; empty where a file does not tell."""
    image: Path
    modules: Path | None
    source: Source
    problem: str = ""
    """Why it cannot be used, if so."""


def store() -> Path:
    """Where fetched kernels are."""
    return cache.home() / "kernels"


def survey() -> tuple[Kernel, ...]:
    """Every kernel found, the best first, the unusable last."""
    found: dict[Path, Kernel] = {}
    for kernel in (*_fetched(), *_boot(), *_module_trees()):
        found.setdefault(kernel.image, kernel)
    return tuple(sorted(found.values(), key=_rank, reverse=True))


def find(name: str = "") -> Kernel:
    """The kernel of a release or a path; without a name the best one. ``ImageError`` if there is none."""
    if "/" in name or os.path.isfile(name):  # Path's raises, if the name is too long
        return _file(Path(name))
    kernels = survey()
    if not name:
        return _best(kernels)
    chosen = next((k for k in kernels if k.release == name), None)
    if chosen is None:
        raise ImageError(f"no kernel {name!r} on this host", cure=_suggest(name, kernels))
    return _usable(chosen)


def _best(kernels: tuple[Kernel, ...]) -> Kernel:
    if not kernels:
        raise ImageError("no guest kernel on this host", cure=FETCH)
    if kernels[0].problem:
        first = kernels[0]
        raise ImageError(f"no usable guest kernel: {first.image}: {first.problem}", cure=FETCH)
    return kernels[0]


def _usable(kernel: Kernel) -> Kernel:
    if kernel.problem:
        raise ImageError(f"kernel {kernel.image}: {kernel.problem}", cure=FETCH)
    return kernel


def _suggest(name: str, kernels: tuple[Kernel, ...]) -> str:
    import difflib

    near = difflib.get_close_matches(name, [k.release for k in kernels], n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`hostel kernel ls` lists those that are"


def version_key(release: str) -> tuple[tuple[int, str], ...]:
    """Sorts releases as people count: 6.1.0-9 before 6.1.0-10, 6.12~rc1 before 6.12."""
    parts = re.findall(r"\d+|[^\d]+", release)
    key = [(int(p), "") if p.isdecimal() else (-1 if p.startswith("~") else 0, p) for p in parts]
    return (*key, (0, ""))


def _rank(kernel: Kernel) -> tuple[bool, bool, bool, tuple[tuple[int, str], ...], bool]:
    return (
        not kernel.problem,
        kernel.modules is not None,
        "cloud" in kernel.release,
        version_key(kernel.release),
        kernel.source == "fetched",
    )


def _fetched() -> list[Kernel]:
    trees = [tree for tree in _listing(store()) if not tree.name.startswith(".")]
    return [
        _kernel(tree.name, image, tree, "fetched")
        for tree in trees
        if (image := tree / "boot" / f"vmlinuz-{tree.name}").exists()
    ]


def _boot() -> list[Kernel]:
    images = [p for p in _listing(Path("/boot")) if p.name.startswith("vmlinuz-")]
    return [_kernel(p.name.removeprefix("vmlinuz-"), p, Path("/"), "host") for p in images]


def _module_trees() -> list[Kernel]:
    images = [p / "vmlinuz" for p in _listing(Path("/usr/lib/modules"))]
    return [_kernel(p.parent.name, p, Path("/"), "host") for p in images if p.exists()]


def _file(image: Path) -> Kernel:
    """A kernel by its path. Its modules, if its release is known, are those beside it or anybody's."""
    image = image.absolute()
    problem = _problem(image)
    if problem:
        raise ImageError(f"kernel {image}: {problem}", cure="give the path of a kernel image")
    release = _release(image)
    for tree in (image.parent.parent, store() / release, Path("/")):
        if release and (modules := _modules(release, tree)):
            return Kernel(release, image, modules, "file")
    return Kernel(release, image, None, "file")


def _release(image: Path) -> str:
    """What a bzImage says of itself: boot.rst "kernel_version", an offset less 0x200 of a string."""
    with image.open("rb") as file:
        head = file.read(0x8000)
    if head[0x202:0x206] != b"HdrS":
        return ""
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    text = head[at : at + 256].split(b"\0")[0].split(b" ")[0]
    return text.decode("ascii", "replace") if re.fullmatch(rb"[\w.+~-]+", text) else ""


def _kernel(release: str, image: Path, tree: Path, source: Source) -> Kernel:
    return Kernel(release, image, _modules(release, tree), source, _problem(image))


def _modules(release: str, tree: Path) -> Path | None:
    candidates = (tree / top / "modules" / release for top in ("lib", "usr/lib"))
    # A kernel that was removed may leave an empty folder behind.
    return next((p for p in candidates if (p / "kernel").is_dir()), None)


def _problem(image: Path) -> str:
    try:
        status = image.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:  # a folder on the way that lets the caller not in
        return str(error.strerror)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if not os.access(image, os.R_OK):
        return f"not readable by you; its owner can allow it: sudo chmod +r {image}"
    return "" if status.st_size else "empty file"


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
