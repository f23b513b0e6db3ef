"""``hostel boot``: a raw serial console, with and without a terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cli.hostel_command import HOSTEL, Hostel
from cli.typist import person
from guests.kernels import compile_kernel

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Echoes what is typed; x, o and f are ways to end."""
    path = tmp_path_factory.mktemp("kernel") / "keys"
    path.write_bytes(compile_kernel("keys", bits=32))
    return str(path)


@pytest.mark.parametrize(("key", "code"), [(b"x", 0x21 << 1 | 1), (b"o", 0)])
def test_without_a_terminal(hostel: Hostel, kernel: str, key: bytes, code: int) -> None:
    """Ctrl-] is a key like others there."""
    options = ["-q", "--engine", "qemu", "-m", "32M", "--timeout", "60"]
    result = hostel("boot", *options, "--kernel", kernel, input=b"ab\x1dc" + key)
    assert (result.returncode, result.stdout) == (code, b"keys>ab\x1dc" + key)
    assert result.stderr == b""


@pytest.mark.nat
def test_a_network_for_any_kernel(hostel: Hostel, kernel: str) -> None:
    """Made and attached; what the kernel makes of it is its own affair."""
    options = ["--verbose", "--engine", "qemu", "-m", "32M", "--timeout", "60", "--net", "nat"]
    result = hostel("boot", *options, "--kernel", kernel, input=b"o")
    assert (result.returncode, result.stdout) == (0, b"keys>o")
    assert b"network: virtio " in result.stderr
    result = hostel("boot", "--engine", "qemu", "--kernel", kernel, "--net", "tap=nosuch")
    assert (result.returncode, result.stdout) == (125, b"")
    assert b"nosuch" in result.stderr


def test_end_of_input_is_not_the_end_but_time_is(hostel: Hostel, kernel: str) -> None:
    options = ["-q", "--engine", "qemu", "-m", "32M", "--timeout", "3"]
    result = hostel("boot", *options, "--kernel", kernel, input=b"a")
    assert (result.returncode, result.stdout) == (124, b"keys>a")
    assert result.stderr == b"hostel: the machine's time is over (--timeout)\n"


def test_person_leaves_by_the_escape_key(kernel: str) -> None:
    with person("boot", "--engine", "qemu", "-m", "32M", "--kernel", kernel) as someone:
        someone.expect(b"Ctrl-] ends the machine\r\n")
        someone.expect(b"keys>")
        assert someone.is_raw
        someone.type(b"\x03\x04a")
        someone.expect(b"\x03\x04a")
        someone.type(b"b\x1d")
        assert someone.end() == 0
        assert someone.restored


def test_triple_fault(kernel: str) -> None:
    with person("boot", "--engine", "qemu", "-m", "32M", "--kernel", kernel) as someone:
        someone.expect(b"keys>")
        someone.type(b"f")
        someone.expect(b"the guest crashed: triple fault")
        assert someone.end() == 125
        assert someone.restored


def test_reader_that_leaves(kernel: str) -> None:
    command = f"{HOSTEL} boot -q --engine qemu -m 32M --kernel {kernel}"
    script = f"{{ sleep 4; echo a; sleep 4; }} | {command} | head -c 1; echo ${{PIPESTATUS[1]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, check=False)
    assert (result.stdout, result.stderr) == (b"k141\n", b"")


def test_kernels_that_are_none(hostel: Hostel, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a kernel\n")
    result = hostel("boot", "-q", "--engine", "qemu", "--kernel", str(text))
    assert (result.returncode, result.stdout) == (125, b"")
    assert result.stderr.count(b"\n") == 1
    assert b"a bug" not in result.stderr


def test_an_elf_that_qemu_cannot_enter(hostel: Hostel, tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(compile_kernel("linux", bits=64))
    result = hostel("boot", "-q", "--engine", "qemu", "--kernel", str(path))
    assert (result.returncode, result.stdout) == (125, b"")
    told = b"has no PVH note, by which alone engine qemu enters an ELF; use --engine kvm, or"
    assert told in result.stderr
    assert result.stderr.count(b"\n") == 1


def test_linux_without_a_root_panics(hostel: Hostel) -> None:
    """The default kernel of this host; its console is on standard output, the reason on the other."""
    result = hostel("boot", "-q", "--engine", "qemu", "--timeout", "100")
    assert result.returncode == 125, result.stderr
    assert b"Linux version" in result.stdout
    assert b"panic" in result.stderr
    assert result.stderr.count(b"\n") == 1
