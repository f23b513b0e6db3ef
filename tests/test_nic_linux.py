"""Linux guests with a NIC served by the kernel (vhost), and with the emulated 82540EM."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from hostel import Machine
from hostel.errors import ImageError
from hostel.host import kernels
from hostel.spec import Nic
from virtio.netns import GUEST_IP, GUEST_MAC, HOST_IP

pytestmark = [pytest.mark.linux_kvm, pytest.mark.slow]

PORT = 7000
DATA = bytes(range(256)) * 2048  # 512 KiB

GUEST = f"""
import hashlib, socket, sys
sock = socket.create_connection(("{HOST_IP}", {PORT}))
data = b""
while len(data) < {len(DATA)}:
    data += sock.recv(1 << 16)
print(hashlib.sha256(data).hexdigest())
sock.sendall(data)
"""


def run(command: str) -> str:
    done = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    return done.stdout


@contextmanager
def machine(nic: Nic, **spec: Any) -> Iterator[Machine]:
    """A guest on a tap; the network namespace is the tests' own."""
    run(f"ip tuntap add tap0 mode tap{' multi_queue' if nic.queues > 1 else ''}")
    try:
        run(f"ip addr add {HOST_IP}/24 dev tap0")
        run("ip link set tap0 up")
        mac = GUEST_MAC.hex(":")
        nic = msgspec.structs.replace(nic, mode="tap", target="tap0", mac=mac)
        with Machine(engine="kvm", nics=(nic,), **spec) as vm:
            vm.wait_ready(150)
            script = f"ip addr add {GUEST_IP}/24 dev eth0 && ip link set eth0 up"
            assert vm.exec(["sh", "-c", script], user="root").exit_code == 0
            yield vm
    finally:
        run("ip link del tap0")


def ping(vm: Machine) -> None:
    """Both ways; the second with fragments."""
    done = vm.exec(["ping", "-c3", "-i0.2", "-W20", HOST_IP])
    assert b" 3 received" in done.stdout, done
    assert " 2 received" in run(f"ping -c2 -i0.2 -W20 -s4000 {GUEST_IP}")


def transfer(vm: Machine) -> None:
    """Half a MiB into the guest and out again by TCP, unchanged."""
    with socket.create_server((HOST_IP, PORT)) as server:
        server.settimeout(60)
        process = vm.popen(["python3", "-c", GUEST])
        connection, _ = server.accept()
        with connection:
            connection.settimeout(120)
            connection.sendall(DATA)
            back = bytearray()
            while len(back) < len(DATA):
                back += connection.recv(1 << 16)
    assert hashlib.sha256(back).digest() == hashlib.sha256(DATA).digest()
    assert process.wait(60).code == 0


def exits(vm: Machine) -> int:
    """To this process, of all vCPUs."""
    return sum(sum(vcpu.values()) for vcpu in vm.statistics()["exits"])


def exits_of(vm: Machine) -> int:
    """Those of one transfer."""
    before = exits(vm)
    transfer(vm)
    return exits(vm) - before


def test_vhost_keeps_this_process_out_of_it() -> None:
    with machine(Nic(plane="vhost", queues=2), cpus=2) as vm:
        assert vm.plan.nics[0].plane == "vhost"
        queues = vm.exec(["ls", "/sys/class/net/eth0/queues"]).stdout.split()
        assert queues == [b"rx-0", b"rx-1", b"tx-0", b"tx-1"]
        assert vm.statistics()["virtio"]["net0"]["running"] == 2
        ping(vm)
        # Measured: 0, and once 11: what Linux does now and then beside it (a line on the console). The path's
        # own would be in each transfer.
        assert min(exits_of(vm), exits_of(vm)) < 10
        assert not vm.statistics()["virtio"]["net0"]["fault"]


def test_the_emulated_card() -> None:
    """The kernel that Debian makes for real machines has its driver."""
    try:
        kernel = next(k for k in kernels.survey() if k.modules and "cloud" not in k.release)
    except (StopIteration, ImageError):
        pytest.skip("no kernel with e1000.ko: hostel kernel fetch linux-image-amd64")
    with machine(Nic(model="e1000"), kernel=kernel.release) as vm:
        driver = vm.exec(["readlink", "/sys/class/net/eth0/device/driver"]).stdout
        assert driver.strip().endswith(b"/e1000")
        before = exits(vm)
        ping(vm)
        assert exits(vm) - before > 30, "each register is an exit"
        transfer(vm)
        card = vm.statistics()["cards"]["net0"]
        assert (card["fault"], card["dropped"]) == ("", 0)
        assert card["interrupts"] > 0
