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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .boot import cmdline
from .errors import KvmError, SpecError
from .host import kernels
from .host.attaching import foreseen, interfaces
from .host.inputs import checked_disks, readable
from .host.verdict import verdict
from .plan import Drive, Plan, Share, Vsock
from .spec import Disk, MachineSpec, Soft

if TYPE_CHECKING:
    from .guest.steps import Step
    from .host.interface import Attachment
    from .host.networks import Networks
    from .host.shares import Served


class Choice(msgspec.Struct, frozen=True):
    engine: Literal["kvm", "qemu", "soft"]
    accel: Literal["kvm", "tcg"]
    reason: str


def choose_engine(spec: MachineSpec, kernel: Path | None = None) -> Choice:
    """``auto``: our own monitor where KVM runs a guest's kernel at speed, else QEMU.

    A named engine that cannot work is an error with the reason. A KVM that interprets the guest's kernel is
    no place for Linux, but it runs a small ``kernel`` of one's own, if asked to.
    """
    if spec.engine == "soft":
        return Choice("soft", "kvm", _soft(spec))
    report = verdict()
    named = spec.engine == "kvm" and not report.usable
    asked = named and report.max_vcpus > 0 and kernel is not None and not _is_linux(kernel)
    if named and not asked:
        raise KvmError(
            f"engine kvm cannot run Linux here: {report.reason}",
            cure="use --engine qemu, or a host with hardware virtualization",
        )
    if (report.usable or asked) and spec.cpus > report.max_vcpus:
        raise SpecError(f"this host's KVM takes at most {report.max_vcpus} vCPUs, not {spec.cpus}")
    if asked or (report.usable and spec.engine != "qemu"):
        return Choice("kvm", "kvm", report.reason)
    if report.usable:
        return Choice("qemu", "kvm", f"as asked, on KVM: {report.reason}")
    return Choice("qemu", "tcg", f"emulated by QEMU: {report.reason}")


def _is_linux(path: Path) -> bool:
    from .boot.image import open_kernel

    with open_kernel(path) as kernel:
        return kernel.protocol == "linux"


def _soft(spec: MachineSpec) -> str:
    """That it can work here, and how it will."""
    from .soft.extra import unicorn_version

    how = spec.soft or Soft()
    return f"as asked: unicorn {unicorn_version()}, paging {how.paging}, trap {how.trap}"


class Preparation(msgspec.Struct, frozen=True):
    """A plan, and what the agent does once the machine has started."""

    plan: Plan
    steps: tuple[Step, ...]
    attachments: tuple[Attachment, ...] = ()

    found: dict[str, str] = {}
    """By a NIC's MAC, the address with its prefix that its network gave (DHCP); empty if it gave none."""

    def heard(self, said: str) -> None:
        """What the agent said when it had done its steps."""
        from .guest.network import answers

        self.found.update(answers(said, self.attachments))

    def notes(self) -> tuple[str, ...]:
        """What did not go as a user may expect, and is no error."""
        from .guest.network import unanswered

        return tuple(unanswered(self.found, self.attachments))

    def nics(self) -> list[dict[str, Any]]:
        """What each NIC is, and the guest's addresses on it as far as they are known here."""
        return [
            {
                **msgspec.structs.asdict(one.interface),
                "limits": msgspec.to_builtins(one.interface.limits),
                "addresses": [a.partition("/")[0] for a in self._addresses(one)],
            }
            for one in self.attachments
        ]

    def addresses(self) -> tuple[str, ...]:
        """Those of all NICs, in their order, without their prefixes."""
        return tuple(a.partition("/")[0] for one in self.attachments for a in self._addresses(one))

    def _addresses(self, one: Attachment) -> Sequence[str]:
        if one.link:
            return one.link.addresses
        return [address] if (address := self.found.get(one.interface.mac)) else []


def prepare(
    spec: MachineSpec,
    runtime: Path,
    *,
    networks: Networks | None = None,
    qemu_args: tuple[str, ...] = (),
) -> Preparation:
    """The plan of a machine with an agent. ``runtime`` is where its sockets will be.

    ``networks`` are waited for last: they may still be on their way. Without them the plan shows what would
    be made.
    """
    from . import root
    from .boot import initramfs
    from .guest.build import agent_binary

    if spec.engine == "soft":
        raise SpecError(
            "engine soft is for small kernels of one's own, not for Linux and its agent",
            cure="hostel boot --engine soft --kernel IMAGE",
        )
    served = root.shared_paths(spec)
    disks = (*checked_disks(spec.disks), *root.root_disk(spec))
    choice = choose_engine(spec)
    kernel = kernels.find(spec.kernel)
    wanted, optional = root.modules(spec, bool(disks))
    initrd = initramfs.build(
        kernel.modules,
        kernel.release,
        wanted,
        agent_binary(),
        optional=optional,
        initrd=readable(spec.initrd, "initrd") if spec.initrd else None,
    )
    networks = networks or foreseen(spec, runtime)
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
        disks=tuple(_drives(disks, choice, runtime)),
        shares=tuple(Share(s.tag, runtime / f"{s.tag}.sock") for s in served),
        runtime=runtime,
        accel=choice.accel,
        qemu_args=qemu_args,
        vsock=_vsock(spec, runtime),
        nics=interfaces(networks, choice.engine),
        balloon=spec.balloon,
        notes=(
            *_notes(spec),
            *_disk_notes(disks),
            *_share_notes(spec, served),
            *networks.notes,
        ),
    )
    steps = root.guest_steps(spec, served, len(disks), networks.attachments)
    return Preparation(plan, tuple(steps), networks.attachments)


