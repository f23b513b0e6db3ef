"""The machine's NICs: one device each, on the plane and the backend that the plan names.

::

    plan.nics ── Interface ─► Net ─┬─► PythonPlane ─► TapPort × queues | StreamPort
                                   ├─► VhostPlane ──► TapPort × queues
                                   └─► VhostUserPlane ─► a socket, another process
                            └► E1000 ─► TapPort | StreamPort
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from hostel.boot.acpi import PciPin
from hostel.errors import HostError, SpecError
from hostel.plan import Interface, Plan
from hostel.vmm import layout

if TYPE_CHECKING:
    from hostel.virtio.device import VirtioDevice
    from hostel.virtio.net_plane import NetPlane
    from hostel.virtio.net_port import NetPort
    from hostel.vmm.pci import PciBus

    from .board import Board


def virtio_nics(board: Board) -> Iterator[Callable[[], VirtioDevice]]:
    for index, nic in enumerate(board.plan.nics):
        if nic.model == "virtio":
            yield partial(_make, board, nic, f"net{index}")


def _make(board: Board, nic: Interface, name: str) -> VirtioDevice:
    from hostel.virtio.net import Net

    return Net(
        board.loop,
        _plane(board, nic, name),
        mac=_mac(nic),
        name=name,
        mtu=nic.mtu,
        pairs=nic.queues,
    )


def _plane(board: Board, nic: Interface, name: str) -> NetPlane:
    if nic.plane == "vhost-user":
        from hostel.virtio.net_vhost_user import VhostUserPlane

        return VhostUserPlane(board.loop, nic.target, name=name, mtu=nic.mtu)
    if nic.plane == "vhost":
        from hostel.virtio.net_vhost import VhostPlane

        return VhostPlane(board.loop, open_ports(nic))
    from hostel.virtio.net_python import PythonPlane

    return PythonPlane(open_ports(nic), nic.limits, name=name)


def e1000_pins(plan: Plan) -> list[PciPin]:
    """Of the emulated ones, an interrupt line each, before they are seated: they have the first device
    numbers after the host bridge."""
    count = sum(nic.model == "e1000" for nic in plan.nics)
    if count > len(layout.PCI_GSIS):
        raise SpecError(
            f"{count} network interfaces of model e1000; there are interrupt lines for"
            f" {len(layout.PCI_GSIS)}",
            cure="make some of them virtio",
        )
    return [PciPin(1 + at, layout.PCI_GSIS[at]) for at in range(count)]


def seat_e1000(board: Board, pci: PciBus, undo: ExitStack) -> None:
    nics = [(index, nic) for index, nic in enumerate(board.plan.nics) if nic.model == "e1000"]
    for (index, nic), pin in zip(nics, e1000_pins(board.plan), strict=True):
        from hostel.devices.e1000.card import E1000

        (port,) = open_ports(nic)
        card = E1000(
            board.loop,
            board.memory,
            port,
            mac=_mac(nic),
            name=f"net{index}",
            limits=nic.limits,
        )
        undo.callback(card.close)
        card.on_fault = board.owner.device_failed
        card.connect(board.interrupts.line(pin.gsi))
        number = pci.add(card)
        assert number == pin.device
        board.cards.append(card)


def _mac(nic: Interface) -> bytes:
    return bytes.fromhex(nic.mac.replace(":", ""))


def open_ports(nic: Interface) -> Sequence[NetPort]:
    """The host's side of a NIC, one port for each pair of its queues."""
    from hostel.host.tap import open_queues
    from hostel.virtio.net_port import StreamPort, TapPort

    if nic.backend == "stream":
        from hostel.virtio.vhost_user import connect

        return [StreamPort(connect(nic.target, "passt"))]
    fds = open_queues(nic)
    try:
        return [TapPort(fd) for fd in fds]
    except HostError:
        for fd in fds:
            os.close(fd)
        raise
