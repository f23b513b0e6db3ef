"""The host's end of a machine's sockets, without a machine: paths, refusals, who serves."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostel.errors import GuestError, HostError, UserError
from hostel.host import vsock


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """With a plane that answers each request in the way its port says."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(vsock.main_path(tmp_path)))
    listener.listen()
    thread = threading.Thread(target=serve, args=(listener,))
    thread.start()
    yield tmp_path
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


def serve(listener: socket.socket) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            port = int(sock.recv(100).removeprefix(b"CONNECT "))
            if port == 1:
                sock.sendall(b"OK 1073741824\nfirst words")
            elif port == 2:
                sock.sendall(b"O")


def test_a_connection_begins_behind_the_answer(directory: Path) -> None:
    with vsock.connect(directory, 1) as sock:
        assert sock.gettimeout() is None
        assert sock.recv(100) == b"first words"


@pytest.mark.parametrize("port", [2, 3])
def test_a_refusal(directory: Path, port: int) -> None:
    with pytest.raises(GuestError, match=f"vsock port {port} of the guest"):
        vsock.connect(directory, port)


def test_a_machine_without_sockets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no vsock"):
        vsock.connect(tmp_path, 1)
    with pytest.raises(UserError, match="has no vsock"):
        vsock.listen(tmp_path, 1)


@pytest.mark.parametrize("port", [-1, (1 << 32) - 1, 1 << 40])
def test_what_is_no_port(tmp_path: Path, port: int) -> None:
    with pytest.raises(UserError, match="a vsock port is 0 to 4294967294"):
        vsock.listen(tmp_path, port)


def test_a_listener_takes_its_path_and_gives_it_back(directory: Path) -> None:
    path = Path(f"{vsock.main_path(directory)}_6000")
    with vsock.listen(directory, 6000) as listener:
        with pytest.raises(HostError, match="port 6000: Address already in use"):
            vsock.listen(directory, 6000)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            sock, _ = listener.accept()  # that of the second one's look
            sock.close()
            listener.accept()[0].close()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    vsock.listen(directory, 6000).close()
    assert not path.exists()


def test_a_path_without_room_for_a_port(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="too long for a socket"):
        vsock.main_path(tmp_path / ("x" * 100))


def test_who_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "VHOST", str(tmp_path / "vhost-vsock"))
    assert vsock.choose("auto")[0] == "python"
    assert "No such file" in vsock.choose("auto")[1]
    with pytest.raises(HostError, match="modprobe vhost_vsock"):
        vsock.choose("vhost")
    (tmp_path / "vhost-vsock").touch()
    assert vsock.choose("auto")[0] == vsock.choose("vhost")[0] == "vhost"
    assert vsock.choose("python") == ("python", "asked for")


def local() -> bool:
    """Whether this host's kernel connects AF_VSOCK sockets to itself (vsock_loopback)."""
    with socket.socket(socket.AF_VSOCK) as door, socket.socket(socket.AF_VSOCK) as sock:
        door.bind((socket.VMADDR_CID_ANY, 7999))
        door.listen()
        sock.settimeout(1)
        return sock.connect_ex((1, 7999)) == 0


@pytest.mark.skipif(
    not os.path.exists("/dev/vsock") or not local(), reason="no vsock_loopback on this host"
)
def test_only_its_own_machine_is_accepted(tmp_path: Path) -> None:
    vsock.publish_cid(tmp_path, 1)
    with vsock.listen(tmp_path, 7998) as listener, vsock.connect(tmp_path, 7998) as sock:
        listener.accept()[0].close()
        assert sock.recv(1) == b""
    vsock.publish_cid(tmp_path, 77)
    with vsock.listen(tmp_path, 7998) as listener:
        listener.settimeout(0.5)
        with socket.socket(socket.AF_VSOCK) as sock:
            sock.connect((1, 7998))
            with pytest.raises(TimeoutError):
                listener.accept()
            assert sock.recv(1) == b""
