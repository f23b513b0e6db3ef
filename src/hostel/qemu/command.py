"""The QEMU command line of a plan: what hardware the machine has, on this engine.

::

    transport pci     -M q35       virtio-…-pci      clocks, ACPI and a PM timer as on a PC
    transport mmio    -M microvm   virtio-…-device   described by ACPI

Nothing by default (``-nodefaults -no-user-config``): what is not named here is not there. Streams
between QEMU and us are socket pairs, handed over as open descriptors: no paths, nothing to wait for,
nothing left behind.

Measured under TCG with Debian's 6.1 kernel, process start to user space, medians: q35 with a bzImage
2.5 s, with the ELF in it (PVH entry) 1.5 to 1.6 s, which qboot for SeaBIOS or ``microvm`` for ``q35``
better by less than 0.1 s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from hostel.errors import UserError
from hostel.host import storage
from hostel.plan import AGENT_PORT, Drive, Interface, Plan
from hostel.vmm.layout import PORT_DEBUG_CONSOLE, PORT_DEBUG_EXIT

from . import nic

MIB = 1 << 20

MACHINE = {
    "pci": "q35,sata=off,smbus=off,vmport=off,usb=off,hpet=off",
    "mmio": "microvm,acpi=on,rtc=on,pcie=off,ioapic2=on",
}
BALLOON = "/machine/peripheral/balloon"
"""Its place in QEMU's tree of objects."""
MODERN = ("vhost-user-fs", "vhost-user-vsock", "vhost-vsock")
"""Devices that are not older than virtio 1.0."""
SUFFIX = {"pci": "pci", "mmio": "device"}
CPU = {"tcg": "max", "kvm": "host"}
ACCEL = {"tcg": "tcg,thread=multi", "kvm": "kvm"}


def arguments(plan: Plan, kernel: Path, cmdline: str, fds: Mapping[str, int]) -> Iterator[str]:
    """All of it but the program. ``fds``: one end of a socket pair for each of ``streams``, a pipe for the
    ``log`` where there is something to learn from it, and the taps of ``nic.open_taps``."""
    spec = plan.spec
    yield from ("-nodefaults", "-no-user-config", "-display", "none")
    yield from ("-accel", ACCEL[plan.accel], "-cpu", CPU[plan.accel], "-smp", str(spec.cpus))
    yield from _memory(plan)
    yield from ("-kernel", str(kernel), "-append", cmdline)
    if plan.initrd:
        yield from ("-initrd", str(plan.initrd))
    if spec.on_reboot == "stop":
        yield "-no-reboot"
    if not plan.agent:
        yield "-S"  # it may be over before we listen (``Control.hold``)
    yield from _streams(plan, fds)
    if "log" in fds:
        yield from ("-d", "cpu_reset", "-D", f"/proc/self/fd/{fds['log']}")
    yield from _device(plan, "virtio-rng")
    for index, drive in enumerate(plan.disks):
        yield from _disk(plan, index, drive)
    for index, interface in enumerate(plan.nics):
        yield from _nic(plan, interface, f"net{index}", fds)
    for share in plan.shares:
        path = str(share.socket).replace(",", ",,")
        yield from ("-chardev", f"socket,id=fs-{share.tag},path={path}")
        yield from _device(plan, "vhost-user-fs", chardev=f"fs-{share.tag}", tag=share.tag)
    yield from _vsock(plan, fds)
    if plan.balloon:
        options = {"deflate-on-oom": True, "free-page-reporting": True}
        yield from _device(plan, "virtio-balloon", id="balloon", **options)
    yield from plan.qemu_args


def _vsock(plan: Plan, fds: Mapping[str, int]) -> Iterator[str]:
    """Of the kernel's device QEMU gets our descriptor, which has the guest's address already."""
    if plan.vsock is None:
        return
    if plan.vsock.plane == "python":
        yield from ("-chardev", f"socket,id=vsock,fd={fds['vsock']}")
        yield from _device(plan, "vhost-user-vsock", chardev="vsock")
    else:
        own: dict[str, str | int] = {"guest-cid": plan.vsock.cid, "vhostfd": str(fds["vsock"])}
        yield from _device(plan, "vhost-vsock", **own)


