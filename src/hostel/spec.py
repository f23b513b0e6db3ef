"""What a machine is, as plain data: ``MachineSpec`` and its parts.

Frozen and strict. The same description comes from keywords (``MachineSpec(cpus=2)``), from JSON and
from TOML (``decode``); an unknown key or a value out of range is a ``SpecError`` that names it.
Nothing here looks at the host: paths are resolved and defaults that depend on the host are filled
later, in ``plan.py``.

Sizes are bytes everywhere inside; people write ``512M`` (``parse_size``), always powers of 1024.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Literal, get_args

import msgspec

from .errors import SpecError

EngineName = Literal["auto", "kvm", "qemu", "soft"]
Paging = Literal["ept", "shadow"]
Trap = Literal["translate", "intercept"]
Transport = Literal["pci", "mmio"]
CacheMode = Literal["writeback", "writethrough", "none", "unsafe"]
DiskFormat = Literal["auto", "raw", "qcow2", "vmdk", "vhdx"]
NetMode = Literal["nat", "isolated", "bridge", "tap", "macvtap", "user", "vhost-user"]
Cache = Literal["auto", "always", "none"]
FileServer = Literal["auto", "virtiofsd", "python"]
NetPlane = Literal["auto", "python", "vhost", "vhost-user"]
NicModel = Literal["virtio", "e1000"]
Vsock = Literal["none", "auto", "vhost", "python"]
OnReboot = Literal["restart", "stop"]

MAX_CPUS = 32
MAX_MTU = 65521
"""A frame with its Ethernet header in 65,535 bytes: a tap takes no more."""
MAX_QUEUES = 16
MIN_MEMORY = 32 << 20
DEFAULT_MEMORY = 512 << 20
MAX_DISK_QUEUES = 16
MAX_SERIAL = 20
"""Of a virtio disk, in bytes (virtio 1.2 §5.2.6)."""

MAX_ID = (1 << 32) - 2
"""The largest uid and gid: the next one means "none" (chown(2))."""

# Patterns are compiled when one is first used: all of them at each start would take milliseconds.
_OWNER = r"(\d{1,10}):(\d{1,10})"
_SIZE = r"(\d+)\s*([KMGT]?)(?:i?B)?"
_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}"
_MAC = r"[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}"
_INTERFACE = r"[^\s/:,]{1,15}"
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes from ``512M``, ``2G``, ``1GiB`` or a plain number; ``SpecError`` for anything else."""
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
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


_NEEDS_TARGET: dict[str, str] = {
    "bridge": "the host's bridge, such as bridge=br0",
    "tap": "the host's tap, such as tap=tap0",
    "macvtap": "the host's interface, such as macvtap=eth0",
    "vhost-user": "a socket, such as vhost-user=/run/switch.sock",
}
_FILTERED = ("nat", "isolated")
_FORWARDED = ("nat", "isolated", "user")


