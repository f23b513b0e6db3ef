"""From a description to a plan: what the host has, which engine, which files, which steps in the guest.

::

    MachineSpec ─┬─ choose_engine ── which hypervisor, and why
                 ├─ kernels.find, agent, modules ── initramfs (all cached)
                 ├─ shares, disks ── what the root and the volumes are made of
                 └─ guest_steps ── how the agent puts them together
                                                                  = Plan + steps

Everything here looks and computes; nothing is started and no state is left but caches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from .boot import cmdline, initramfs
from .errors import ImageError, KvmError, SpecError, UserError
from .guest import steps
from .guest.steps import MountFlag, Step
from .host import filesystem, kernels
from .plan import Plan, Share
from .spec import Disk, MachineSpec, Volume

ROOT_TAG = "hostel-root"
LOWER, TOP, ROOT = "/hostel/lower", "/hostel/top", "/hostel/root"
VOLUMES = "/run/hostel"

_MOUNT_DATA = {"ext4": "noload", "xfs": "norecovery", "btrfs": "norecovery"}
"""A root image is never written, so its journal is not replayed either."""
_REMOUNT = 32


class Served(msgspec.Struct, frozen=True):
    """A directory or file that a file system daemon has to serve."""

    tag: str
    source: Path
    read_only: bool
    is_root: bool = False


class Choice(msgspec.Struct, frozen=True):
    engine: Literal["kvm", "qemu"]
    accel: Literal["kvm", "tcg"]
    reason: str


def choose_engine(spec: MachineSpec) -> Choice:
    """``auto``: our own monitor where KVM runs a guest's kernel at speed, else QEMU.

    A named engine that cannot work is an error with the reason.
    """
    from .kvm.probe import probe

    report = probe()
    if spec.engine == "kvm" and not report.usable:
        raise KvmError(
            f"engine kvm cannot run Linux here: {report.reason}",
            cure="use --engine qemu, or a host with hardware virtualization",
        )
    if report.usable and spec.cpus > report.max_vcpus:
        raise SpecError(f"this host's KVM takes at most {report.max_vcpus} vCPUs, not {spec.cpus}")
    if report.usable and spec.engine != "qemu":
        return Choice("kvm", "kvm", report.reason)
    if report.usable:
        return Choice("qemu", "kvm", f"as asked, on KVM: {report.reason}")
    return Choice("qemu", "tcg", f"emulated by QEMU: {report.reason}")


class Preparation(msgspec.Struct, frozen=True):
    """A plan, what has to be served before it starts, and what the agent does once it has."""

    plan: Plan
    served: tuple[Served, ...]
    steps: tuple[Step, ...]


def prepare(spec: MachineSpec, runtime: Path, *, qemu_args: tuple[str, ...] = ()) -> Preparation:
    """The plan of a machine with an agent. ``runtime`` is where its sockets will be."""
    from .guest.build import agent_binary

    served = shared_paths(spec)
    root_disk = _root_disk(spec)
    disks = (*_checked_disks(spec.disks), *root_disk)
    choice = choose_engine(spec)
    kernel = kernels.find(spec.kernel)
    wanted, optional = _modules(spec, bool(disks))
    initrd = initramfs.build(
        kernel.modules,
        kernel.release,
        wanted,
        agent_binary(),
        optional=optional,
        initrd=_readable(spec.initrd, "initrd") if spec.initrd else None,
    )
    plan = Plan(
        spec=spec.replace(on_reboot="stop"),
        engine=choice.engine,
        reason=choice.reason,
        kernel=kernel.image,
        release=kernel.release,
        initrd=initrd,
        cmdline=cmdline.build(
            "run",
            engine=choice.engine,
            accel=choice.accel,
            append=spec.append,
        ),
        disks=disks,
        shares=tuple(Share(s.tag, runtime / f"{s.tag}.sock") for s in served),
        runtime=runtime,
        accel=choice.accel,
        qemu_args=qemu_args,
        notes=tuple(_notes(spec)),
    )
    return Preparation(plan, served, tuple(guest_steps(spec, served, len(disks))))


def prepare_raw(spec: MachineSpec, runtime: Path) -> Plan:
    """The plan of ``hostel boot``: any kernel, as it is, with no agent."""
    image = kernels.find(spec.kernel)
    choice = choose_engine(spec)
    return Plan(
        spec=spec,
        engine=choice.engine,
        reason=choice.reason,
        kernel=image.image,
        release=image.release,
        initrd=_readable(spec.initrd, "initrd") if spec.initrd else None,
        cmdline=cmdline.build("boot", engine=choice.engine, accel=choice.accel, append=spec.append),
        disks=_checked_disks(spec.disks),
        shares=(),
        runtime=runtime,
        agent=False,
        accel=choice.accel,
        notes=tuple(_notes(spec)),
    )


def _notes(spec: MachineSpec) -> Iterator[str]:
    """What is allowed and still worth a word."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if spec.memory > total:
        yield (
            f"{spec.memory >> 20} MiB of guest memory is more than the host has ({total >> 20} MiB): "
            "the host may run out"
        )
    cpus = os.cpu_count() or 1
    if spec.cpus > cpus:
        yield f"{spec.cpus} vCPUs share {cpus} pCPUs: they will wait for one another"


# -- what the root and the volumes are made of ----------------------------------------------------


def shared_paths(spec: MachineSpec) -> tuple[Served, ...]:
    """What file system daemons have to serve."""
    return tuple(_served(spec))


