"""The vhost-user plane of a NIC: on DPDK's testpmd, which sends frames back, and on a scripted backend."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.abi import vhost_user as abi
from hostel.abi import virtio
from hostel.abi import virtio_net as net_abi
from hostel.errors import HelperError, HostelError
from hostel.virtio.net import Net
from hostel.virtio.net_port import HEADER
from hostel.virtio.net_vhost_user import VhostUserPlane
from virtio.netns import GUEST_MAC, HOST_MAC, frame
from virtio.rig import EVENT_INDEX, Driver, Rig, eventually

RX, TX = 0, 1
MERGED = 1 << net_abi.F_MRG_RXBUF
CONTROL, MQ = 1 << net_abi.F_CTRL_VQ, 1 << net_abi.F_MQ


def seat(rig: Rig, path: Path, *, pairs: int = 1, mtu: int = 0, transport: str = "pci") -> Driver:
    plane = VhostUserPlane(rig.loop, path, name="net0", mtu=mtu)
    return rig.seat(transport, Net(rig.loop, plane, mac=GUEST_MAC, mtu=mtu, pairs=pairs))


# --- testpmd -----------------------------------------------------------------------------------


class TestPmd:
    """A real switch in user space: here it swaps the addresses of each frame and sends it back."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / "switch.sock"
        self.path.unlink(missing_ok=True)
        # It dies with us, however we end.
        command = ["setpriv", "--pdeathsig", "KILL", "dpdk-testpmd", "--no-huge", "-m", "64"]
        command += ["-l", f"0-{min((os.cpu_count() or 1) - 1, 1)}", "--no-pci", "--no-telemetry"]
        command += ["--vdev", f"net_vhost0,iface={self.path},queues=2", "--", "--auto-start"]
        command += ["--forward-mode=macswap", "--no-mlockall", "--total-num-mbufs=2048"]
        command += ["--rxq=2", "--txq=2", "--stats-period=1000"]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        started = "Port statistics"
        assert eventually(lambda: started in (folder / "log").read_text(errors="replace")), (
            folder / "log"
        ).read_text(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestPmd]:
    if shutil.which("dpdk-testpmd") is None:
        pytest.skip("dpdk-testpmd is not installed (Debian: dpdk-dev)")
    switch = TestPmd(tmp_path_factory.mktemp("dpdk"))
    yield switch
    switch.close()


RARP = b"\x80\x35"


def echo(driver: Driver, payload: bytes, queue: int = TX) -> list[bytes]:
    """It comes back on any receive queue, addresses swapped. What came before it is the result."""
    driver.queues[queue].add([bytes(HEADER) + frame(payload, to=HOST_MAC, sender=GUEST_MAC)])
    driver.kick(queue)
    received = [index for index in driver.queues if index % 2 == 0 and index < 4]
    back: list[bytes] = []

    def came() -> bool:
        for index in received:
            back.extend(done.data[HEADER:] for done in driver.queues[index].completed())
        return frame(payload) in back

    assert eventually(came), (driver.device.fault, back)
    assert back[-1] == frame(payload)
    return back[:-1]


def offer(driver: Driver, queue: int = RX, count: int = 8) -> None:
    for _ in range(count):
        driver.queues[queue].add([], [2048])
    driver.kick(queue)


@pytest.mark.parametrize("transport", ["pci", "mmio"])
@pytest.mark.parametrize("features", [0, MERGED | EVENT_INDEX], ids=["0", "merged"])
def test_frames_come_back(rig: Rig, switch: TestPmd, transport: str, features: int) -> None:
    driver = seat(rig, switch.path, transport=transport)
    for _ in range(2):
        driver.start(features)
        offer(driver)
        for payload in (b"one".ljust(50), bytes(range(256)) * 5):
            echo(driver, payload)
        assert driver.device.statistics()["running"] == 1
        driver.set_status(0)
    assert not driver.device.fault


def test_saving_goes_on_where_it_was(rig: Rig, switch: TestPmd) -> None:
    driver = seat(rig, switch.path)
    driver.start()
    offer(driver)
    echo(driver, b"before".ljust(50))
    rings = {index: tuple(at) for index, *at in driver.device.save()["queues"]}
    assert rings == {RX: (1, 1), TX: (1, 1)}
    before = echo(driver, b"after".ljust(50))
    # This driver did not take GUEST_ANNOUNCE: the switch announced it, and got that back as well.
    assert [data[12:14] for data in before] == [RARP]


def test_several_queues(rig: Rig, switch: TestPmd) -> None:
    driver = seat(rig, switch.path, pairs=2)
    driver.start(CONTROL | MQ)
    assert driver.device.statistics()["running"] == 1
    command = net_abi.CTRL_HDR.pack(net_abi.CTRL_MQ, net_abi.CTRL_MQ_VQ_PAIRS_SET)
    assert driver.request(4, [command + b"\2\0"], [1]).data == b"\0"
    assert driver.device.statistics()["running"] == 2
    for queue in (0, 2):
        offer(driver, queue)
    for queue in (1, 3):
        echo(driver, b"by queue %d".ljust(50) % queue, queue)


def test_a_switch_that_dies_and_comes_back(rig: Rig, switch: TestPmd, tmp_path: Path) -> None:
    mortal = TestPmd(tmp_path)
    try:
        driver = seat(rig, mortal.path)
        faults: list[HostelError] = []
        driver.device.on_fault = lambda device, error: faults.append(error)
        driver.start()
        offer(driver)
        mortal.close()
        assert eventually(lambda: driver.needs_reset)
        assert "hung up" in str(faults[0])
        driver.set_status(0)
        assert driver.get_status() == 0
        mortal = TestPmd(tmp_path)
        driver.start()
        offer(driver)
        echo(driver, b"as if nothing had been".ljust(50))
    finally:
        mortal.close()