class Nic(_Part, frozen=True):
    """One network interface of the guest.

    ``nat``, ``isolated``: on a bridge of hostel's own, which machines share by its name ``target``
    (``default`` if empty); with the world behind it, or without. ``bridge``, ``tap``, ``macvtap``: the
    host's interface ``target``. ``user``: no privileges needed (passt). ``vhost-user``: the process that
    listens on the socket ``target``.
    """

    mode: NetMode = "nat"
    target: str = ""
    model: NicModel = "virtio"
    plane: NetPlane = "auto"
    mac: str = ""
    address: str = ""
    """IPv4 address in the guest; empty: the network's choice. On a network that is not hostel's own with its
    ``/prefix``, ``dhcp`` or ``none``; empty there: ``dhcp``, on vhost-user ``none``."""
    mtu: int = 0
    queues: int = 1
    """Pairs of them."""
    allow: tuple[str, ...] | None = None
    """The only destinations that the guest may reach: ``ADDRESS[/PREFIX]`` or a name, each with an
    optional ``:PORT[/tcp|udp]``. None: all that the network reaches."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for what, word, known in (
            ("network mode", self.mode, NetMode),
            ("model of a NIC", self.model, NicModel),
            ("plane of a NIC", self.plane, NetPlane),
        ):
            if word not in get_args(known):
                cure = f"one of {', '.join(get_args(known))}"
                raise SpecError(f"not a {what}: {word!r}", cure=cure)
        self._check_target()
        self._check_plane()
        if self.mac and not (re.fullmatch(_MAC, self.mac) and self.mac != "00:00:00:00:00:00"):
            raise SpecError(
                f"not the MAC address of a NIC: {self.mac!r}",
                cure="write six bytes, the first an even one, such as 52:54:00:12:34:56",
            )
        if self.address not in ("", "dhcp", "none"):
            _check_address(self.address)
        if self.mtu and not 68 <= self.mtu <= MAX_MTU:
            raise SpecError(f"an MTU must be 68 to {MAX_MTU}, not {self.mtu}")
        if not 1 <= self.queues <= MAX_QUEUES:
            raise SpecError(f"a NIC has 1 to {MAX_QUEUES} pairs of queues, not {self.queues}")
        if self.allow is not None and self.mode not in _FILTERED:
            raise SpecError(
                f"a network of mode {self.mode} is not filtered by hostel: it takes no allow-list",
                cure="use nat or isolated",
            )

    def _check_target(self) -> None:
        if needed := _NEEDS_TARGET.get(self.mode):
            if not self.target:
                raise SpecError(f"network mode {self.mode} needs a target: {needed}")
        elif self.target and (self.mode == "user" or not re.fullmatch(_NAME, self.target)):
            raise SpecError(f"not a network for mode {self.mode}: {self.target!r}")
        if self.mode in ("bridge", "tap", "macvtap") and not re.fullmatch(_INTERFACE, self.target):
            raise SpecError(f"not the name of an interface: {self.target!r}")

    def _check_plane(self) -> None:
        if self.model == "e1000" and (self.plane not in ("auto", "python") or self.queues > 1):
            raise SpecError("an e1000 is emulated, by plane python, and has one pair of queues")
        by_socket = self.mode == "vhost-user"
        if by_socket and (self.model == "e1000" or self.plane not in ("auto", "vhost-user")):
            raise SpecError("the process behind vhost-user is the plane: it takes no other")
        if self.plane == "vhost-user" and not by_socket:
            raise SpecError("plane vhost-user needs network mode vhost-user=SOCKET")
        if self.mode == "user" and (self.plane == "vhost" or self.queues > 1):
            raise SpecError(
                "network mode user is a stream of frames: no plane vhost, one pair of queues"
            )


def _check_address(text: str) -> None:
    """An IPv4 address that one machine can have, with or without a prefix."""
    import ipaddress

    try:
        interface = ipaddress.IPv4Interface(text)
    except ValueError:
        raise SpecError(
            f"not an IPv4 address for a NIC: {text!r}", cure="write such as 10.213.0.7"
        ) from None
    network, address = interface.network, interface.ip
    ends = (network.network_address, network.broadcast_address) if network.prefixlen < 31 else ()
    if address in ends or address.is_multicast or address.is_loopback or address.is_unspecified:
        raise SpecError(f"no machine can have the address {text}")


class Publish(_Part, frozen=True):
    """A port of the host that leads to one of the guest."""

    host: int
    guest: int
    address: str = ""
    """The host's address it is reached at; empty: all."""
    protocol: Literal["tcp", "udp"] = "tcp"

    def __post_init__(self) -> None:
        for port in (self.host, self.guest):
            if not 1 <= port <= 65535:
                raise SpecError(f"a port must be 1 to 65535, not {port}")
        if self.address and not _is_ip(self.address):
            raise SpecError(f"not an address to publish a port at: {self.address!r}")


def _is_ip(text: str) -> bool:
    import socket

    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, text)
            return True
    return False


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
        match = re.fullmatch(_OWNER, self.owner)
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


class Soft(_Part, frozen=True):
    """How engine ``soft`` virtualizes memory and processor (docs/soft.md)."""

    paging: Paging = "ept"
    """Tables of the hypervisor behind the guest's (nested paging), or instead of them (shadow)."""
    trap: Trap = "translate"
    """Sensitive instructions exit because they are replaced in what is fetched, or because the core's own
    virtualization (SVM) intercepts them."""
    record: str = ""
    """A file for what comes to the machine from outside, so that it can be replayed."""
    replay: str = ""
    """Such a file: run that machine again."""
    trace: str = ""
    """A file for a line at each VM exit."""

    @property
    def logged(self) -> bool:
        return bool(self.record or self.replay)


