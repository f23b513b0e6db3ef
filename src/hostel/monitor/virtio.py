"""The machine's virtio devices, in the order in which the guest finds them, and their seats.

::

    console   port 0: hvc0, port 1: the agent's ── socket pair ──► Monitor.agent
    rng
    disks     in the plan's order: vda, vdb …
    shares    file systems, each a vhost-user daemon that listens on a socket
    nics      those of model virtio, in the plan's order: eth0, eth1 …
    balloon   if the plan wants one
    vsock     the same; by the kernel or by us
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hostel.boot.acpi import MmioDevice
from hostel.errors import SpecError
from hostel.hypervisor import Vm
from hostel.memory import Region
from hostel.plan import AGENT_PORT, Drive, Vsock
from hostel.virtio.console import Console as VirtioConsole
from hostel.virtio.console import Port
from hostel.virtio.device import VirtioDevice
from hostel.virtio.mmio import VirtioMmio
from hostel.virtio.pci import VirtioPci
from hostel.vmm import layout
from hostel.vmm.loop import EventLoop
from hostel.vmm.pci import PciBus

from .nic import seat_e1000, virtio_nics
from .terminal import Terminal

if TYPE_CHECKING:
    from .board import Board

SLOT = 8  # memory slots 0 and 1 are RAM
MAX_PCI = 31  # slot 0 is the host bridge's
MAX_MMIO = len(layout.VIRTIO_MMIO_GSIS)


def seat_on_pci(board: Board, undo: ExitStack) -> None:
    """The default: each device is a PCI function."""
    ecam = Ecam(board.vm)
    board.pci = PciBus(board.mmio, ecam.memory, ecam.remove, ports=board.ports)
    board.mmio.add(layout.ECAM_START, layout.ECAM_SIZE, board.pci, "pci")
    seat_e1000(board, board.pci, undo)  # first: the ACPI tables know their numbers
    for make in _makers(board, MAX_PCI - len(board.cards)):
        device = make()
        function = VirtioPci(device, board.memory, board.vm, board.interrupts)
        undo.callback(function.close)
        board.pci.add(function)
        board.virtio.append(device)
    ecam.show()


class Ecam:
    """PCI config space as memory that the guest may read and not write: a read is no exit. A scan of
    the bus is some 100 reads for each function. Shown when all functions are there, for the guest runs."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._shown = False
        area = mmap.mmap(-1, layout.ECAM_SIZE)
        area.write(b"\xff" * layout.ECAM_SIZE)
        self._hva = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self.memory = memoryview(area)

    def show(self) -> None:
        region = Region(layout.ECAM_START, layout.ECAM_SIZE, self._hva, 0)
        self._vm.map(SLOT, region, read_only=True)
        self._shown = True

    def remove(self) -> None:
        """Reads are exits from now on. With the PCI bus's lock held."""
        if self._shown:
            self._shown = False
            self._vm.unmap(SLOT)


def seat_on_mmio(board: Board, undo: ExitStack) -> None:
    """Each device at an address and with an interrupt line of its own, which ACPI tells."""
    if any(nic.model != "virtio" for nic in board.plan.nics):
        raise SpecError("a network interface of model e1000 needs PCI", cure="--transport pci")
    for index, make in enumerate(_makers(board, MAX_MMIO)):
        device = make()
        address = layout.VIRTIO_MMIO_START + index * layout.VIRTIO_MMIO_STRIDE
        gsi = layout.VIRTIO_MMIO_GSIS[index]
        transport = VirtioMmio(device, board.memory, board.vm, address=address, gsi=gsi)
        undo.callback(transport.close)
        board.mmio.add(address, layout.VIRTIO_MMIO_STRIDE, transport, device.name)
        board.virtio.append(device)
        board.virtio_mmio.append(MmioDevice(address, layout.VIRTIO_MMIO_STRIDE, gsi))


def _makers(board: Board, limit: int) -> list[Callable[[], VirtioDevice]]:
    if board.plan.spec.soft and board.plan.spec.soft.logged:
        return []  # their planes run beside the guest
    makers: list[Callable[[], VirtioDevice]] = [partial(_console, board), partial(_rng, board)]
    makers += [*_disks(board), *_shares(board), *virtio_nics(board), *_balloon(board)]
    makers += _vsock(board)
    if len(makers) > limit:
        raise SpecError(
            f"the machine has {len(makers)} virtio devices; {board.plan.spec.transport} has room"
            f" for {limit}",
            cure="give it fewer disks and volumes",
        )
    return makers


def _console(board: Board) -> VirtioDevice:
    ours, theirs = socket.socketpair()
    board.terminal = Terminal(ours, board.console, board.loop, cmdline=board.plan.cmdline)
    ports = [Port("hvc0", theirs.detach(), console=True)]
    if board.agent_fd is not None:
        ports.append(Port(AGENT_PORT, os.dup(board.agent_fd)))
    return VirtioConsole(board.loop, ports)


def _rng(board: Board) -> VirtioDevice:
    from hostel.virtio.rng import Rng

    return Rng(board.loop)


def _disks(board: Board) -> Iterator[Callable[[], VirtioDevice]]:
    for index, drive in enumerate(board.plan.disks):
        yield partial(_disk, board, drive, disk_name(index))


def disk_name(index: int) -> str:
    return f"disk {index}"


@runtime_checkable
class Resizable(Protocol):
    """A disk whose size may change while the guest runs."""

    def resize(self, size: int) -> None: ...


def _disk(board: Board, drive: Drive, name: str) -> VirtioDevice:
    if drive.socket is not None:
        from hostel.virtio.vhost_user_blk import VhostUserBlk

        return VhostUserBlk(
            board.loop,
            drive.socket,
            name=name,
            queues=drive.disk.queues,
            write_cache=drive.disk.cache != "writethrough",
        )
    from hostel.virtio.block import Block

    disk = drive.disk
    return Block(
        board.loop,
        disk.path,
        name=name,
        read_only=disk.read_only,
        serial=disk.serial,
        queues=disk.queues,
        cache=disk.cache,
        limits=disk.limits,
    )


def _shares(board: Board) -> Iterator[Callable[[], VirtioDevice]]:
    if board.plan.shares:
        from hostel.virtio.fs import VirtioFs

        for share in board.plan.shares:
            yield partial(VirtioFs, board.loop, share.tag, share.socket)


def _balloon(board: Board) -> Iterator[Callable[[], VirtioDevice]]:
    if board.plan.balloon:
        from hostel.virtio.balloon import Balloon

        yield partial(Balloon, board.loop, board.memory.size)


def _vsock(board: Board) -> Iterator[Callable[[], VirtioDevice]]:
    if board.plan.vsock is not None:
        yield partial(_make_vsock, board.loop, board.plan.vsock)


def _make_vsock(loop: EventLoop, vsock: Vsock) -> VirtioDevice:
    from hostel.host.vsock import main_path, publish_cid, raise_file_limit

    if vsock.plane == "python":
        from hostel.virtio.vsock import Vsock as PythonVsock

        raise_file_limit()
        return PythonVsock(loop, main_path(vsock.directory), cid=vsock.cid)
    from hostel.virtio.vsock_vhost import VhostVsock, claim

    vhost, cid = claim(vsock.cid)
    publish_cid(vsock.directory, cid)
    return VhostVsock(loop, vhost, cid)
