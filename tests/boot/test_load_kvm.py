"""Tiny kernels on the real /dev/kvm: what each boot protocol hands over, read back by the guest itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import kernels
from hostel.boot.acpi import AcpiConfig, write_tables
from hostel.boot.load import load_kernel
from hostel.hypervisor import PioExit
from hostel.kvm import System
from hostel.memory import GuestMemory
from hostel.vmm import layout

pytestmark = pytest.mark.kvm
SIZE = 32 << 20
MAP = ["0 9fc00 1", "9fc00 400 2", "e0000 10000 3", "100000 1f00000 1", "e0000000 100000 2"]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(SIZE) as memory:
        yield memory


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd"
    path.write_bytes(b"\x78\x56\x34\x12" + bytes(5000))
    return path


def boot(
    memory: GuestMemory, data: bytes, path: Path, *, initrd: Path | None = None
) -> dict[str, str]:
    """What the kernel says; several ``map`` lines are joined."""
    path.write_bytes(data)
    rsdp = write_tables(memory, AcpiConfig(apic_ids=(0,)))
    entry = load_kernel(memory, path, cmdline="one two=3", initrd=initrd, rsdp=rsdp)
    with System() as system, system.create_vm() as vm:
        vm.set_identity_map_address(layout.HYPERVISOR_PAGES)
        vm.set_tss_address(layout.HYPERVISOR_PAGES + 0x1000)
        for slot, region in enumerate(memory.regions):
            vm.map(slot, region)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid(system.supported_cpuid())
            entry.apply(vcpu)
            said = b""
            while (
                isinstance(exit := vcpu.run(), PioExit) and exit.port == layout.PORT_DEBUG_CONSOLE
            ):
                said += bytes(exit.data)
    assert isinstance(exit, PioExit), (exit, said)
    assert exit.port == layout.PORT_DEBUG_EXIT
    facts: dict[str, str] = {}
    for line in said.decode().splitlines():
        name, value = line.split("=", 1)
        facts[name] = f"{facts[name]}, {value}" if name in facts else value
    return facts


def test_linux_is_entered_in_64_bit_mode(memory: GuestMemory, tmp_path: Path, initrd: Path) -> None:
    facts = boot(memory, kernels.compile_kernel("linux", bits=64), tmp_path / "k", initrd=initrd)
    assert facts == {
        "zero_page": f"{layout.BOOT_PARAMS:x}",
        "cs": "10",
        "ds": "18",
        "paging": "1",
        "data": "600d",
        "bss": "0",
        "boot_flag": "aa55",
        "header": "53726448",
        "loader": "ff",
        "cmdline": "one two=3",
        "rsdp": f"{layout.ACPI_ADDRESS:x}",
        "initrd_size": "138c",
        "initrd": "12345678",
        "initrd_end": "1fff38c",
        "seed_type": "9",
        "seed_size": "20",
        "map": ", ".join(MAP),
    }


def test_a_bzimage_is_unpacked_and_keeps_its_header(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = kernels.bzimage(gzip.compress(kernels.compile_kernel("linux", bits=64)))
    facts = boot(memory, image, tmp_path / "k")
    assert facts["cs"] == "10"
    assert facts["initrd_size"] == "0"
    assert len(list((tmp_path / "cache/hostel/vmlinux").iterdir())) == 1


def test_a_bzimage_that_we_cannot_unpack_is_entered_as_it_is(
    memory: GuestMemory, tmp_path: Path
) -> None:
    lzo = kernels.bzimage(b"\x89LZO\0" + bytes(64))
    code = bytearray(lzo)
    # At startup_64: mov $0xe9, %dx; then "a=b\n", byte by byte; then the debug exit.
    program = b"\x66\xba\xe9\x00" + b"".join(b"\xb0%c\xee" % char for char in b"a=b\n")
    code[1536 + 0x200 : 1536 + 0x200 + len(program) + 3] = program + b"\xe6\xf4\xf4"
    assert boot(memory, bytes(code), tmp_path / "k") == {"a": "b"}


def test_pvh_is_entered_with_paging_off(memory: GuestMemory, tmp_path: Path, initrd: Path) -> None:
    facts = boot(memory, kernels.compile_kernel("pvh", bits=32), tmp_path / "k", initrd=initrd)
    assert facts == {
        "magic": "336ec578",
        "cs": "10",
        "ds": "18",
        "paging": "0",
        "data": "600d",
        "bss": "0",
        "version": "1",
        "cmdline": "one two=3",
        "rsdp": f"{layout.ACPI_ADDRESS:x}",
        "modules": "1",
        "module": "12345678",
        "module_size": "138c",
        "map": ", ".join(MAP),
    }


@pytest.mark.parametrize("flat", [False, True])
def test_multiboot(memory: GuestMemory, tmp_path: Path, initrd: Path, flat: bool) -> None:
    data = kernels.compile_kernel("multiboot", bits=32, flat=flat)
    facts = boot(memory, data, tmp_path / "k", initrd=initrd)
    assert facts == {
        "magic": "2badb002",
        "cs": "10",
        "ds": "18",
        "paging": "0",
        "data": "600d",
        "bss": "0",
        "flags": "24d",
        "lower": "27f",
        "upper": "7c00",
        "cmdline": "one two=3",
        "loader": "hostel",
        "module": "12345678",
        "module_size": "138c",
        "module_string": "",
        "map": ", ".join(MAP),
    }


def test_multiboot_without_a_module(memory: GuestMemory, tmp_path: Path) -> None:
    facts = boot(memory, kernels.compile_kernel("multiboot", bits=32), tmp_path / "k")
    assert facts["flags"] == "245"
    assert "module" not in facts


def test_a_second_boot_in_used_memory_finds_its_bss_zero(
    memory: GuestMemory, tmp_path: Path
) -> None:
    """The kernel dirties its bss before it ends."""
    for _ in range(2):
        facts = boot(memory, kernels.compile_kernel("pvh", bits=32), tmp_path / "k")
        assert facts["bss"] == "0"
