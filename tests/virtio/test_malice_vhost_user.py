"""Rings and registers of malicious drivers whose devices are served by another process: that one may end, the
VMM may not, nor does anything else in it notice."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.errors import GuestError, HelperError
from hostel.memory import GuestMemory
from hostel.virtio.fs import VirtioFs
from hostel.virtio.fuse import FileSystem, Session, Settings, serve
from hostel.virtio.rng import Rng
from virtio.malice import REGISTERS, RINGS
from virtio.rig import Rig, eventually
from virtio.subjects import BOUND
from virtio.test_vhost_user import DAEMON, Share

SIZE, LOW, HIGH = 32 << 20, 28 << 20, 1 << 32
GUARDS = ((0, 1 << 20), (26 << 20, 2 << 20), (HIGH, SIZE - LOW))
REQUESTS = 1


class Ours:
    """Our file server, in a thread: what it ends with is seen here."""

    def __init__(self, rig: Rig, transport: str, folder: Path) -> None:
        root = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        self.session = Session(FileSystem(root, Settings(), memory=SIZE, descriptors=64))
        self.ended: list[BaseException] = []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            self.device = VirtioFs(rig.loop, "tag", folder / "socket")
            self.driver = rig.seat(transport, self.device)
            connection, _ = listener.accept()
        self._thread = threading.Thread(target=self._run, args=(connection,))
        self._thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            serve(connection, self.session)
        except BaseException as error:
            self.ended.append(error)
        finally:
            self.session.close()

    def start(self) -> None:
        self.driver.start()

    def close(self) -> None:
        """After the VMM's end has been closed."""
        self._thread.join()
        assert isinstance(self.ended[0], GuestError) if self.ended else True


class QemusOwn(Share):
    def __init__(self, rig: Rig, transport: str, folder: Path) -> None:
        if not DAEMON.exists():
            pytest.skip("no virtiofsd of QEMU's")
        super().__init__(rig, transport, folder, ours=False)

    def start(self) -> None:
        self.mount()


SERVERS = pytest.mark.parametrize("server", [Ours, QemusOwn])
Server = type[Ours] | type[QemusOwn]


@contextlib.contextmanager
def attacked(server: Server, transport: str, folder: Path, case: str) -> Iterator[Ours | QemusOwn]:
    """A server of its own for each case, and a bystander; what is looked at after the case."""
    folder.mkdir()
    rig = Rig(GuestMemory(SIZE, low_end=LOW, high_start=HIGH))
    bystander = rig.seat(transport, Rng(rig.loop))
    bystander.start(base=24 << 20, heap=1 << 16)
    for start, size in GUARDS:
        rig.memory.write(start, b"\xa5" * size)
    served = server(rig, transport, folder)
    yield served
    begun = time.monotonic()
    assert bystander.request(0, [], [32]).written == 32, case
    served.driver.set_status(0)
    assert served.driver.get_status() == 0, case
    assert time.monotonic() - begun < BOUND, case
    assert not rig.errors, case
    for start, size in GUARDS:
        assert rig.memory.view(start, size) == b"\xa5" * size, case
    rig.close()
    served.close()


@SERVERS
def test_rings(server: Server, tmp_path: Path) -> None:
    for number, (case, (_, play)) in enumerate(RINGS.items()):
        with attacked(server, "pci", tmp_path / str(number), case) as served:
            served.start()
            play(served.driver.queues[REQUESTS])
            served.driver.kick(REQUESTS)
            if server is Ours:
                assert eventually(lambda: served.driver.needs_reset), case


@SERVERS
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_registers(server: Server, transport: str, tmp_path: Path) -> None:
    for number, (case, play) in enumerate(REGISTERS.items()):
        with attacked(server, transport, tmp_path / str(number), case) as served:
            with contextlib.suppress(TimeoutError):  # of who waits for a device that has failed
                play(served.driver)
            fault = served.device.fault
            assert isinstance(fault, GuestError | HelperError | None), (case, fault)