class MachineSpec(_Part, frozen=True):
    """A machine. Every field has the meaning of the option of ``hostel run`` with its name."""

    name: str = ""
    engine: EngineName = "auto"
    soft: Soft | None = None
    """For engine ``soft`` only; None: its defaults."""
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
    vsock: Vsock = "none"
    """A virtio-vsock device, and who serves it."""
    balloon: bool = False
    """A virtio-balloon: memory that the guest no longer uses goes back to the host, and ``Machine.balloon``
    changes how much it has."""
    volumes: tuple[Volume, ...] = ()
    tmpfs: tuple[str, ...] = ()
    hostname: str = ""
    on_reboot: OnReboot = "restart"

    def __post_init__(self) -> None:
        self._check_kinds()
        if not 1 <= self.cpus <= MAX_CPUS:
            raise SpecError(f"cpus must be 1 to {MAX_CPUS}, not {self.cpus}")
        if self.memory < MIN_MEMORY:
            raise SpecError(f"memory must be at least {MIN_MEMORY} bytes (32M), not {self.memory}")
        if self.soft and self.engine != "soft":
            what = "paging, trap, record, replay and trace are words of engine soft"
            raise SpecError(what, cure="add --engine soft")
        if self.soft and self.soft.logged:
            self._check_logged(self.soft)
        if self.pin and len(self.pin) != self.cpus:
            raise SpecError(f"pin names {len(self.pin)} pCPUs for {self.cpus} vCPUs")
        if self.name and not re.fullmatch(_NAME, self.name):
            raise SpecError(f"not a machine name: {self.name!r}")
        for target in (*self.tmpfs, *(volume.target for volume in self.volumes)):
            if not target.startswith("/"):
                raise SpecError(f"a mount point in the guest must be absolute, not {target!r}")
            place = target.partition(":")[0].strip("/")
            if not place:
                raise SpecError("nothing can be mounted over the guest's root", cure="see --root")
            if place in ("proc", "sys", "dev"):
                what, cost = f"over the guest's /{place}", "no program would work in it"
                raise SpecError(f"nothing can be mounted {what}", cost=cost, cure="choose another")
        self._check_network()

    def _check_logged(self, soft: Soft) -> None:
        if soft.record and soft.replay:
            raise SpecError("a machine is recorded or replayed, not both")
        parts = {
            "a disk": self.disks,
            "a network interface": self.nics,
            "a volume": self.volumes,
            "vsock": self.vsock != "none",
            "a balloon": self.balloon,
        }
        if there := [name for name, given in parts.items() if given]:
            why = "what its device does beside the guest is not in the log"
            cure = "give it a serial console, timers and interrupts only"
            raise SpecError(f"a machine with {there[0]} cannot be recorded: {why}", cure=cure)

    def _check_kinds(self) -> None:
        """What JSON and TOML are checked for by their decoder, keywords are here."""
        for name, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            value, kind, what = getattr(self, name), type(default), ""
            if name in _WORDS and value not in (words := get_args(_WORDS[name])):
                what = f"be one of {', '.join(words)}"
            elif isinstance(default, str | int | Root) and type(value) is not kind:
                what = f"be of type {kind.__name__}"
            elif kind is tuple and not isinstance(value, tuple | list):
                what = "be a tuple"
            for one in value if kind is tuple and not what else ():
                if not isinstance(one, _PARTS[name]):
                    what, value = f"hold {_PARTS[name].__name__} values", one
            if what:
                raise SpecError(f"{name} must {what}, not {value!r}")

    def _check_network(self) -> None:
        for mode, target in (taken := [(nic.mode, nic.target) for nic in self.nics]):
            if mode in ("tap", "vhost-user", "user") and taken.count((mode, target)) > 1:
                what = f"{mode} {target}".rstrip()
                raise SpecError(f"two NICs of one machine on {what}", cure="it serves one NIC")
        macs = [nic.mac.lower() for nic in self.nics if nic.mac]
        if len(set(macs)) < len(macs):
            raise SpecError("two NICs of one machine have the same MAC address")
        for nic in self.nics:
            if nic.model == "e1000" and self.transport == "mmio":
                raise SpecError("an e1000 is a PCI device: transport mmio has no place for it")
        if not self.publish:
            return
        if not self.nics or self.nics[0].mode not in _FORWARDED:
            what = f"a first NIC of mode {self.nics[0].mode}" if self.nics else "no NIC"
            raise SpecError(f"a port of a machine with {what} cannot be published", cure="use nat")
        ports = [(port.address, port.host, port.protocol) for port in self.publish]
        for port in ports:
            if ports.count(port) > 1 or (port[0] and ("", *port[1:]) in ports):
                raise SpecError(f"port {port[1]}/{port[2]} of the host is published twice")

    def replace(self, **changes: Any) -> MachineSpec:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


_PARTS: dict[str, type] = {"disks": Disk, "nics": Nic, "publish": Publish, "volumes": Volume}
_PARTS |= {"tmpfs": str, "pin": int}
_WORDS = {"engine": EngineName, "transport": Transport, "vsock": Vsock, "on_reboot": OnReboot}


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
