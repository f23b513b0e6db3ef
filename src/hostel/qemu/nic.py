"""NICs on the QEMU command line: a ``-netdev`` with the host's side, a device with the guest's.

::

    backend       -netdev
    tap, macvtap  tap,fds=…       opened by us: our errors, and no interface made by mistake
    stream        stream          passt's socket
    vhost-user    vhost-user      needs the guest's memory to be shared

Taps are opened here and not by QEMU for one more reason: nothing of QEMU's set-up scripts is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from hostel.plan import Interface, Plan

Properties = dict[str, str | int | bool]


def open_taps(plan: Plan, undo: ExitStack) -> dict[str, int]:
    """Descriptors to hand to QEMU, by the names that ``backend`` asks for; ``undo`` closes them."""
    fds = {}
    for index, nic in enumerate(plan.nics):
        if nic.backend in ("tap", "macvtap"):
            from hostel.host.tap import open_queues

            for queue, fd in enumerate(open_queues(nic)):
                undo.callback(os.close, fd)
                fds[f"net{index}.{queue}"] = fd
    return fds


def backend(nic: Interface, name: str, fds: Mapping[str, int]) -> Iterator[str]:
    """The host's side."""
    path = nic.target.replace(",", ",,")
    if nic.backend in ("tap", "macvtap"):
        queues = ":".join(str(fds[f"{name}.{queue}"]) for queue in range(nic.queues))
        which = f"fds={queues}" if nic.queues > 1 else f"fd={queues}"
        vhost = "on" if nic.plane == "vhost" else "off"
        yield from ("-netdev", f"tap,id={name},{which},vhost={vhost}")
    elif nic.backend == "stream":
        yield from ("-netdev", f"stream,id={name},server=off,addr.type=unix,addr.path={path}")
    else:
        yield from ("-chardev", f"socket,id={name}-socket,path={path}")
        yield from ("-netdev", f"vhost-user,id={name},chardev={name}-socket,queues={nic.queues}")


def device(nic: Interface, name: str, *, pci: bool) -> tuple[str, Properties]:
    """The guest's side: the name of QEMU's device, and its properties."""
    properties: Properties = {"netdev": name, "mac": nic.mac}
    if pci:
        properties["romfile"] = ""  # nobody boots from the network
    if nic.model == "e1000":
        return "e1000", properties
    if nic.mtu:
        properties["host_mtu"] = nic.mtu
    if nic.queues > 1:
        properties["mq"] = True
        if pci:
            # one for each queue, the control queue's and that of configuration changes
            properties["vectors"] = 2 * nic.queues + 2
    return "virtio-net", properties
