"""``hostel boot`` with small kernels of our own, on engines kvm and soft."""

from __future__ import annotations

import pytest

from cli.hostel_command import Hostel
from hostel.soft import mini


@pytest.mark.parametrize("name", ["hello", "sector"])
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(("--engine", "kvm"), marks=pytest.mark.kvm, id="kvm"),
        pytest.param(("--engine", "soft"), id="soft"),
    ],
)
def test_a_mini_guest(hostel: Hostel, engine: tuple[str, ...], name: str) -> None:
    """Also where KVM interprets the guest's kernel: that is no place for Linux, but this is none."""
    if "soft" in engine:
        pytest.importorskip("unicorn", reason="the extra `soft` is not installed")
    result = hostel("boot", *engine, "-q", "--timeout", "60", "--kernel", str(mini.image(name)))
    assert (result.returncode, result.stderr) == (1, b"")
    assert result.stdout.decode() == mini.guest(name).console


@pytest.mark.qemu
def test_engine_qemu_boots_no_sectors(hostel: Hostel) -> None:
    result = hostel("boot", "-q", "--engine", "qemu", "--kernel", str(mini.image("sector")))
    assert (result.returncode, result.stdout) == (125, b"")
    assert result.stderr == b"hostel: engine qemu boots no boot sectors; use --engine kvm or soft\n"
