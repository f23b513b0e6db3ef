"""A Linux guest's AF_VSOCK and the host's programs: by the library, by the command, on each plane."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.errors import GuestError, HostError, MachineStopped, UserError
from hostel.guest.process import GuestProcess
from hostel.machine import Machine
from hostel.spec import MachineSpec

PEER = str(Path(__file__).parent / "guests" / "vsock_peer.py")
CHUNK = bytes(range(256)) * 256
PORT = 5000
LARGE = 8 << 20

KINDS = [
    pytest.param(("qemu", "python", "pci"), marks=pytest.mark.qemu, id="qemu-python-pci"),
    pytest.param(("qemu", "vhost", "pci"), marks=pytest.mark.linux_kvm, id="qemu-vhost-pci"),
    pytest.param(("kvm", "python", "pci"), marks=pytest.mark.linux_kvm, id="kvm-python-pci"),
    pytest.param(("kvm", "vhost", "mmio"), marks=pytest.mark.linux_kvm, id="kvm-vhost-mmio"),
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def vm(request: pytest.FixtureRequest) -> Iterator[Machine]:
    engine, plane, transport = request.param
    spec = MachineSpec(
        name="vsock-test", engine=engine, vsock=plane, transport=transport, memory=256 << 20
    )
    with Machine(spec) as machine:
        yield machine


@pytest.fixture(scope="module")
def server(vm: Machine) -> Iterator[GuestProcess]:
    process = vm.popen([sys.executable, PEER, "digest", str(PORT)])
    assert process.read() == ("stdout", b"listening\n")
    yield process
    process.signal(9)


def answer(sock: socket.socket) -> bytes:
    with sock:
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(100), b""))


def expected(data: bytes) -> bytes:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()


def guest(vm: Machine, *words: object) -> GuestProcess:
    return vm.popen([sys.executable, PEER, *map(str, words)], stdin=False)


@pytest.mark.parametrize("size", [0, 1, 100_000, LARGE])
def test_to_the_guest(vm: Machine, server: GuestProcess, size: int) -> None:
    data = (CHUNK * (size // len(CHUNK) + 1))[:size]
    sock = vm.vsock_connect(PORT)
    sock.sendall(data)
    assert answer(sock) == expected(data)


def test_from_the_guest(vm: Machine) -> None:
    with vm.vsock_listen(6000) as listener:
        process = guest(vm, "send", 6000, LARGE // len(CHUNK))
        sock, _ = listener.accept()
        seen = hashlib.sha256()
        with sock:
            while data := sock.recv(1 << 18):
                seen.update(data)
            sock.sendall(b"thanks\n")
        assert process.communicate()[0] == b"thanks\n"
    assert seen.digest() == hashlib.sha256(CHUNK * (LARGE // len(CHUNK))).digest()


def test_many_at_once(vm: Machine) -> None:
    count = 200
    with vm.vsock_listen(6001) as listener:
        process = guest(vm, "many", 6001, count)
        socks = [listener.accept()[0] for _ in range(count)]
        for sock in socks:
            sock.sendall(sock.recv(4, socket.MSG_WAITALL))
        assert process.communicate()[0] == b"%d\n" % count
        for sock in socks:
            sock.close()


def test_clients_beside_each_other(vm: Machine, server: GuestProcess) -> None:
    idle = vm.vsock_connect(PORT)
    answers: list[bytes] = []

    def one(number: int) -> None:
        sock = vm.vsock_connect(PORT)
        sock.sendall(CHUNK * number)
        answers.append(answer(sock))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == sorted(expected(CHUNK * number) for number in range(8))
    assert answer(idle) == expected(b"")


def test_nobody_listens(vm: Machine) -> None:
    with pytest.raises(GuestError, match="vsock port 5999"):
        vm.vsock_connect(5999)
    assert guest(vm, "refused", 5999).communicate()[0] == b"refused\n"
    with pytest.raises(UserError, match="a vsock port is"):
        vm.vsock_connect(1 << 32)


def test_a_port_in_use(vm: Machine) -> None:
    with vm.vsock_listen(6002), pytest.raises(HostError, match="in use"):
        vm.vsock_listen(6002)
    vm.vsock_listen(6002).close()


def test_the_guests_address(vm: Machine) -> None:
    number = int(guest(vm, "cid").communicate()[0])
    directory = Path(vm.plan.runtime)
    if (directory / "vsock.cid").exists():
        assert int((directory / "vsock.cid").read_text()) == number
    else:
        assert vm.plan.vsock is not None
        assert vm.plan.vsock.cid == number


def test_the_command(vm: Machine, server: GuestProcess) -> None:
    """From another process; input's end is passed on, and the answer waited for."""
    hostel = [sys.executable, "-m", "hostel", "vsock"]
    data = os.urandom(1 << 20)
    done = subprocess.run(
        [*hostel, "vsock-test", str(PORT)], input=data, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == expected(data)
    assert done.stderr == b""
    for words, message in (
        (["vsock-test", "5999"], b"no connection to vsock port 5999"),
        (["no-such-machine", "1"], b"no machine named no-such-machine runs"),
    ):
        failed = subprocess.run([*hostel, *words], capture_output=True, timeout=60, check=False)
        assert failed.returncode == 125
        assert message in failed.stderr


def test_a_guest_that_restarts(vm: Machine) -> None:
    """Last in this module: the machine comes up anew, with its sockets."""
    with pytest.raises(MachineStopped, match="rebooted"):
        vm.exec(["sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"], user="root")
    again = guest(vm, "digest", 5002)
    assert again.read() == ("stdout", b"listening\n")
    assert vm.restarts == 1
    assert answer(vm.vsock_connect(5002)) == expected(b"")
    again.signal(9)
