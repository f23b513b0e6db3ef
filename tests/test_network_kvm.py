"""Networks of Linux guests on engine kvm, on a real KVM: each data plane moves the packets."""

from __future__ import annotations

import pytest

import hostel
from guests.namespaces import HOST, OUTSIDE, Echo, missing, world
from hostel.host.net_plane import vhost_missing
from hostel.spec import Nic

pytestmark = [
    pytest.mark.linux_kvm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.slow,
]

CONNECT = f"""
import socket
asking = socket.create_connection(("{OUTSIDE}", 7), 60)
asking.send(b"?")
print(asking.recv(99).decode())
"""


def test_both_planes_in_one_machine() -> None:
    """Two NICs on two networks: the way out is the first one's."""
    if reason := vhost_missing():
        pytest.skip(reason)
    nics = (Nic(plane="python"), Nic(mode="isolated", target="inner", plane="vhost"))
    with (
        world() as (_, outside),
        Echo(outside, 7),
        hostel.Machine(engine="kvm", nics=nics, name="guest") as vm,
    ):
        vm.wait_ready(280)
        for address in vm.addresses:
            gateway = f"{address.rpartition('.')[0]}.1"
            result = vm.exec(["ping", "-n", "-c1", "-W20", gateway], timeout=60)
            assert b"1 received" in result.stdout, (gateway, result)
        assert vm.exec(["python3", "-c", CONNECT]).stdout.decode() == f"{HOST}\n"
        assert [nic["plane"] for nic in vm.statistics()["nics"]] == ["python", "vhost"]
