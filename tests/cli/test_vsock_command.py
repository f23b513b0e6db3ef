"""``hostel vsock`` against a machine's directory in which a program of the test plays the guest."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from hostel.host.runtime import Runtime
from hostel.host.vsock import main_path

PATIENCE = 20
Serve = Callable[[socket.socket], None]


@pytest.fixture
def machine() -> Iterator[Runtime]:
    with Runtime("played") as runtime:
        yield runtime


def command(
    runtime: Runtime, serve: Serve, *, stdout: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """It runs, connected to ``serve`` on a thread."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(main_path(runtime.path)))
    listener.listen()

    def accept() -> None:
        with listener, listener.accept()[0] as sock:
            assert sock.recv(100) == b"CONNECT 5000\n"
            sock.sendall(b"OK 1\n")
            with contextlib.suppress(BrokenPipeError):
                serve(sock)

    threading.Thread(target=accept).start()
    return subprocess.Popen(
        [sys.executable, "-m", "hostel", "vsock", runtime.name, "5000"],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def echo(sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


def test_more_than_fits_into_either_direction(machine: Runtime) -> None:
    data = os.urandom(5 << 20)
    with command(machine, echo) as process:
        out, err = process.communicate(data, PATIENCE)
    assert (out == data, err, process.returncode) == (True, b"", 0)


def test_the_end_of_input_is_passed_on_and_the_answer_waited_for(machine: Runtime) -> None:
    def serve(sock: socket.socket) -> None:
        asked = b"".join(iter(lambda: sock.recv(100), b""))
        sock.sendall(asked.upper())

    with command(machine, serve) as process:
        assert process.communicate(b"question", PATIENCE)[0] == b"QUESTION"
    assert process.returncode == 0


def test_it_ends_with_the_guests_program(machine: Runtime) -> None:
    """Though its own input goes on."""
    with command(machine, lambda sock: sock.sendall(b"that was all")) as process:
        assert process.stdout
        assert process.stdout.read() == b"that was all"
        assert process.wait(PATIENCE) == 0


def test_the_guest_ends_its_half_first(machine: Runtime) -> None:
    heard: list[bytes] = []
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"go on")
        sock.shutdown(socket.SHUT_WR)
        heard.append(b"".join(iter(lambda: sock.recv(100), b"")))
        done.set()

    with command(machine, serve) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.read(5) == b"go on"
        process.stdin.write(b"and it went on")
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    assert done.wait(PATIENCE)
    assert heard == [b"and it went on"]


def test_nobody_reads_the_output(machine: Runtime) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with command(machine, lambda sock: sock.sendall(bytes(1 << 20)), stdout=theirs) as process:
        os.close(theirs)
        assert process.wait(PATIENCE) == 128 + 13


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody", "1"], b"no machine named nobody runs"),
        (["../played", "1"], b"no machine named ../played runs"),
        (["played", "1"], b"the machine has no vsock"),
        (["played", "-1"], b"a vsock port is 0 to 4294967294"),
        (["played", "4294967295"], b"a vsock port is 0 to 4294967294"),
    ],
)
def test_what_cannot_be(machine: Runtime, words: list[str], message: bytes) -> None:
    argv = [sys.executable, "-m", "hostel", "vsock", *words]
    result = subprocess.run(argv, capture_output=True, timeout=PATIENCE, check=False)
    assert result.returncode == 125
    assert message in result.stderr


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("words", "plane"),
    [
        (["--vsock=python", "true"], "python"),
        (["--vsock=none", "true"], None),
        (["--vsock", "true"], ("python", "vhost")),
        (["--vsock", "--cpus", "2", "--", "true", "--vsock"], ("python", "vhost")),
        (["true", "--vsock"], None),
    ],
)
def test_the_option(words: list[str], plane: str | tuple[str, ...] | None) -> None:
    """Its value stands behind an equals sign or not at all: the next word is never its."""
    argv = [
        sys.executable,
        "-m",
        "hostel",
        "run",
        "--dry-run",
        "--json",
        "--engine",
        "qemu",
        *words,
    ]
    result = subprocess.run(argv, capture_output=True, timeout=PATIENCE, check=True)
    found = json.loads(result.stdout).get("vsock")
    assert found in plane if isinstance(plane, tuple) else found == plane
