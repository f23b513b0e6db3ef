"""What is fuzzed. A target is made once and takes any bytes, again and again; what it raises is a finding.

::

    queue      the rings alone: chains, indexes, notification
    console, rng, block, net, vsock, balloon    a device on virtio-pci, and the host's side of it
    fs         the FUSE server, over a directory with links that lead out of it
    agent      the host's end of the agent's protocol

Nothing leaves the folder that a target is given: devices have no network, files are bounded (``bounded``),
and what lies beside the folder's ``given`` is looked at after each run.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from fuzz.programs import Input, Player
from guests.fuse_session import ROOT, FuseSession
from hostel.abi import fuse
from hostel.abi import virtio as abi
from hostel.errors import GuestError, HostelError, QueueError
from hostel.guest.client import AgentClient
from hostel.guest.files import copy_out
from hostel.memory import GuestMemory
from hostel.virtio.fuse import FuseFault
from hostel.virtio.mock import DriverQueue
from hostel.virtio.queue import Queue
from virtio.rig import Rig
from virtio.subjects import SUBJECTS, Subject

LARGEST_FILE = 16 << 20
SECRET = b"a secret of the host's"


class Target(Protocol):
    def run(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class QueueTarget:
    """Bytes are the rings and the heap; the device takes chains, gives them back, and asks for events."""

    SIZE = 8

    def __init__(self, folder: Path) -> None:
        self._memory = GuestMemory(1 << 16)

    def run(self, data: bytes) -> None:
        start = Input(data)
        features = start.number() << abi.RING_F_INDIRECT_DESC & 3 << abi.RING_F_INDIRECT_DESC
        driver = DriverQueue(self._memory, 0, self.SIZE, heap=1 << 14)
        queue = Queue(
            self._memory,
            self.SIZE,
            desc=driver.desc,
            avail=driver.avail,
            used=driver.used,
            features=features,
        )
        self._memory.write(0, start.bytes(256))
        self._memory.write(driver.heap, start.bytes(512))
        driver.set_available_index(start.number() & 15)
        try:
            for _ in range(2 * self.SIZE):
                if (chain := queue.pop()) is None:
                    break
                for buffer in (*chain.readable, *chain.writable):
                    assert 0 < len(buffer) <= self._memory.size
                if start.number() & 1:
                    queue.unpop()
                else:
                    queue.push(chain, sum(map(len, chain.writable)))
                queue.needs_interrupt()
                queue.enable_notifications()
        except QueueError:
            pass
        finally:
            queue.close()

    def close(self) -> None:
        self._memory.close()


class DeviceTarget:
    """A device and its driver's program (``programs.py``)."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject = subject
        self._stack = ExitStack()
        self._rig = Rig()
        self._stack.enter_context(bounded())
        given = folder / "given"
        given.mkdir()
        self._made = subject.make(self._rig, given, self._stack)
        self._driver = self._rig.on_pci(self._made.device)
        self._player = Player(self._driver, self._start, self._made.speak, self._settle)
        self._runs = 0

    def run(self, data: bytes) -> None:
        self._player.play(data)
        assert not self._rig.errors, self._rig.errors
        fault = self._made.device.fault
        assert isinstance(fault, GuestError | None), f"{type(fault).__name__}: {fault}"
        self._runs += 1
        if self._runs % 64 == 0:
            self._start()
            self._made.works(self._driver)

    def close(self) -> None:
        self._rig.close()
        self._stack.close()

    def _start(self) -> None:
        self._driver.start(self._subject.features, size=8, heap=1 << 17)

    def _settle(self) -> None:
        loop = getattr(self._made.device, "loop", self._rig.loop)
        loop.run_sync(lambda: None)
        self._rig.loop.run_sync(lambda: None)


class FsTarget:
    """Requests, each with an operation, a node and a body; handles and nodes that were given out are used
    again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "beside").mkdir()
        (folder / "beside/secret").write_bytes(SECRET)
        self._tree = folder / "given"
        self._tree.mkdir()
        self._umask = os.umask(0o022)
        self._bound = bounded()
        self._bound.__enter__()

    def run(self, data: bytes) -> None:
        self._plant()
        program = Input(data)
        with FuseSession(self._tree, xattr=True) as session:
            given = [ROOT]
            for _ in range(32):
                if not program:
                    break
                answer = self._request(session, program, given)
                assert SECRET not in answer
                if len(answer) >= 24 and len(given) < 64:
                    given.append(struct.unpack_from("<Q", answer, 16)[0])
        beside = self._folder / "beside"
        assert sorted(os.listdir(self._folder)) == ["beside", "given"]
        assert os.listdir(beside) == ["secret"]
        assert (beside / "secret").read_bytes() == SECRET

    def _request(self, session: FuseSession, program: Input, given: list[int]) -> bytes:
        opcode, flags = program.number() & 63, program.number()
        node = given[program.number() % len(given)] if flags & 1 else program.number(8)
        body = program.bytes(program.number(2) & 0x3FF)
        if flags & 2:  # most arguments begin with a handle or a node
            body = struct.pack("<Q", given[program.number() % len(given)]) + body[8:]
        header = session.header(opcode, node, len(body) + program.number() * (flags >> 2 & 1))
        room = [fuse.OUT_HEADER.size, program.number(2)]
        try:
            return session.send([header, *([body] if body else [])], room if room[1] else room[:1])
        except FuseFault:
            return b""

    def _plant(self) -> None:
        with contextlib.suppress(OSError):
            (self._tree / "file").write_bytes(b"content")
        for name, leads_to in (("out", "../beside"), ("root", "/proc/self/root")):
            with contextlib.suppress(OSError):
                (self._tree / name).symlink_to(leads_to)

    def close(self) -> None:
        self._bound.__exit__(None, None, None)
        os.umask(self._umask)


class AgentTarget:
    """The bytes are what the guest's agent sends, while a command runs and a tree is copied out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "given").mkdir()
        self._bound = bounded()
        self._bound.__enter__()
        self._crashes: list[str] = []

    def run(self, data: bytes) -> None:
        before = threading.excepthook
        threading.excepthook = lambda at: self._crashes.append(repr(at.exc_value))
        ours, theirs = socket.socketpair()
        client = AgentClient(ours)
        try:
            with contextlib.suppress(HostelError):
                process = client.spawn(["x"], env={}, cwd="/", user="root")
                writer = threading.Thread(target=_send_and_end, args=(theirs, data))
                writer.start()
                with contextlib.suppress(HostelError):
                    copy_out(client, "/tree", self._folder / "given" / "copy")
                with contextlib.suppress(HostelError):
                    process.communicate(b"")
                writer.join()
        finally:
            client.close()
            theirs.close()
            threading.excepthook = before
        assert not self._crashes
        assert os.listdir(self._folder) == ["given"]

    def close(self) -> None:
        self._bound.__exit__(None, None, None)


def _send_and_end(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No file of this process grows beyond ``LARGEST_FILE``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DEVICES = {subject.name: subject for subject in SUBJECTS}
NAMES = ("queue", *DEVICES, "fs", "agent")


def make(name: str, folder: Path) -> Target:
    """``folder`` is empty, and the target's own."""
    if name in DEVICES:
        return DeviceTarget(DEVICES[name], folder)
    if name == "queue":
        return QueueTarget(folder)
    return FsTarget(folder) if name == "fs" else AgentTarget(folder)
