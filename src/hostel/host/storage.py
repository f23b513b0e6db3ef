"""Disks that this process does not serve itself: qcow2 and others, by a qemu-storage-daemon each.

::

    graph()      what QEMU opens: [throttle ─] [overlay ─] image ─ backing file ─ …     (both engines)
    Overlay      a file without a name that takes a guest's writes
    Daemon       graph ──► qemu-storage-daemon ──► vhost-user-blk socket ──► virtio/vhost_user_blk.py

Every node of a graph is named here, down to ``"backing": null``: nothing is opened because an image
says so (``images.py``). The daemon runs as the caller, and dies with us (``process.py``).

Its socket listens before it is started, so it may be connected to at once. ``Daemon.wait_up`` returns
when its monitor answers: then every image is open and locked.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostel import cache
from hostel.errors import HelperError, HostError
from hostel.spec import Disk, Rate

from . import images, toolbox
from .process import Helper
from .runtime import socket_path

NODE = "disk"
ANSWER_SECONDS = 30.0
STOP_SECONDS = 10.0
"""For what an image keeps in memory to be written to a slow disk."""
SETTLE = 0.5
"""Seconds in which a daemon that closed its monitor has ended."""
PACKAGE = "qemu-system-common"
"""Debian's: the daemon comes with QEMU."""


def find() -> str:
    """The qemu-storage-daemon of this host."""
    return toolbox.find(
        "qemu-storage-daemon",
        package=PACKAGE,
        cost="only raw disks, and without overlays, on engine kvm",
    )


# -- what is opened -----------------------------------------------------------------------------


def graph(
    disk: Disk, node: str, overlay: Path | None = None, *, aio: str = "threads"
) -> dict[str, Any]:
    """The block node ``node``, with all below it, as ``-blockdev`` takes it."""
    below: dict[str, Any] | None = None
    for layer in reversed(images.chain(Path(disk.path), disk.format)):
        below = _layer(layer, below, aio)
    assert below is not None
    if overlay is not None:
        below = _layer(images.Layer(overlay, "qcow2"), below, aio)
    else:
        below["read-only"] = disk.read_only
    below |= {
        "discard": "unmap",
        "cache": {"direct": disk.cache == "none", "no-flush": disk.cache == "unsafe"},
    }
    if limits(disk, node):
        below = {"driver": "throttle", "throttle-group": _group(node), "file": below}
    return {"node-name": node, **below}


def limits(disk: Disk, node: str) -> dict[str, Any]:
    """The object that holds the disk's rates; empty for a disk without."""
    given = {"bps": disk.limits.bytes, "iops": disk.limits.operations}
    rates: dict[str, int] = {}
    for name, rate in given.items():
        if rate is not None:
            rates |= _rate(name, rate)
    return {"qom-type": "throttle-group", "id": _group(node), "limits": rates} if rates else {}


def _rate(name: str, rate: Rate) -> dict[str, int]:
    """QEMU's bucket is no smaller than what one second brings, or else a tenth of that."""
    burst = rate.burst or rate.per_second
    full = {f"{name}-total-max": burst} if burst >= rate.per_second else {}
    return {f"{name}-total": rate.per_second, **full}


def _group(node: str) -> str:
    return f"{node}-limits"


def _layer(layer: images.Layer, below: dict[str, Any] | None, aio: str) -> dict[str, Any]:
    driver = "host_device" if layer.path.is_block_device() else "file"
    node: dict[str, Any] = {
        "driver": layer.format,
        "file": {"driver": driver, "filename": str(layer.path), "aio": aio},
    }
    if layer.format in ("qcow2", "vmdk"):
        node["backing"] = below
    return node


def followed(disk: Disk) -> list[Path]:
    """The backing files of an image: a machine with the disk can read them."""
    return [layer.path for layer in images.chain(Path(disk.path), disk.format)[1:]]


# -- overlays -----------------------------------------------------------------------------------