def balloon_statistics(found: Mapping[str, int]) -> dict[str, int]:
    """QEMU's names as the specification's; a value of all ones is one that the guest did not tell."""
    names = {"htlb-pgalloc": "hugetlb_allocations", "htlb-pgfail": "hugetlb_failures"}
    values = {name.removeprefix("stat-"): value for name, value in found.items()}
    return {
        names.get(name, name.replace("-", "_")): value
        for name, value in values.items()
        if value != 2**64 - 1
    }


def streams(plan: Plan) -> tuple[str, ...]:
    """The byte streams between QEMU and us."""
    return ("qmp", "serial", "agent") if plan.agent else ("qmp", "serial", "debug")


def _memory(plan: Plan) -> Iterator[str]:
    """Shared where somebody else reads and writes it; else private, which is cheaper."""
    spec = plan.spec
    if spec.memory % MIB:
        raise UserError(f"engine qemu takes memory in whole MiB, not {spec.memory} bytes")
    backend = "memory-backend-ram"
    by_socket = any(one.plane == "vhost-user" for one in plan.nics)
    if plan.shares or spec.hugepages or by_socket or _is_served_here(plan):
        huge = ",hugetlb=on" if spec.hugepages else ""
        backend = f"memory-backend-memfd,share=on{huge}"
    yield from ("-m", f"{spec.memory // MIB}M")
    yield from ("-object", f"{backend},id=ram,size={spec.memory}")
    yield from ("-machine", f"{MACHINE[spec.transport]},memory-backend=ram")
    if spec.transport == "mmio":
        yield from ("-global", "virtio-mmio.force-legacy=false")


def _is_served_here(plan: Plan) -> bool:
    """Whether hostel itself reads and writes guest memory."""
    return plan.vsock is not None and plan.vsock.plane == "python"


def _streams(plan: Plan, fds: Mapping[str, int]) -> Iterator[str]:
    """The monitor, the serial console, and the agent's port; without an agent the ports that OS
    developers know: 0xe9 prints, 0xf4 exits."""
    for name in streams(plan):
        yield from ("-chardev", f"socket,id={name},fd={fds[name]}")
    yield from ("-mon", "chardev=qmp,mode=control", "-serial", "chardev:serial")
    if plan.agent:
        # port 0 is a console's by default (virtio 1.2 §5.3.5), so there must be room for two
        yield from _device(plan, "virtio-serial", max_ports=2)
        yield from _json("virtserialport", chardev="agent", name=AGENT_PORT)
    else:
        yield from _json("isa-debugcon", iobase=PORT_DEBUG_CONSOLE, chardev="debug")
        yield from _json("isa-debug-exit", iobase=PORT_DEBUG_EXIT, iosize=4)


def _nic(plan: Plan, interface: Interface, name: str, fds: Mapping[str, int]) -> Iterator[str]:
    yield from nic.backend(interface, name, fds)
    driver, properties = nic.device(interface, name, pci=plan.spec.transport == "pci")
    if interface.model == "virtio":
        yield from _device(plan, driver, **properties)
    else:
        yield from _json(driver, **properties)


def _disk(plan: Plan, index: int, drive: Drive) -> Iterator[str]:
    disk, node = drive.disk, f"disk{index}"
    if group := storage.limits(disk, node):
        yield from ("-object", json.dumps(group))
    yield from ("-blockdev", json.dumps(storage.graph(disk, node, drive.overlay)))
    serial = {"serial": disk.serial} if disk.serial else {}
    through = {"write-cache": "off"} if disk.cache == "writethrough" else {}
    queues = {"num-queues": disk.queues}
    # The default for a full host is to stop the machine until somebody says "cont".
    errors = {"werror": "report", "rerror": "report"}
    yield from _device(plan, "virtio-blk", drive=node, **serial, **through, **queues, **errors)


def _device(plan: Plan, name: str, **properties: str | int | bool) -> Iterator[str]:
    has_legacy = plan.spec.transport == "pci" and name not in MODERN
    modern = {"disable-legacy": "on"} if has_legacy else {}
    yield from _json(f"{name}-{SUFFIX[plan.spec.transport]}", **modern, **properties)


def _json(driver: str, **properties: str | int | bool) -> Iterator[str]:
    yield from ("-device", json.dumps({"driver": driver, **properties}))