def _share_notes(spec: MachineSpec, served: Sequence[Served]) -> Iterator[str]:
    """Where ``auto`` did not take the fastest."""
    from .host.shares import choose

    choices = [choose(share, spec.memory) for share in served if share.server == "auto"]
    for reason in dict.fromkeys(one.reason for one in choices if one.server == "python"):
        yield f"files are served by hostel itself, which takes longer: {reason}"


def prepare_raw(spec: MachineSpec, runtime: Path, *, networks: Networks | None = None) -> Plan:
    """The plan of ``hostel boot``: any kernel, as it is, with no agent."""
    if spec.engine == "soft" and not spec.kernel:
        raise SpecError(
            "engine soft has no kernel of its own: the newest Linux is not for it",
            cure="give it one of yours (--kernel IMAGE)",
        )
    image = kernels.find(spec.kernel)
    choice = choose_engine(spec, image.image)
    disks = checked_disks(spec.disks)
    networks = networks or foreseen(spec, runtime)
    return Plan(
        spec=spec,
        engine=choice.engine,
        reason=choice.reason,
        kernel=image.image,
        release=image.release,
        initrd=readable(spec.initrd, "initrd") if spec.initrd else None,
        cmdline=cmdline.build("boot", engine=choice.engine, accel=choice.accel, append=spec.append),
        disks=tuple(_drives(disks, choice, runtime)),
        shares=(),
        runtime=runtime,
        agent=False,
        accel=choice.accel,
        vsock=_vsock(spec, runtime),
        nics=interfaces(networks, choice.engine),
        balloon=spec.balloon,
        notes=(*_notes(spec), *_disk_notes(disks), *networks.notes),
    )


def _drives(disks: tuple[Disk, ...], choice: Choice, runtime: Path) -> Iterator[Drive]:
    """Who serves each disk. A daemon's socket and an overlay are made by ``host/storage.py``."""
    for index, disk in enumerate(disks):
        plain = disk.format == "raw" and not disk.overlay
        if disk.plane == "python" and not plain:
            raise SpecError(
                f"disk {disk.path}: the Python plane serves raw images without an overlay only",
                cure="leave the plane to hostel",
            )
        overlay = runtime / f"disk{index}.overlay" if disk.overlay else None
        if choice.engine == "qemu" or (plain and disk.plane != "vhost-user"):
            yield Drive(disk, overlay=overlay)
            continue
        if disk.serial:
            raise SpecError(
                f"disk {disk.path}: qemu-storage-daemon gives its disks no serial",
                cure="use a raw image without an overlay, or --engine qemu",
            )
        yield Drive(disk, runtime / f"disk{index}.sock", overlay)


def _disk_notes(disks: tuple[Disk, ...]) -> Iterator[str]:
    if not disks:
        return
    from .host import images, storage

    for disk in disks:
        if doubt := images.doubt(Path(disk.path), disk.format):
            yield doubt
        if followed := storage.followed(disk):
            yield f"disk {disk.path} stands on {', '.join(map(str, followed))}"


def _vsock(spec: MachineSpec, runtime: Path) -> Vsock | None:
    if spec.vsock == "none":
        return None
    from .host import vsock

    plane, reason = vsock.choose(spec.vsock)
    return Vsock(vsock.FIRST_CID, plane, runtime, reason)


def _notes(spec: MachineSpec) -> Iterator[str]:
    """What is allowed and still worth a word."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if spec.memory > total:
        yield (
            f"{spec.memory >> 20} MiB of guest memory is more than the host has ({total >> 20} MiB): "
            "the host may run out"
        )
    cpus = os.cpu_count() or 1
    if spec.cpus > cpus and spec.engine != "soft":  # whose vCPUs take turns on one pCPU anyway
        yield f"{spec.cpus} vCPUs share {cpus} pCPUs: they will wait for one another"
