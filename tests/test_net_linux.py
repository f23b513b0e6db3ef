"""Linux behind the Python plane of a NIC: its driver takes the offloads, and data arrives as it was sent."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.net_peer import CHUNK, SIZE
from hostel.machine import Machine
from hostel.spec import MachineSpec, Nic, Transport
from hostel.virtio.net import Net
from virtio.netns import GUEST_IP, GUEST_MAC, HOST_IP, Namespace, make_tap

pytestmark = [pytest.mark.linux_kvm, pytest.mark.slow]
PEER = str(Path(__file__).parent / "guests" / "net_peer.py")
DIGEST = hashlib.sha256(CHUNK * (SIZE // len(CHUNK))).hexdigest()
MTU = 1400
UNTIL_CARRIER = """
for i in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = %d ] && exit; sleep 0.1; done; false
"""


class Lab:
    """A machine, the namespace with its tap, and how many pairs of queues the NIC has."""

    def __init__(self, net: Namespace, machine: Machine, queues: int) -> None:
        self.net, self.machine, self.queues = net, machine, queues

    def sh(self, command: str) -> str:
        result = self.machine.exec(["sh", "-c", command], user="root")
        assert result.exit_code == 0, (command, result)
        return result.stdout.decode()

    @property
    def counters(self) -> dict[str, Any]:
        return dict(self.machine.statistics()["virtio"]["net0"])

    def frames(self, way: str) -> int:
        """That went this way so far, by all pairs of queues."""
        return sum(pair[way]["frames"] for pair in self.counters["pairs_served"].values())

    def listen(self) -> socket.socket:
        return self.net.call(socket.create_server, (HOST_IP, 0))


@pytest.fixture(scope="module", params=[("pci", 2), ("mmio", 1)], ids=["pci", "mmio"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    transport: Transport
    transport, queues = request.param
    with Namespace() as net:
        make_tap(net, several=queues > 1)
        nic = Nic(
            mode="tap",
            target="tap0",
            plane="python",
            mac=GUEST_MAC.hex(":"),
            mtu=MTU,
            queues=queues,
        )
        spec = MachineSpec(engine="kvm", transport=transport, cpus=2, memory=256 << 20, nics=(nic,))
        machine = Machine(spec)
        net.call(machine.start)
        try:
            machine.wait_ready()
            lab = Lab(net, machine, queues)
            lab.sh(f"ip addr add {GUEST_IP}/24 dev eth0 && ip link set eth0 up")
            yield lab
        finally:
            machine.stop()


def test_what_the_driver_sees(lab: Lab) -> None:
    assert lab.sh("cat /sys/class/net/eth0/address").strip() == GUEST_MAC.hex(":")
    assert lab.sh("cat /sys/class/net/eth0/mtu").strip() == str(MTU)
    assert lab.counters["pairs"] == lab.queues, "one pair for each vCPU"


def test_ping_from_both_ends(lab: Lab) -> None:
    assert " 0% packet loss" in lab.sh(f"ping -c 3 -i 0.2 -s 1300 {HOST_IP}")
    assert " 0% packet loss" in lab.net.run(f"ping -c 3 -i 0.2 -s 1300 {GUEST_IP}")


def test_from_the_guest(lab: Lab) -> None:
    before = lab.frames("transmit")
    with lab.listen() as server:
        process = lab.machine.popen(
            [sys.executable, PEER, "send", HOST_IP, str(server.getsockname()[1])]
        )
        server.settimeout(60)
        sock, _ = server.accept()
        sock.settimeout(60)
        with sock:
            digest = hashlib.sha256()
            while part := sock.recv(1 << 16):
                digest.update(part)
            sock.send(b"!")
        assert process.read() == ("stdout", f"{DIGEST}\n".encode())
        assert process.wait().code == 0
    assert digest.hexdigest() == DIGEST
    frames = lab.frames("transmit") - before
    assert frames < SIZE // MTU, "segments larger than the MTU: the host cuts them"


def test_to_the_guest(lab: Lab) -> None:
    before = lab.frames("receive")
    with lab.listen() as server:
        process = lab.machine.popen(
            [sys.executable, PEER, "receive", HOST_IP, str(server.getsockname()[1])]
        )
        server.settimeout(60)
        sock, _ = server.accept()
        sock.settimeout(60)
        with sock:
            for _ in range(SIZE // len(CHUNK)):
                sock.sendall(CHUNK)
        assert process.read() == ("stdout", f"{DIGEST}\n".encode())
        assert process.wait().code == 0
    assert lab.frames("receive") - before < SIZE // MTU
    received = [pair["receive"] for pair in lab.counters["pairs_served"].values()]
    assert sum(one["dropped"] for one in received) == 0


def test_the_filters_follow_the_driver(lab: Lab) -> None:
    """Linux sets them for what it joined; a frame for somebody else does not reach it."""
    lab.sh("ip link set eth0 promisc off")
    lab.sh("ip maddr add 33:33:00:00:12:34 dev eth0")
    device = next(one for one in _devices(lab) if isinstance(one, Net))
    assert not device.filter.promiscuous
    assert bytes.fromhex("333300001234") in device.filter.multicast
    lab.sh("ip link set eth0 promisc on")
    assert device.filter.promiscuous
    lab.sh("ip link set eth0 promisc off")


def test_the_cable_is_pulled(lab: Lab) -> None:
    lab.machine.set_link(up=False)
    lab.sh(UNTIL_CARRIER % 0)
    lab.machine.set_link(up=True)
    lab.sh(UNTIL_CARRIER % 1)
    lab.machine.announce()
    assert " 0% packet loss" in lab.sh(f"ping -c 2 -i 0.2 {HOST_IP}")


def test_exits_of_the_path(lab: Lab) -> None:
    """Kicks are ioeventfds, interrupts irqfds: a ping is no exit that Python sees. On MMIO the driver
    acknowledges each interrupt in a register: two exits."""
    lab.sh(f"ping -c 2 {HOST_IP}")
    before = _mmio_exits(lab)
    lab.sh(f"ping -c 20 -i 0.01 {HOST_IP}")
    exits = _mmio_exits(lab) - before
    assert exits < 10 if lab.machine.spec.transport == "pci" else exits > 20


def _mmio_exits(lab: Lab) -> int:
    return sum(exits.get("MmioExit", 0) for exits in lab.machine.statistics()["exits"])


def _devices(lab: Lab) -> list[Any]:
    engine: Any = lab.machine._engine
    return list(engine._board.virtio)
