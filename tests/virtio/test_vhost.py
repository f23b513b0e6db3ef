"""The kernel's vhost: what is checked before it hears of a ring, and the requests on the real device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import vhost as abi
from hostel.abi import virtio
from hostel.errors import HostError
from hostel.memory import GuestMemory
from hostel.virtio.device import QueueWiring
from hostel.virtio.mock import DriverQueue
from hostel.virtio.queue import Fault, VirtqueueError
from hostel.virtio.vhost import Vhost

NET = "/dev/vhost-net"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(8 << 20, low_end=4 << 20) as memory:
        yield memory


def wiring(queue: DriverQueue, **changes: int) -> QueueWiring:
    fields = {
        "kick": -1,
        "call": -1,
        "size": queue.size,
        "desc": queue.desc,
        "avail": queue.avail,
        "used": queue.used,
    }
    return QueueWiring(index=0, **{**fields, **changes})


def test_a_host_without_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        Vhost(str(tmp_path / "vhost-net"))
    if not Path(NET).exists():
        with pytest.raises(HostError, match="modprobe vhost_net"):
            Vhost(NET)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"size": 0}, Fault.SIZE_ZERO),
        ({"size": 24}, Fault.SIZE_NOT_POWER_OF_TWO),
        ({"used": (1 << 20) + 2}, Fault.USED_MISALIGNED),
        ({"desc": 1 << 45}, Fault.RING_OUTSIDE),
        ({"used": (4 << 20) - 8}, Fault.RING_OUTSIDE),
    ],
)
def test_a_bad_ring_never_reaches_the_kernel(
    memory: GuestMemory, changes: dict[str, int], fault: Fault, tmp_path: Path
) -> None:
    """The file is no vhost: a request would be an OSError, as the last line shows."""
    path = tmp_path / "device"
    path.touch()
    vhost = Vhost(str(path))
    queue = DriverQueue(memory, 1 << 20)
    with pytest.raises(VirtqueueError) as caught:
        vhost.start_ring(0, memory, wiring(queue, **changes), err=-1)
    assert caught.value.fault is fault
    with pytest.raises(HostError, match="VHOST_SET_VRING_NUM failed"):
        vhost.start_ring(0, memory, wiring(queue), err=-1)
    vhost.close()


@pytest.mark.linux_kvm
def test_the_real_device(memory: GuestMemory) -> None:
    vhost = Vhost(NET)
    vhost.set_owner()
    with pytest.raises(HostError, match="VHOST_SET_OWNER failed: Device or resource busy"):
        vhost.set_owner()
    offered = vhost.get_features()
    assert offered >> virtio.F_VERSION_1 & 1
    assert offered >> abi.NET_F_VIRTIO_NET_HDR & 1
    vhost.set_features(1 << virtio.F_VERSION_1)
    vhost.set_backend_features(vhost.get_backend_features())
    vhost.set_mem_table(memory)
    queue = DriverQueue(memory, 1 << 20)
    eventfd = os.eventfd(0)
    try:
        vhost.start_ring(0, memory, wiring(queue, kick=eventfd, call=eventfd), base=7, err=eventfd)
        assert vhost.stop_ring(0, memory, wiring(queue)) == (7, 0)
    finally:
        os.close(eventfd)
        vhost.close()