def _served(spec: MachineSpec) -> Iterator[Served]:
    if spec.root.kind == "host":
        yield Served(ROOT_TAG, Path("/"), read_only=True, is_root=True)
    elif spec.root.kind == "directory":
        path = _readable(spec.root.path, "root")
        if not path.is_dir():
            raise UserError(f"root {path} is not a directory")
        yield Served(ROOT_TAG, path, read_only=True, is_root=True)
    for index, volume in enumerate(spec.volumes):
        yield Served(f"volume{index}", _readable(volume.source, "volume"), volume.read_only)


def _root_disk(spec: MachineSpec) -> tuple[Disk, ...]:
    """Last in the row, so that ``--disk`` is /dev/vda with every root."""
    if spec.root.kind != "image":
        return ()
    disk = Disk(path=spec.root.path, read_only=True, serial=ROOT_TAG)
    return _checked_disks((disk,))


def _checked_disks(disks: tuple[Disk, ...]) -> tuple[Disk, ...]:
    return tuple(_checked(disk) for disk in disks)


def _checked(disk: Disk) -> Disk:
    path = _readable(disk.path, "disk")
    if path.is_dir():
        raise ImageError(f"disk {path} is a directory", cure="give a raw image or a block device")
    if not disk.read_only and not os.access(path, os.W_OK):
        raise ImageError(f"disk {path} cannot be written", cure=f"give {disk.path}:ro")
    found = filesystem.image_format(path)
    if found != "raw":
        raise ImageError(
            f"disk {path} is a {found} image; only raw ones are taken",
            cure=f"qemu-img convert -O raw {path} {path.stem}.raw",
        )
    return Disk(path=str(path), read_only=disk.read_only, serial=disk.serial)


def _readable(text: str, what: str) -> Path:
    path = Path(os.path.abspath(text))
    if not os.access(path, os.R_OK):
        reason = "cannot be read" if os.path.lexists(path) else "no such file or directory"
        raise ImageError(f"{what} {text}: {reason}")
    return path


def _modules(spec: MachineSpec, disks: bool) -> tuple[list[str], list[str]]:
    """Names of the drivers that this machine must have, and those it may use."""
    wanted = [f"virtio_{spec.transport}", "virtio_console"]
    if disks:
        wanted.append("virtio_blk")
    if spec.root.kind in ("host", "directory") or spec.volumes:
        wanted.append("virtiofs")
    if spec.root.kind != "none":
        wanted.append("overlay")
    if spec.root.kind == "image":
        wanted.append(_root_file_system(spec.root.path).driver)
    return wanted, ["virtio_rng"]


@cache
def _root_file_system(path: str) -> filesystem.FileSystem:
    return filesystem.find_root(Path(path))


# -- what the agent does ------------------------------------------------------------------------


def guest_steps(spec: MachineSpec, served: tuple[Served, ...], disks: int) -> Iterator[Step]:
    """The guest's root, from the initramfs to where commands run.

    Volumes are mounted after the root has been entered: their targets may lie behind symbolic links
    that mean something only there.
    """
    if spec.root.kind != "none":
        yield from _enter_root(spec, disks)
    for path in spec.tmpfs:
        target, _, data = path.partition(":")
        yield steps.MakeDirectory(target)
        yield steps.Mount("tmpfs", "tmpfs", target, data=data)
    for share, volume in zip((s for s in served if not s.is_root), spec.volumes, strict=True):
        yield from _mount_volume(share, volume)
    if spec.read_only and spec.root.kind != "none":
        yield steps.Mount("overlay", "overlay", "/", flags=_REMOUNT | MountFlag.READ_ONLY)
    yield steps.Hostname(spec.hostname or spec.name or "hostel")


def _enter_root(spec: MachineSpec, disks: int) -> Iterator[Step]:
    yield steps.MakeDirectory(LOWER)
    yield from _mount_lower(spec, disks)
    yield steps.MakeDirectory(TOP)
    yield steps.Mount("tmpfs", "hostel", TOP, data="mode=755")
    yield steps.MakeDirectory(f"{TOP}/upper")
    yield steps.MakeDirectory(f"{TOP}/work")
    yield steps.MakeDirectory(ROOT)
    yield steps.Overlay(LOWER, f"{TOP}/upper", f"{TOP}/work", ROOT)
    yield steps.EnterRoot(ROOT)


def _mount_lower(spec: MachineSpec, disks: int) -> Iterator[Step]:
    if spec.root.kind != "image":
        yield steps.Mount("virtiofs", ROOT_TAG, LOWER, flags=MountFlag.READ_ONLY)
        return
    found = _root_file_system(spec.root.path)
    device = f"/dev/vd{chr(ord('a') + disks - 1)}{found.partition or ''}"
    data = _MOUNT_DATA.get(found.driver, "")
    yield steps.WaitFor(device)
    yield steps.Mount(found.type, device, LOWER, flags=MountFlag.READ_ONLY, data=data)


def _mount_volume(share: Served, volume: Volume) -> Iterator[Step]:
    flags = MountFlag.READ_ONLY if share.read_only else 0
    if share.source.is_dir():
        yield steps.MakeDirectory(volume.target)
        yield steps.Mount("virtiofs", share.tag, volume.target, flags=flags)
        return
    holder = f"{VOLUMES}/{share.tag}"
    yield steps.MakeDirectory(holder)
    yield steps.Mount("virtiofs", share.tag, holder, flags=flags)
    yield steps.MakeDirectory(os.path.dirname(volume.target))
    yield steps.Touch(volume.target)
    yield steps.Bind(f"{holder}/{share.source.name}", volume.target, read_only=share.read_only)
