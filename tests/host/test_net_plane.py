"""Which data plane a NIC gets, and what is said where a named one cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.errors import HostError, SpecError
from hostel.host import net_plane
from hostel.host.net_plane import Backend, Plane, choose
from hostel.spec import Limits, Nic, Rate


@pytest.fixture
def with_vhost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vhost-net").touch()
    monkeypatch.setattr(net_plane, "VHOST_NET", str(tmp_path / "vhost-net"))


@pytest.fixture
def without_vhost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(net_plane, "VHOST_NET", str(tmp_path / "vhost-net"))


LIMITED = Limits(bytes=Rate(1 << 20))


@pytest.mark.usefixtures("with_vhost")
@pytest.mark.parametrize(
    ("nic", "backend", "plane", "why"),
    [
        (Nic(), "tap", "vhost", "is there"),
        (Nic(), "macvtap", "vhost", "is there"),
        (Nic(), "stream", "python", "socket"),
        (Nic(), "vhost-user", "vhost-user", "another process"),
        (Nic(model="e1000"), "tap", "python", "emulated"),
        (Nic(limits=LIMITED), "tap", "python", "rate limits"),
        (Nic(plane="python"), "tap", "python", "asked for"),
        (Nic(plane="vhost"), "tap", "vhost", "asked for"),
    ],
)
def test_choice(nic: Nic, backend: Backend, plane: Plane, why: str) -> None:
    chosen, reason = choose(nic, backend)
    assert chosen == plane
    assert why in reason


@pytest.mark.usefixtures("without_vhost")
def test_a_host_without_vhost() -> None:
    plane, reason = choose(Nic(), "tap")
    assert plane == "python"
    assert "vhost-net: No such file" in reason
    with pytest.raises(HostError, match="modprobe vhost_net"):
        choose(Nic(plane="vhost"), "tap")


@pytest.mark.usefixtures("with_vhost")
@pytest.mark.parametrize(
    ("nic", "backend", "message"),
    [
        (Nic(plane="vhost"), "stream", "name python"),
        (Nic(plane="vhost", limits=LIMITED), "tap", "rate limits"),
        (Nic(plane="python"), "vhost-user", "name vhost-user"),
    ],
)
def test_what_cannot_be(nic: Nic, backend: Backend, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        choose(nic, backend)
