"""A guest kernel from the host's own package manager: no root, no installation, no third party.

::

    apt-cache show linux-image-cloud-amd64     a meta package: which image does it depend on?
        └─ not known, or its file is gone: apt-get update into a private folder, once
    apt-get download linux-image-<release>     apt checks the archive's signature, as always
    dpkg-deb -x                                unpacked beside its final place
    rename(2)                                  there at once and whole, or not at all

Everything happens in one ``.fetch-…`` folder in the store, under one lock: a second fetch waits and
then finds the kernel there; whatever a killed one left is removed by the next, which holds the lock
and so knows that nobody uses it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hostel.errors import HelperError, HostError, ImageError, MissingTool

from . import kernels, toolbox

PACKAGE = "linux-image-cloud-amd64"
USE_FILE = "give a kernel of your own with --kernel PATH"

_IMAGE = re.compile(r"linux-image-(\d[\w.+~-]*)")
_STATUS = re.compile(r"dlstatus:\d+:([\d.]+):")

# Lists that belong to this fetch alone. The hooks of the host's configuration are for its own lists
# (and fail for a user); apt's download user could not enter our folder.
_PRIVATE = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Update::Post-Invoke-Stats;
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "2";
Dir::Cache "{folder}/cache";
"""
_PRIVATE_LISTS = 'Dir::State::lists "{folder}/lists";\n'

Say = Callable[[str], None]
Progress = Callable[[float], None]


class _Package(msgspec.Struct, frozen=True):
    name: str
    version: str
    release: str
    download: int
    installed: int


def fetch(package: str = PACKAGE, *, say: Say, progress: Progress | None = None) -> kernels.Kernel:
    """The newest kernel of ``package``, in the store; at once if it is there already.

    ``say`` is told, in one line each, what is about to happen; ``progress`` gets 0 … 100 while the
    download runs.
    """
    _need_tools()
    store = kernels.store()
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _lock(store, say), _workshop(store) as folder:
            return _fetch(package, store, _Apt(folder), say, progress)
    except OSError as error:
        raise _os_error(store, error) from None


def _fetch(
    package: str, store: Path, apt: _Apt, say: Say, progress: Progress | None
) -> kernels.Kernel:
    """First with the host's package lists; they may lack the package, or name a file that the archive
    no longer has: then with lists of our own."""
    for own_lists in (False, True):
        if own_lists:
            say("fetching package lists of our own (no root needed)")
            apt.update()
        wanted = apt.resolve(package)
        if wanted is None:
            continue
        if (store / wanted.release).exists():
            return kernels.find(wanted.release)
        _need_space(store, wanted)
        say(_announcement(wanted))
        if apt.download(wanted, progress):
            return _install(store, apt.folder, wanted)
    reason = apt.complaint or "no reason given"
    if wanted is None:
        raise HostError(f"apt knows no kernel package {package} ({reason})", cure=USE_FILE)
    raise HelperError(
        f"apt could not download {wanted.name}: {reason}",
        cure=f"check the network and /etc/apt, or {USE_FILE}",
    )


def _install(store: Path, folder: Path, wanted: _Package) -> kernels.Kernel:
    tree = folder / "tree"
    _unpack(next(folder.glob("*.deb")), tree)
    image = tree / "boot" / f"vmlinuz-{wanted.release}"
    if not image.is_file():
        raise ImageError(f"package {wanted.name} has no boot/{image.name}", cure=USE_FILE)
    tree.chmod(0o755)
    tree.rename(store / wanted.release)
    return kernels.find(wanted.release)


def _unpack(package: Path, tree: Path) -> None:
    lines: list[str] = []
    with _spawn(["dpkg-deb", "-x", str(package), str(tree)], package.parent) as process:
        lines.extend(process.stdout or ())
    if process.returncode:
        text = " ".join(line.strip() for line in lines) or f"exit code {process.returncode}"
        if shutil.disk_usage(package.parent).free < 64 << 10:  # tar says only "wrote less"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise HelperError(f"dpkg-deb could not unpack {package.name}: {text}")


