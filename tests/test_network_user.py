"""``--net user``: an ordinary user's machine reaches the world and is reached, with no privileges at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.namespaces import HOST, OUTSIDE, Namespace, missing, world
from guests.stranger import STRANGER, Stranger

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
    pytest.mark.timeout(240),
]

ASK = f"""
import os, socket
asking = socket.create_connection(("{OUTSIDE}", 7), 20)
asking.sendall(b"who am I?")
print(os.getuid(), asking.recv(99).decode(), flush=True)
listening = socket.create_server(("", 8000))
print("ready", flush=True)
connection, _ = listening.accept()
connection.sendall(connection.recv(99)[::-1])
"""


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    """Not in pytest's own folder: each session of root's closes that to others."""
    with tempfile.TemporaryDirectory(prefix="hostel-stranger-") as folder:
        yield Stranger(Path(folder))


@contextlib.contextmanager
def answering(where: Namespace) -> Iterator[None]:
    """Tells the first who speaks there its address."""
    with where.socket() as listening:
        listening.bind((OUTSIDE, 7))
        listening.listen()
        listening.settimeout(100)

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, peer = listening.accept()
                with connection:
                    connection.recv(99)
                    connection.sendall(peer[0].encode())

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


def test_an_ordinary_user(stranger: Stranger) -> None:
    """It is what such a user gets without asking, and a port of the host's leads to the guest's."""
    arguments = (
        "run",
        "-q",
        "--engine",
        "qemu",
        "-m",
        "256M",
        "-p",
        "8080:8000",
        "python3",
        "-c",
        ASK,
    )
    with world() as (_, outside), answering(outside), stranger.start(*arguments) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().decode() == f"{STRANGER} {HOST}\n"
            assert process.stdout.readline() == b"ready\n"
            with outside.socket() as asking:
                asking.settimeout(20)
                asking.connect((HOST, 8080))
                asking.sendall(b"hello")
                assert asking.recv(99) == b"olleh"
            assert process.wait(30) == 0
        finally:
            process.kill()
            print(process.stderr.read() if process.stderr else "")


def test_what_an_ordinary_user_may_not(stranger: Stranger) -> None:
    result = stranger.run("run", "-q", "--engine", "qemu", "--net", "nat", "true")
    assert result.returncode == 125
    assert b"needs root" in result.stderr
    assert b"--net user" in result.stderr


def test_an_ordinary_user_without_a_network(stranger: Stranger) -> None:
    """Nothing to speak from: the machine runs all the same, and says so to those who ask."""
    arguments = ("--verbose", "--dry-run", "--engine", "qemu", "true")
    with Namespace() as lonely, lonely.inside():
        result = stranger.run("run", *arguments)
    assert result.returncode == 0, result.stderr
    assert b"network   none\n" in result.stdout
    assert b"no default route" in result.stderr
