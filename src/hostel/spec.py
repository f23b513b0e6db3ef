"""What a machine is, as plain data: ``MachineSpec`` and its parts.

Frozen and strict. The same description comes from keywords (``MachineSpec(cpus=2)``), from JSON and
from TOML (``decode``); an unknown key or a value out of range is a ``SpecError`` that names it.
Nothing here looks at the host: paths are resolved and defaults that depend on the host are filled
later, in ``plan.py``.

Sizes are bytes everywhere inside; people write ``512M`` (``parse_size``), always powers of 1024.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from .errors import SpecError

EngineName = Literal["auto", "kvm", "qemu"]
Transport = Literal["pci", "mmio"]

MAX_CPUS = 32
MIN_MEMORY = 32 << 20
DEFAULT_MEMORY = 512 << 20

_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes from ``512M``, ``2G``, ``1GiB`` or a plain number; ``SpecError`` for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SpecError(
            f"not a size: {text!r}", cure="write a number with K, M, G or T, such as 512M"
        )
    return int(match[1]) << _SHIFT[match[2].upper()]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Disk(_Part, frozen=True):
    """One virtio-blk disk: a raw file or a block device on the host."""

    path: str
    read_only: bool = False
    serial: str = ""


class Volume(_Part, frozen=True):
    """A host directory or file shown in the guest at ``target`` (virtiofs)."""

    source: str
    target: str
    read_only: bool = False


class Root(_Part, frozen=True):
    """Where the guest's root file system comes from. Always under a tmpfs overlay: nothing written
    in the guest reaches it.

    ``host``: the caller's own root, read through the caller's own permissions.
    ``directory``: a directory on the host. ``image``: a disk image with a file system.
    ``none``: the initramfs itself.
    """

    kind: Literal["host", "directory", "image", "none"] = "host"
    path: str = ""


class MachineSpec(_Part, frozen=True):
    """A machine. Every field has the meaning of the option of ``hostel run`` with its name."""

    name: str = ""
    engine: EngineName = "auto"
    cpus: int = 1
    pin: tuple[int, ...] = ()
    """pCPU of each vCPU, in order; empty: the scheduler decides."""
    memory: int = DEFAULT_MEMORY
    hugepages: bool = False
    kernel: str = ""
    """Path or version of the guest kernel; empty: the newest one found."""
    initrd: str = ""
    """A further initramfs, unpacked before hostel's own."""
    append: str = ""
    """Appended to the kernel's command line."""
    transport: Transport = "pci"
    root: Root = Root()
    read_only: bool = False
    disks: tuple[Disk, ...] = ()
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[str, ...] = ()
    hostname: str = ""
    on_reboot: Literal["restart", "stop"] = "restart"

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= MAX_CPUS:
            raise SpecError(f"cpus must be 1 to {MAX_CPUS}, not {self.cpus}")
        if self.memory < MIN_MEMORY:
            raise SpecError(f"memory must be at least {MIN_MEMORY >> 20}M, not {self.memory} bytes")
        if self.pin and len(self.pin) != self.cpus:
            raise SpecError(f"pin names {len(self.pin)} pCPUs for {self.cpus} vCPUs")
        if self.name and not _NAME.fullmatch(self.name):
            raise SpecError(f"not a machine name: {self.name!r}")
        for target in (*self.tmpfs, *(volume.target for volume in self.volumes)):
            if not target.startswith("/"):
                raise SpecError(f"a mount point in the guest must be absolute, not {target!r}")
            if not target.partition(":")[0].strip("/"):
                raise SpecError("nothing can be mounted over the guest's root", cure="see --root")

    def replace(self, **changes: Any) -> MachineSpec:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


def decode(text: str | bytes, *, format: Literal["json", "toml"]) -> MachineSpec:
    """A spec from JSON or TOML text; ``SpecError`` names the key that is wrong."""
    try:
        if format == "json":
            return msgspec.json.decode(text, type=MachineSpec)
        import tomllib

        raw = tomllib.loads(text if isinstance(text, str) else text.decode())
        return msgspec.convert(raw, MachineSpec)
    except (msgspec.MsgspecError, ValueError) as error:
        raise SpecError(f"bad machine description: {error}") from None


def encode(spec: MachineSpec) -> bytes:
    """The spec as JSON; ``decode`` gives it back unchanged."""
    return msgspec.json.encode(spec)
