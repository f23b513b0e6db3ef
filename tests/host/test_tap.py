"""Opening taps by name, in a network namespace of the test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from hostel.errors import HostError
from hostel.host.tap import open_macvtap, open_tap
from virtio.netns import Namespace


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as net:
        yield net


def close(fds: list[int]) -> int:
    for fd in fds:
        os.close(fd)
    return len(fds)


def test_a_tap_by_its_name(net: Namespace) -> None:
    net.run("ip tuntap add dev one mode tap")
    assert close(net.call(open_tap, "one")) == 1
    assert close(net.call(open_tap, "one")) == 1, "again, once it is closed"


def test_several_queues(net: Namespace) -> None:
    net.run("ip tuntap add dev many mode tap multi_queue")
    assert close(net.call(open_tap, "many", 4)) == 4
    assert close(net.call(open_tap, "many")) == 1


def test_a_name_that_is_not_there_is_no_new_interface(net: Namespace) -> None:
    with pytest.raises(HostError, match=r"no interface nobody.*tuntap add dev nobody"):
        net.call(open_tap, "nobody")
    assert "nobody" not in net.run("ip link")


def test_a_tap_of_one_queue_has_not_two(net: Namespace) -> None:
    net.run("ip tuntap add dev one mode tap")
    with pytest.raises(HostError, match=r"tap one is no tap.*multi_queue"):
        net.call(open_tap, "one", 2)
    assert close(net.call(open_tap, "one")) == 1, "nothing was left open"


def test_a_tap_in_use(net: Namespace) -> None:
    net.run("ip tuntap add dev one mode tap")
    fds = net.call(open_tap, "one")
    with pytest.raises(HostError, match="tap one is in use"):
        net.call(open_tap, "one")
    close(fds)


def test_what_is_no_tap(net: Namespace) -> None:
    with pytest.raises(HostError, match="tap lo is no tap"):
        net.call(open_tap, "lo")


def test_a_macvtap(net: Namespace) -> None:
    net.run("ip link add under type veth peer name over")
    try:
        net.run("ip link add link under name macvtap0 type macvtap")
    except subprocess.CalledProcessError:
        pytest.skip("this kernel has no macvtap")
    index = net.run("ip -o link show macvtap0").partition(":")[0]
    device = f"/dev/tap{index}"
    if not os.path.exists(device):
        pytest.skip(f"nobody makes {device} here")
    net.run("ip link set under up")
    assert close(net.call(open_macvtap, device, 2)) == 2


def test_a_macvtap_that_is_not_there() -> None:
    with pytest.raises(HostError, match="/dev/tap999999 does not exist"):
        open_macvtap("/dev/tap999999")