# --- A script ----------------------------------------------------------------------------------

OFFERED = MERGED | sum(
    1 << bit
    for bit in (
        *(virtio.F_VERSION_1, virtio.RING_F_INDIRECT_DESC),
        *(abi.F_PROTOCOL_FEATURES, net_abi.F_CSUM),
    )
)


class Script(threading.Thread):
    """Answers as a backend does, and keeps what it is told."""

    def __init__(self, path: Path, *, protocol: int, pairs: int = 1) -> None:
        super().__init__(daemon=True)
        self.protocol, self.pairs = protocol, pairs
        self.seen: list[tuple[int, bytes]] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        self.start()

    def run(self) -> None:
        sock, _ = self.server.accept()
        self.server.close()
        with sock:
            while True:
                header, fds, _, _ = socket.recv_fds(sock, abi.HEADER.size, 8)
                for fd in fds:
                    os.close(fd)
                if not header:
                    return
                request, flags, size = abi.HEADER.unpack(header)
                payload = sock.recv(size, socket.MSG_WAITALL) if size else b""
                self.seen.append((request, payload))
                if (answer := self._answer(request, flags, payload)) is not None:
                    reply = abi.HEADER.pack(request, abi.VERSION | abi.FLAG_REPLY, len(answer))
                    sock.sendall(reply + answer)

    def _answer(self, request: int, flags: int, payload: bytes) -> bytes | None:
        if request == abi.GET_VRING_BASE:
            return payload[:4] + (3).to_bytes(4, "little")
        numbers = {
            abi.GET_FEATURES: OFFERED,
            abi.GET_PROTOCOL_FEATURES: self.protocol,
            abi.GET_QUEUE_NUM: self.pairs,
        }
        if request in numbers:
            return abi.U64.pack(numbers[request])
        return abi.U64.pack(0) if flags & abi.FLAG_NEED_REPLY else None

    def told(self, request: int) -> list[bytes]:
        return [payload for kind, payload in self.seen if kind == request]


ALL = sum(
    1 << bit
    for bit in (
        *(abi.PROTOCOL_F_MQ, abi.PROTOCOL_F_RARP, abi.PROTOCOL_F_REPLY_ACK),
        *(abi.PROTOCOL_F_NET_MTU, abi.PROTOCOL_F_STATUS),
    )
)


def test_what_a_backend_that_knows_all_is_told(rig: Rig, tmp_path: Path) -> None:
    script = Script(tmp_path / "s", protocol=ALL, pairs=2)
    driver = seat(rig, tmp_path / "s", pairs=2, mtu=9000)
    driver.start(CONTROL | MQ)
    assert driver.config(10, 2) == 9000
    assert script.told(abi.NET_SET_MTU) == [abi.U64.pack(9000)]
    assert script.told(abi.SET_STATUS) == [abi.U64.pack(15)]
    (features,) = script.told(abi.SET_FEATURES)
    assert abi.U64.unpack(features)[0] & ~OFFERED == 0, "nothing that is ours alone"
    enabled = [abi.VRING_STATE.unpack(payload) for payload in script.told(abi.SET_VRING_ENABLE)]
    assert enabled == [(0, 1), (1, 1)]
    assert not script.told(abi.SEND_RARP), "a new guest says itself who it is"
    state = driver.seat.save()
    driver.seat.load(state)
    assert script.told(abi.SEND_RARP)[-1] == abi.U64.pack(int.from_bytes(GUEST_MAC, "little"))
    assert script.told(abi.SET_VRING_BASE)[-1] == abi.VRING_STATE.pack(3, 3)
    driver.set_status(0)
    assert script.told(abi.SET_STATUS)[-1] == abi.U64.pack(0)


def test_a_backend_that_knows_nothing_more(rig: Rig, tmp_path: Path) -> None:
    script = Script(tmp_path / "s", protocol=0)
    driver = seat(rig, tmp_path / "s", mtu=9000)
    driver.start()
    driver.set_status(0)
    for request in (abi.NET_SET_MTU, abi.SET_STATUS, abi.SEND_RARP, abi.GET_QUEUE_NUM):
        assert not script.told(request)
    assert not driver.read_features() >> virtio.RING_F_EVENT_IDX & 1, "what it does not offer"


def test_more_pairs_than_it_has(rig: Rig, tmp_path: Path) -> None:
    Script(tmp_path / "s", protocol=ALL, pairs=1)
    driver = seat(rig, tmp_path / "s", pairs=2)
    faults: list[HostelError] = []
    driver.device.on_fault = lambda device, error: faults.append(error)
    driver.set_status(1)
    driver.set_status(3)
    assert driver.needs_reset
    assert "has 1 pairs of queues, not 2" in str(faults[0])


def test_a_ring_outside_memory_is_not_told(rig: Rig, tmp_path: Path) -> None:
    script = Script(tmp_path / "s", protocol=ALL)
    driver = seat(rig, tmp_path / "s")
    driver.start()
    driver.negotiate()
    before = len(script.told(abi.SET_VRING_ADDR))
    driver.queues[TX].avail = 1 << 45
    for index in (RX, TX):
        driver.set_up(index, driver.queues[index])
    driver.set_status(15)
    assert driver.needs_reset
    assert len(script.told(abi.SET_VRING_ADDR)) == before


def test_nobody_listens(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(HelperError, match="cannot be reached"):
        VhostUserPlane(rig.loop, tmp_path / "nothing", name="net0")
