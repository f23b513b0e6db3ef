"""The steps of SETUP: what the agent does to the guest before commands run in it.

Each is plain data with a label; an error from the guest names the label. ``docs/agent.md`` has the list.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from enum import IntFlag
from typing import Protocol

import msgspec

from .protocol import StepOp, Writer


class MountFlag(IntFlag):
    """Of mount(2); the numbers are Linux's, ``include/uapi/linux/mount.h``."""

    READ_ONLY = 1
    NO_SUID = 2
    NO_DEVICES = 4
    NO_EXEC = 8
    NO_ATIME = 1024
    BIND = 4096
    RECURSIVE = 16384


class Step(Protocol):
    """Anything that can be part of a SETUP."""

    @property
    def label(self) -> str: ...
    def encode(self, writer: Writer) -> None: ...


class Mount(msgspec.Struct, frozen=True):
    """mount(2). The target must exist (``MakeDirectory``)."""

    type: str
    source: str
    target: str
    flags: int = 0
    data: str = ""

    @property
    def label(self) -> str:
        return f"mount {self.type} {self.source} on {self.target}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.MOUNT).string(self.label).string(self.source).string(self.target)
        writer.string(self.type).u32(self.flags).string(self.data)


class Bind(msgspec.Struct, frozen=True):
    """A bind mount, of a directory or a file; the target must exist (``MakeDirectory``, ``Touch``)."""

    source: str
    target: str
    read_only: bool = False
    recursive: bool = False

    @property
    def label(self) -> str:
        return f"bind {self.source} on {self.target}"

    def encode(self, writer: Writer) -> None:
        flags = MountFlag.BIND | (MountFlag.READ_ONLY if self.read_only else 0)
        flags |= MountFlag.RECURSIVE if self.recursive else 0
        writer.u32(StepOp.MOUNT).string(self.label).string(self.source).string(self.target)
        writer.string("").u32(flags).string("")


class Overlay(msgspec.Struct, frozen=True):
    """overlayfs: ``lower`` under ``upper`` (a folder of a writable file system, with ``work`` beside it)."""

    lower: str
    upper: str
    work: str
    target: str

    @property
    def label(self) -> str:
        return f"overlay {self.upper} over {self.lower} on {self.target}"

    def encode(self, writer: Writer) -> None:
        data = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"
        writer.u32(StepOp.MOUNT).string(self.label).string("overlay").string(self.target)
        writer.string("overlay").u32(0).string(data)


class MakeDirectory(msgspec.Struct, frozen=True):
    """A directory and the missing ones above it; that it exists already is no error."""

    path: str
    mode: int = 0o755

    @property
    def label(self) -> str:
        return f"make directory {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.MKDIR).string(self.label).string(self.path).u32(self.mode)


class Touch(msgspec.Struct, frozen=True):
    """An empty file to mount on, unless something is there."""

    path: str

    @property
    def label(self) -> str:
        return f"make file {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.TOUCH).string(self.label).string(self.path)


class Symlink(msgspec.Struct, frozen=True):
    """A symbolic link, unless something is there."""

    target: str
    path: str

    @property
    def label(self) -> str:
        return f"link {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.SYMLINK).string(self.label).string(self.target).string(self.path)


class DeviceNode(msgspec.Struct, frozen=True):
    """A device node, unless something is there."""

    path: str
    major: int
    minor: int
    block: bool = False
    mode: int = 0o600

    @property
    def label(self) -> str:
        return f"make device {self.path}"

    def encode(self, writer: Writer) -> None:
        kind = stat.S_IFBLK if self.block else stat.S_IFCHR
        writer.u32(StepOp.DEVICE).string(self.label).string(self.path)
        writer.u32(kind | self.mode, self.major, self.minor)


class WriteFile(msgspec.Struct, frozen=True):
    """A file with this content (/etc/resolv.conf, a sysctl in /proc/sys …), or with it at its end. A link
    to nowhere is replaced."""

    path: str
    content: bytes
    mode: int = 0o644
    append: bool = False

    @property
    def label(self) -> str:
        return f"write {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.WRITE).string(self.label).string(self.path).u32(self.mode)
        writer.u32(self.append).blob(self.content)


class Remove(msgspec.Struct, frozen=True):
    """No file or link of this name; that there is none is no error."""

    path: str

    @property
    def label(self) -> str:
        return f"remove {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.REMOVE).string(self.label).string(self.path)


class Link(msgspec.Struct, frozen=True):
    """The network interface with this MAC address: its MTU (0: as it is), up, its addresses
    (``10.213.0.2/24``, IPv6 too) and the gateways of default routes. Nothing is waited for."""

    mac: str
    mtu: int = 0
    addresses: Sequence[str] = ()
    gateways: Sequence[str] = ()

    @property
    def label(self) -> str:
        return f"configure interface {self.mac}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.LINK).string(self.label).string(self.mac).u32(self.mtu)
        writer.strings(self.addresses).strings(self.gateways)


class Dhcp(msgspec.Struct, frozen=True):
    """Ask for an address, routes and name servers on the interfaces with these MAC addresses, all at once.

    Who got none in so many seconds goes on asking while the machine runs. What became of each is in what
    SETUP says at its end: a line ``MAC ADDRESS/PREFIX`` each, without an address where there was none.
    """

    macs: Sequence[str]
    seconds: float

    @property
    def label(self) -> str:
        return f"ask for an address on {', '.join(self.macs)}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.DHCP).string(self.label).u32(int(self.seconds * 1000)).strings(self.macs)


class Hostname(msgspec.Struct, frozen=True):
    name: str

    @property
    def label(self) -> str:
        return f"set host name {self.name}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.HOSTNAME).string(self.label).string(self.name)


class WaitFor(msgspec.Struct, frozen=True):
    """Until a path exists (a disk that is still being probed)."""

    path: str
    seconds: float = 10.0

    @property
    def label(self) -> str:
        return f"wait for {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.WAIT).string(self.label).string(self.path).u32(int(self.seconds * 1000))


class EnterRoot(msgspec.Struct, frozen=True):
    """Make a mount point the root of all that follows, and carry some mounts of the initramfs over."""

    path: str
    keep: Sequence[str] = ("/dev", "/proc", "/sys", "/run")

    @property
    def label(self) -> str:
        return f"enter root {self.path}"

    def encode(self, writer: Writer) -> None:
        writer.u32(StepOp.ROOT).string(self.label).string(self.path).strings(self.keep)


def encode_steps(steps: Sequence[Step]) -> bytearray:
    """The payload of a SETUP."""
    writer = Writer().u32(len(steps))
    for step in steps:
        step.encode(writer)
    return writer.data