class Overlay:
    """A copy-on-write layer as large as its base, at ``path``. Gone with ``close``, or with this process.

    The file has no name: ``path`` is a symbolic link to our descriptor of it, so a kill leaves nothing.
    It lies in the cache's folder, for the runtime directory is often memory.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        base = images.layer(Path(disk.path), disk.format)
        content = images.empty_qcow2(images.size_of(base))
        self.path = path
        self._file = tempfile.TemporaryFile(dir=cache.directory("overlays"))  # noqa: SIM115
        try:
            self._file.write(content)
            self._file.flush()
            path.symlink_to(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        except OSError as error:
            self._file.close()
            raise HostError(
                f"no overlay for disk {disk.path}: {error.strerror}", cure="make room in the cache"
            ) from None

    def close(self) -> None:
        """Idempotent."""
        self.path.unlink(missing_ok=True)
        self._file.close()


# -- the daemon ---------------------------------------------------------------------------------


class Daemon:
    """A running daemon with one disk, at ``socket``. One machine may connect at a time."""

    def __init__(self, disk: Disk, path: Path, overlay: Path | None = None) -> None:
        self.disk = disk
        self.socket = path
        runtime, name = path.parent, path.stem
        program = find()
        with contextlib.ExitStack() as ends:
            export = ends.enter_context(_listen(path))
            ours, theirs = socket.socketpair()
            ends.enter_context(theirs)
            self._monitor = _Monitor(ours, f"qemu-storage-daemon {name}")
            fds = (export.fileno(), theirs.fileno())
            try:
                self.helper = Helper(
                    f"storage-{name}",
                    [program, *_arguments(disk, overlay, _aio(program), *fds)],
                    runtime=runtime,
                    pass_fds=fds,
                )
            except BaseException:
                self._monitor.close()
                path.unlink(missing_ok=True)
                raise

    def wait_up(self) -> None:
        """Until every image is open; ``HelperError`` with the daemon's own words if one cannot be."""
        try:
            self._monitor.meet()
        except HelperError as error:
            if self.helper.wait(SETTLE) is None:
                raise error from None
            failure = self.helper.failure()
            raise HelperError(
                f"disk {self.disk.path}: {failure}", cure=_cure(str(failure))
            ) from None

    def resize(self, size: int) -> None:
        self._monitor.execute("block_resize", {"node-name": NODE, "size": size})

    def stop(self) -> None:
        """What the guest was told is flushed has been. Idempotent."""
        self._monitor.close()
        self.helper.stop(STOP_SECONDS)
        self.socket.unlink(missing_ok=True)


def _arguments(
    disk: Disk, overlay: Path | None, aio: str, export: int, monitor: int
) -> Iterator[str]:
    if group := limits(disk, NODE):
        yield from ("--object", json.dumps(group))
    yield from ("--blockdev", json.dumps(graph(disk, NODE, overlay, aio=aio)))
    yield from ("--chardev", f"socket,id=qmp,fd={monitor}", "--monitor", "chardev=qmp")
    yield "--export"
    yield json.dumps(
        {
            "type": "vhost-user-blk",
            "id": "export",
            "node-name": NODE,
            "writable": not disk.read_only,
            "writethrough": disk.cache == "writethrough",
            "num-queues": disk.queues,
            "addr": {"type": "fd", "str": str(export)},
        }
    )


def _aio(program: str) -> str:
    """io_uring, if the host allows it and the daemon was built with it. Random reads of 4 KiB from the page
    cache are three to six times as many by it, all else takes half the CPU time; only large sequential
    ones, which threads copy on several pCPUs, can be slower (docs/disks.md)."""
    from hostel.virtio.uring import Uring

    try:
        Uring(1, 1).close()
        with open(program, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            return "io_uring" if text.find(b"liburing.so") >= 0 else "threads"
    except OSError:
        return "threads"


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(socket_path(path.parent, path.stem)))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error.strerror}") from None
    return listener


def _cure(words: str) -> str:
    return (
        "stop the other machine, or give it read-only or with an overlay" if "lock" in words else ""
    )


class _Monitor:
    """The daemon's QMP, one command at a time. (qemu.qmp is asyncio, and takes 60 ms to import.)"""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(ANSWER_SECONDS)
        self._sock = sock
        self._name = name
        self._lines = sock.makefile("rb")
        self._met = False

    def meet(self) -> None:
        """The greeting, and our answer to it. Once."""
        if not self._met:
            self._line()
            self._met = True
            self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> None:
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise HelperError(f"{self._name} is gone: {error.strerror}") from None
        while "return" not in (answer := self._line()):
            if "error" in answer:
                raise HelperError(f"{self._name} did not do {command}: {answer['error']['desc']}")

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def _line(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except (OSError, ValueError) as error:
            raise HelperError(f"{self._name} does not answer: {error}") from None
        if not line:
            raise HelperError(f"{self._name} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
