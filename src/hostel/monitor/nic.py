"""The machine's virtio NICs: one device each, on the plane and the backend that the plan names.

::

    plan.nics ── Interface ─► Net ─┬─► PythonPlane ─► TapPort × queues | StreamPort
                                   └─► VhostPlane ──► TapPort × queues
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from hostel.errors import HelperError
from hostel.plan import Interface
from hostel.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from hostel.virtio.net_plane import NetPlane
    from hostel.virtio.net_port import NetPort

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
        mac=bytes.fromhex(nic.mac.replace(":", "")),
        name=name,
        mtu=nic.mtu,
        pairs=nic.queues,
    )


def _plane(board: Board, nic: Interface, name: str) -> NetPlane:
    if nic.plane == "vhost":
        from hostel.virtio.net_vhost import VhostPlane

        return VhostPlane(board.loop, open_ports(nic))
    from hostel.virtio.net_python import PythonPlane

    return PythonPlane(open_ports(nic), nic.limits, name=name)


def open_ports(nic: Interface) -> Sequence[NetPort]:
    """The host's side of a NIC, one port for each pair of its queues."""
    from hostel.host.tap import open_macvtap, open_tap
    from hostel.virtio.net_port import StreamPort, TapPort

    if nic.backend == "stream":
        return [StreamPort(_connect(nic.target))]
    open_queues = open_tap if nic.backend == "tap" else open_macvtap
    return [TapPort(fd) for fd in open_queues(nic.target, nic.queues)]


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise HelperError(
            f"nobody answers at {path}: {error.strerror}", cost="the NIC has no network"
        ) from None
    return sock
