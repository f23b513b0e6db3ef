"""The table's rings and registers where somebody else has the rings: the host's kernel (vhost-net and
vhost-vsock) or qemu-storage-daemon. Each may give the device up; nothing else may notice, and after a reset
it works.

What they do with a bad ring is theirs: the kernel's worker leaves the ring and says so, the daemon ends the
connection, or looks no more. So the cause is not asked for here, only that it is the guest's own.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostel.abi import virtio as abi
from hostel.errors import GuestError, HelperError
from hostel.host.inputs import checked_disks
from hostel.host.storage import Daemon
from hostel.memory import GuestMemory
from hostel.spec import Disk as DiskSpec
from hostel.virtio.device import VirtioDevice
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER, TapPort
from hostel.virtio.net_vhost import VhostPlane
from hostel.virtio.rng import Rng
from hostel.virtio.vhost_user_blk import VhostUserBlk
from hostel.virtio.vsock_vhost import RX, TX, VhostVsock, claim
from virtio.block_driver import Disk
from virtio.malice import REGISTERS, RINGS
from virtio.netns import GUEST_MAC, HOST_MAC, Namespace, frame, make_tap, plug, raw_socket
from virtio.rig import Driver, Rig, eventually
from virtio.storms import Storm, sees_no_more
from virtio.subjects import BOUND
from virtio.vsock_guest import CID

SIZE, LOW, HIGH = 32 << 20, 28 << 20, 1 << 32
GUARDS = ((0, 1 << 20), (26 << 20, 2 << 20), (HIGH, SIZE - LOW))
SETTLED = 0.05
"""Seconds in which another process has seen what it was told, as a rule."""
CONTENT = b"\x5a" * (1 << 20)


Hot = dict[int, tuple[Sequence[bytes], Sequence[int]]]


class Served:
    """A device, and how one sees that it works."""

    def __init__(self, device: VirtioDevice, hot: Hot, works: Callable[[Driver], None]) -> None:
        """``hot``: the queues that an attack begins with, each with an ordinary request."""
        self.device, self.hot, self.works = device, hot, works


def kernel(rig: Rig, folder: Path, stack: ExitStack) -> Served:
    net = stack.enter_context(Namespace())
    make_tap(net)
    wire = stack.enter_context(raw_socket(net))
    plane = VhostPlane(rig.loop, [TapPort(fd) for fd in plug(net)])

    def works(driver: Driver) -> None:
        token = os.urandom(8)
        while select.select([wire], [], [], 0)[
            0
        ]:  # a storm's: they leave no room for another frame
            wire.recv(4096)
        driver.queues[1].add([bytes(HEADER) + frame(token, to=HOST_MAC, sender=GUEST_MAC)])
        driver.kick(1)
        while wire.recv(4096)[14:] != token:
            pass

    outgoing = bytes(HEADER) + frame(b"storm", to=HOST_MAC, sender=GUEST_MAC)
    hot: Hot = {0: ([], [4096]), 1: ([outgoing], [])}
    return Served(Net(rig.loop, plane, mac=GUEST_MAC), hot, works)


def kernel_sockets(rig: Rig, folder: Path, stack: ExitStack) -> Served:
    vhost, cid = claim(CID)
    request = abi.VSOCK_HDR.pack(cid, abi.VSOCK_CID_HOST, 1024, 5000, 0, 1, 1, 0, 1 << 16, 0)

    def works(driver: Driver) -> None:
        """A request to a port where nobody listens is refused."""
        driver.queues[RX].add([], [4096])
        driver.kick(RX)
        driver.queues[TX].add([request])
        driver.kick(TX)
        assert abi.VSOCK_HDR.unpack(driver.wait(RX)[0].data)[6] == abi.VSOCK_OP_RST

    hot: Hot = {RX: ([], [4096]), TX: ([request], [])}
    return Served(VhostVsock(rig.loop, vhost, cid), hot, works)


def storage(rig: Rig, folder: Path, stack: ExitStack) -> Served:
    image = folder / "disk.raw"
    image.write_bytes(CONTENT)
    (spec,) = checked_disks((DiskSpec(path=str(image), plane="vhost-user", queues=2),))
    daemon = Daemon(spec, folder / "disk.sock", None)
    stack.callback(daemon.stop)
    daemon.wait_up()
    device = VhostUserBlk(rig.loop, daemon.socket, name="disk 0", queues=2, write_cache=True)

    def works(driver: Driver) -> None:
        assert Disk(driver).read(8, 512)[1] == CONTENT[:512]
        assert image.read_bytes() == CONTENT

    read: tuple[Sequence[bytes], Sequence[int]] = ([struct.pack("<IIQ", 0, 0, 8)], [512, 1])
    return Served(device, {0: read, 1: read}, works)


Make = Callable[[Rig, Path, ExitStack], Served]


class Table:
    """A device that is served elsewhere, and a bystander of our own."""

    def __init__(self, make: Make, transport: str, folder: Path) -> None:
        self.rig = Rig(GuestMemory(SIZE, low_end=LOW, high_start=HIGH))
        self.stack = ExitStack()
        self.served = make(self.rig, folder, self.stack)
        self.driver = self.rig.seat(transport, self.served.device)
        self.bystander = self.rig.seat(transport, Rng(self.rig.loop))
        self.bystander.start(base=24 << 20, heap=1 << 16)
        for start, size in GUARDS:
            self.rig.memory.write(start, b"\xa5" * size)

    def check(self, case: str) -> None:
        self.check_bystander(case)
        assert not self.rig.errors, case
        fault = self.served.device.fault
        assert isinstance(fault, GuestError | HelperError | None), (case, fault)
        eventually(lambda: self.driver.needs_reset, SETTLED)
        assert eventually(self.restarts), (case, self.served.device.fault)
        try:
            self.served.works(self.driver)
        except TimeoutError:
            raise AssertionError(f"{case}: it does not work again") from None
        for start, size in GUARDS:
            assert self.rig.memory.view(start, size) == b"\xa5" * size, case

    def check_bystander(self, case: str) -> None:
        begun = time.monotonic()
        assert self.bystander.request(0, [], [32]).written == 32, case
        assert time.monotonic() - begun < BOUND, case

    def restarts(self) -> bool:
        """A connection that is just ending may still take the first one with it."""
        self.driver.set_status(0)
        assert self.driver.get_status() == 0
        self.driver.start(heap=1 << 20)
        return not self.driver.needs_reset

    def close(self) -> None:
        self.rig.close()
        self.stack.close()


HAS_STORAGE = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon"),
    reason="no qemu-storage-daemon (package qemu-system-common)",
)
ELSEWHERE = pytest.mark.parametrize(
    "make",
    [
        pytest.param(kernel, marks=pytest.mark.linux_kvm),
        pytest.param(kernel_sockets, marks=pytest.mark.linux_kvm),
        pytest.param(storage, marks=HAS_STORAGE),
    ],
)


TRANSPORTS = pytest.mark.parametrize("transport", ["pci", "mmio"])


@contextlib.contextmanager
def table_of(make: Make, transport: str, folder: Path) -> Iterator[Table]:
    table = Table(make, transport, folder)
    yield table
    table.close()


@ELSEWHERE
@TRANSPORTS
def test_rings(make: Make, transport: str, tmp_path: Path) -> None:
    with table_of(make, transport, tmp_path) as table:
        for case, (_, play) in RINGS.items():
            for index in table.served.hot:
                table.driver.start(heap=1 << 20)
                play(table.driver.queues[index])
                table.driver.kick(index)
                table.check(f"{case}, queue {index}")


@ELSEWHERE
@TRANSPORTS
def test_a_reset_in_a_storm_is_the_end_of_it(make: Make, transport: str, tmp_path: Path) -> None:
    with table_of(make, transport, tmp_path) as table:
        for _ in range(2):
            table.driver.start(heap=1 << 20)
            with Storm(table.driver, table.served.hot):
                time.sleep(0.05)
                table.check_bystander("a storm")
                table.driver.set_status(0)
            assert table.driver.get_status() == 0
            assert sees_no_more(table.driver)
        table.check("a storm")


@ELSEWHERE
@TRANSPORTS
def test_registers(make: Make, transport: str, tmp_path: Path) -> None:
    with table_of(make, transport, tmp_path) as table:
        for case, play in REGISTERS.items():
            with contextlib.suppress(TimeoutError):
                play(table.driver)
            table.check(case)
