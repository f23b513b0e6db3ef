"""The root of a guest: what it is made of on the host, and how the agent puts it together.

::

    host, directory   virtiofs, read-only   ┐
    image             a disk, read-only     ├─ lower   overlay ── entered ── tmpfs, volumes, read-only
                      tmpfs of the guest ───┘  upper
    none              the initramfs itself
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from .errors import UserError
from .guest import network, steps
from .guest.steps import MountFlag, Step
from .host import filesystem
from .host.inputs import checked_disks, readable
from .host.interface import Attachment
from .host.shares import Served
from .spec import Disk, MachineSpec, Volume

ROOT_TAG = "hostel-root"
LOWER, TOP, ROOT = "/hostel/lower", "/hostel/top", "/hostel/root"
VOLUMES = "/run/hostel"

_MOUNT_DATA = {"ext4": "noload", "xfs": "norecovery", "btrfs": "norecovery"}
"""A root image is never written, so its journal is not replayed either."""
_REMOUNT = 32


def shared_paths(spec: MachineSpec) -> tuple[Served, ...]:
    """What file system daemons have to serve."""
    return tuple(_served(spec))


def _served(spec: MachineSpec) -> Iterator[Served]:
    if spec.root.kind == "host":
        yield _served_root(spec, Path("/"))
    elif spec.root.kind == "directory":
        path = readable(spec.root.path, "root")
        if not path.is_dir():
            raise UserError(f"root {path} is not a directory")
        yield _served_root(spec, path)
    for index, volume in enumerate(spec.volumes):
        yield Served(
            f"volume{index}",
            readable(volume.source, "volume"),
            volume.read_only,
            cache=volume.cache,
            owner=volume.owner_ids(),
            server=volume.server,
        )


def _served_root(spec: MachineSpec, path: Path) -> Served:
    """It does not change under the guest as far as we care: it may cache for ever."""
    return Served(
        ROOT_TAG, path, read_only=True, cache="always", server=spec.root.server, is_root=True
    )


def root_disk(spec: MachineSpec) -> tuple[Disk, ...]:
    """Last in the row, so that ``--disk`` is /dev/vda with every root."""
    if spec.root.kind != "image":
        return ()
    disk = Disk(path=spec.root.path, read_only=True, serial=ROOT_TAG)
    (checked,) = checked_disks((disk,))
    if checked.format != "raw":
        raise UserError(
            f"root {checked.path} is a {checked.format} image; a root has to be a raw one",
            cure=f"qemu-img convert -O raw {checked.path} NEW.raw",
        )
    return (checked,)


def modules(spec: MachineSpec, disks: bool) -> tuple[list[str], list[str]]:
    """Names of the drivers that this machine must have, and those it may use."""
    wanted = [f"virtio_{spec.transport}", "virtio_console"]
    if disks:
        wanted.append("virtio_blk")
    if any(nic.model == "virtio" for nic in spec.nics):
        wanted.append("virtio_net")
    if any(nic.model == "e1000" for nic in spec.nics):
        wanted.append("e1000")
    if spec.root.kind in ("host", "directory") or spec.volumes:
        wanted.append("virtiofs")
    if spec.root.kind != "none":
        wanted.append("overlay")
    if spec.balloon:
        wanted.append("virtio_balloon")
    if spec.vsock != "none":
        wanted.append("vmw_vsock_virtio_transport")
    if spec.root.kind == "image":
        wanted.append(_root_file_system(spec.root.path).driver)
    return wanted + network.modules(spec), ["virtio_rng"]


@cache
def _root_file_system(path: str) -> filesystem.FileSystem:
    return filesystem.find_root(Path(path))


# -- what the agent does ------------------------------------------------------------------------


def guest_steps(
    spec: MachineSpec,
    served: tuple[Served, ...],
    disks: int,
    attachments: Sequence[Attachment],
) -> Iterator[Step]:
    """The guest's root, from the initramfs to where commands run.

    Volumes are mounted after the root has been entered: their targets may lie behind symbolic links
    that mean something only there. Files of the network come before them: a volume may take their place.
    """
    if spec.root.kind != "none":
        yield from _enter_root(spec, disks)
    yield from network.network_steps(spec, attachments)
    for path in spec.tmpfs:
        target, _, data = path.partition(":")
        yield steps.MakeDirectory(target)
        yield steps.Mount("tmpfs", "tmpfs", target, data=data)
    for share, volume in zip((s for s in served if not s.is_root), spec.volumes, strict=True):
        yield from _mount_volume(share, volume)
    if spec.read_only and spec.root.kind != "none":
        yield steps.Mount("overlay", "overlay", "/", flags=_REMOUNT | MountFlag.READ_ONLY)


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