def _announcement(wanted: _Package) -> str:
    return (
        f"downloading {wanted.name} {wanted.version}: {_mib(wanted.download)}, "
        f"{_mib(wanted.installed)} unpacked"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _need_tools() -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingTool(
                f"no {tool} here: this is not Debian or one of its kin",
                cost="hostel cannot fetch a kernel on it",
                cure=USE_FILE,
            )


def _need_space(store: Path, wanted: _Package) -> None:
    need = wanted.download + wanted.installed
    free = shutil.disk_usage(store).free
    if free < need:
        raise HostError(
            f"no space for the kernel in {store}: {_mib(need)} needed, {_mib(free)} free",
            cure="make room, or set XDG_CACHE_HOME to another disk",
        )


def _os_error(store: Path, error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "make room, or set XDG_CACHE_HOME to another disk"
    else:
        cure = "set XDG_CACHE_HOME to a folder that you may write"
    return HostError(f"cannot store a kernel in {store}: {error.strerror or error}", cure=cure)


@contextmanager
def _lock(store: Path, say: Say) -> Iterator[None]:
    """One fetch at a time. The kernel drops the lock of a killed process (flock(2))."""
    with (store / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another hostel fetches a kernel; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _workshop(store: Path) -> Iterator[Path]:
    for left in store.glob(".fetch-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=store))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Apt:
    """The host's apt: its sources, keys and proxies, our folder for what it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.complaint = ""
        self._config = folder / "apt.conf"
        self._config.write_text(_PRIVATE.format(folder=folder))
        (folder / "cache").mkdir()

    def resolve(self, package: str) -> _Package | None:
        """The image package behind a name: itself, or what the meta package depends on."""
        fields = self._show(package)
        if fields is None:
            return None
        match = _IMAGE.search(fields.get("Depends", ""))
        if _IMAGE.fullmatch(package) or match is None:
            return _package(fields)
        image = self._show(match[0])
        return _package(image) if image else None

    def update(self) -> None:
        """Package lists of our own, in a folder that goes with the fetch."""
        (self.folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        self._config.write_text((_PRIVATE + _PRIVATE_LISTS).format(folder=self.folder))
        # A source that is down is a warning; whether ours was there is seen when we look it up.
        self._apt(["apt-get", "update"])

    def download(self, wanted: _Package, progress: Progress | None) -> bool:
        """The package's file, in our folder; False, and a complaint, if the archive did not give it."""
        name = f"{wanted.name}={wanted.version}"
        command = ["apt-get", "-o", "APT::Status-Fd=1", "download", name]
        return self._apt(command, progress) == 0 and any(self.folder.glob("*.deb"))

    def _show(self, package: str) -> dict[str, str] | None:
        lines: list[str] = []
        self._apt(["apt-cache", "show", "--no-all-versions", package], line=lines.append)
        fields = dict(line.split(": ", 1) for line in lines if ": " in line)
        return fields if "Package" in fields else None

    def _apt(
        self, command: list[str], progress: Progress | None = None, line: Say | None = None
    ) -> int:
        self.complaint = ""
        argv = [command[0], "-q", "-c", str(self._config), *command[1:]]
        with _spawn(argv, self.folder) as process:
            for text in process.stdout or ():
                self._line(text.rstrip("\n"), progress, line)
        return int(process.returncode)

    def _line(self, text: str, progress: Progress | None, line: Say | None) -> None:
        status = _STATUS.match(text)
        if status is not None:
            if progress is not None:
                progress(float(status[1]))
        elif text.startswith(("E: ", "W: ")):
            if not self.complaint or text.startswith("E: "):
                self.complaint = text[3:].strip()
        elif line is not None:
            line(text)


def _package(fields: dict[str, str]) -> _Package | None:
    match = _IMAGE.fullmatch(fields["Package"])
    if match is None:
        return None
    return _Package(
        name=match[0],
        version=fields.get("Version", ""),
        release=match[1],
        download=int(fields.get("Size", 0)),
        installed=int(fields.get("Installed-Size", 0)) << 10,
    )


@contextmanager
def _spawn(argv: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A tool with its words, errors too, on one pipe. It does not outlive the block, nor us."""
    guard = toolbox.find("setpriv", package="util-linux", cost="apt cannot be guarded")
    process = subprocess.Popen(
        [guard, "--pdeathsig", "KILL", "--", *argv],
        cwd=folder,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise
