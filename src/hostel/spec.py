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
CacheMode = Literal["writeback", "writethrough", "none", "unsafe"]
DiskFormat = Literal["auto", "raw", "qcow2", "vmdk", "vhdx"]
NetMode = Literal["nat", "isolated", "bridge", "tap", "macvtap", "user", "vhost-user"]
Cache = Literal["auto", "always", "none"]
FileServer = Literal["auto", "virtiofsd", "python"]
NetPlane = Literal["auto", "python", "vhost", "vhost-user"]

MAX_CPUS = 32
MIN_MEMORY = 32 << 20
DEFAULT_MEMORY = 512 << 20
MAX_DISK_QUEUES = 16
MAX_SERIAL = 20
"""Of a virtio disk, in bytes (virtio 1.2 §5.2.6)."""

MAX_ID = (1 << 32) - 2
"""The largest uid and gid: the next one means "none" (chown(2))."""

_OWNER = re.compile(r"(\d{1,10}):(\d{1,10})")
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


class Rate(_Part, frozen=True):
    """At most ``per_second``, on average; ``burst`` may come at once (0: what one second brings)."""

    per_second: int
    burst: int = 0

    def __post_init__(self) -> None:
        if self.per_second < 1 or self.burst < 0:
            raise SpecError(f"not a rate: {self.per_second} a second, burst {self.burst}")


class Limits(_Part, frozen=True):
    """How fast a disk or a NIC may be, in both directions together; None: as fast as it can."""

    bytes: Rate | None = None
    operations: Rate | None = None
    """Requests of a disk, packets of a NIC."""


class Disk(_Part, frozen=True):
    """One virtio-blk disk: an image file or a block device on the host."""

    path: str
    read_only: bool = False
    serial: str = ""
    format: DiskFormat = "auto"
    """``auto``: raw, unless the file's header and its name both say otherwise: a guest may have written
    the header of a raw image, with any file of the host as its base."""
    overlay: bool = False
    """Copy on write: the guest writes to a temporary layer, which goes with the machine."""
    cache: CacheMode = "writeback"
    """``writethrough``: each write is safe when it completes; ``none``: past the host's page cache;
    ``unsafe``: a flush does nothing."""
    queues: int = 1
    plane: Literal["auto", "python", "vhost-user"] = "auto"
    """Who serves it: this process (raw only), or a qemu-storage-daemon. Engine ``qemu`` does it itself."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 1 <= self.queues <= MAX_DISK_QUEUES:
            raise SpecError(f"a disk has 1 to {MAX_DISK_QUEUES} queues, not {self.queues}")
        if len(self.serial.encode()) > MAX_SERIAL:
            raise SpecError(f"a disk's serial has at most {MAX_SERIAL} bytes, not {self.serial!r}")
        if self.read_only and self.overlay:
            raise SpecError(f"disk {self.path}: read-only and an overlay exclude each other")


class Nic(_Part, frozen=True):
    """One network interface of the guest.

    ``nat``, ``isolated``: on a bridge of hostel's own, which machines share by its name ``target``
    (``default`` if empty); with the world behind it, or without. ``bridge``, ``tap``, ``macvtap``: the
    host's interface ``target``. ``user``: no privileges needed (passt). ``vhost-user``: the process that
    listens on the socket ``target``.
    """

    mode: NetMode = "nat"
    target: str = ""
    model: Literal["virtio", "e1000"] = "virtio"
    plane: NetPlane = "auto"
    mac: str = ""
    address: str = ""
    """IPv4 address in the guest, with or without ``/prefix``; empty: the network's choice."""
    mtu: int = 0
    queues: int = 1
    """Pairs of them."""
    allow: tuple[str, ...] | None = None
    """The only destinations that the guest may reach: ``ADDRESS[/PREFIX]`` or a name, each with an
    optional ``:PORT[/tcp|udp]``. None: all that the network reaches."""
    limits: Limits = Limits()


class Publish(_Part, frozen=True):
    """A port of the host that leads to one of the guest."""

    host: int
    guest: int
    address: str = ""
    """The host's address it is reached at; empty: all."""
    protocol: Literal["tcp", "udp"] = "tcp"


class Volume(_Part, frozen=True):
    """A host directory or file shown in the guest at ``target`` (virtiofs)."""

    source: str
    target: str
    read_only: bool = False
    cache: Cache = "auto"
    """How long what the guest knows is good. ``auto``: a second; ``always``: until it is unmounted;
    ``none``: not at all, and data go past its page cache."""
    owner: str = ""
    """``UID:GID`` on the guest's side that stands for the caller's own on the host; empty: as they are."""
    server: FileServer = "auto"
    """Who serves it: the host's virtiofsd, or hostel itself."""

    def __post_init__(self) -> None:
        self.owner_ids()

    def owner_ids(self) -> tuple[int, int] | None:
        """``owner`` as numbers."""
        if not self.owner:
            return None
        match = _OWNER.fullmatch(self.owner)
        if match is None or max(ids := (int(match[1]), int(match[2]))) > MAX_ID:
            raise SpecError(
                f"not an owner: {self.owner!r}", cure="write UID:GID, such as 1000:1000"
            )
        return ids


class Root(_Part, frozen=True):
    """Where the guest's root file system comes from. Always under a tmpfs overlay: nothing written
    in the guest reaches it.

    ``host``: the caller's own root, read through the caller's own permissions.
    ``directory``: a directory on the host. ``image``: a disk image with a file system.
    ``none``: the initramfs itself.
    """

    kind: Literal["host", "directory", "image", "none"] = "host"
    path: str = ""
    server: FileServer = "auto"
    """Who serves the host's files or a directory: see ``Volume``."""


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
    nics: tuple[Nic, ...] = ()
    publish: tuple[Publish, ...] = ()
    """On the first NIC."""
    vsock: Literal["none", "auto", "vhost", "python"] = "none"
    """A virtio-vsock device, and who serves it."""
    balloon: bool = False
    """A virtio-balloon: memory that the guest no longer uses goes back to the host, and ``Machine.balloon``
    changes how much it has."""
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
