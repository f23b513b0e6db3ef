"""Loading: where things go in memory, what does not fit, and the state of the first vCPU."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import kernels
from hostel.abi import boot as abi
from hostel.abi import kvm
from hostel.boot.e820 import memory_map
from hostel.boot.entry import EntryState, initial_regs, initial_sregs
from hostel.boot.load import KernelLoad, load_kernel
from hostel.errors import ImageError, SpecError
from hostel.memory import GuestMemory, Region
from hostel.vmm import layout

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(32 * MIB) as memory:
        yield memory


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(kernels.elf(segments=((MIB, 2 * MIB, b"code"), (5 * MIB, 64, b"data"))))
    return path


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd"
    path.write_bytes(b"cpio" * 5000)
    return path


def setup_header(memory: GuestMemory) -> abi.SetupHeader:
    page = memory.read(layout.BOOT_PARAMS, abi.BOOT_PARAMS_SIZE)
    return abi.SetupHeader.from_buffer_copy(page, abi.SETUP_HEADER_OFFSET)


# --- places ---------------------------------------------------------------------------------------------


def test_segments_are_where_they_belong(memory: GuestMemory, kernel: Path) -> None:
    entry = load_kernel(memory, kernel)
    assert memory.read(MIB, 8) == b"code" + bytes(4)
    assert memory.read(5 * MIB, 4) == b"data"
    assert entry == EntryState("long", MIB, {"rsi": layout.BOOT_PARAMS, "rsp": layout.BOOT_STACK})


def test_the_initrd_is_high_and_below_the_limit(
    memory: GuestMemory, kernel: Path, initrd: Path
) -> None:
    load_kernel(memory, kernel, initrd=initrd)
    header = setup_header(memory)
    assert header.ramdisk_size == 20000
    assert header.ramdisk_image == 32 * MIB - 5 * 4096
    assert memory.read(header.ramdisk_image, 20000) == initrd.read_bytes()


def test_the_initrd_respects_the_kernels_limit(
    memory: GuestMemory, tmp_path: Path, initrd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = bytearray(kernels.bzimage(gzip.compress(kernels.elf())))
    struct.pack_into("<I", data, 0x22C, 16 * MIB - 1)  # initrd_addr_max
    path = tmp_path / "bzImage"
    path.write_bytes(data)
    load_kernel(memory, path, initrd=initrd)
    assert setup_header(memory).ramdisk_image == 16 * MIB - 5 * 4096


def test_the_header_of_a_bzimage_reaches_the_zero_page(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "bzImage"
    path.write_bytes(kernels.bzimage(gzip.compress(kernels.elf()), version=0x020E))
    load_kernel(memory, path, cmdline="x")
    header = setup_header(memory)
    assert (header.version, header.pref_address) == (0x020E, 16 * MIB)
    assert (header.type_of_loader, header.cmd_line_ptr) == (0xFF, layout.CMDLINE_ADDRESS)


def test_the_zero_page_has_the_tables_and_the_memory_map(memory: GuestMemory, kernel: Path) -> None:
    load_kernel(memory, kernel, rsdp=layout.ACPI_ADDRESS)
    assert memory.read_u64(layout.BOOT_PARAMS + abi.ACPI_RSDP_ADDR) == layout.ACPI_ADDRESS
    entries = memory_map(memory.regions)
    assert memory.read(layout.BOOT_PARAMS + abi.E820_ENTRIES, 1)[0] == len(entries)
    size = abi.E820_ENTRY.size * len(entries)
    table = memory.read(layout.BOOT_PARAMS + abi.E820_TABLE, size)
    assert list(abi.E820_ENTRY.iter_unpack(table)) == [(e.addr, e.size, e.type) for e in entries]


def test_each_boot_has_a_seed_of_its_own(memory: GuestMemory, kernel: Path) -> None:
    seeds = set()
    for _ in range(2):
        load_kernel(memory, kernel, cmdline="x")
        address = setup_header(memory).setup_data
        assert address > layout.CMDLINE_ADDRESS + 1
        seeds.add(memory.read(address + 16, 32))
    assert len(seeds) == 2
    assert bytes(32) not in seeds


def test_what_linux_will_touch_is_memory_behind_and_between_its_files(
    memory: GuestMemory, kernel: Path
) -> None:
    with KernelLoad(memory, kernel) as load:
        ranges = [span for span in load.expect() if span[1]]
    assert ranges[:2] == [(MIB + 4, 2 * MIB - 4), (5 * MIB + 4, 60)]
    assert ranges[2] == (32 * MIB - ranges[2][1], 4 * MIB + 32 * MIB // 64)
    assert ranges[3] == (5 * MIB + 64, 24 * MIB)
    for start, size in ranges:
        memory.view(start, size)


def test_what_linux_will_touch_ends_with_memory(kernel: Path) -> None:
    with GuestMemory(6 * MIB) as small, KernelLoad(small, kernel) as load:
        for start, size in load.expect():
            small.view(start, size)
    with GuestMemory(layout.LOW_RAM_END + 2 * MIB) as large, KernelLoad(large, kernel) as load:
        assert (4 * GIB, 2 * MIB) in list(load.expect())


def test_of_other_kernels_nothing_is_expected(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "sector"
    path.write_bytes(bytes(510) + b"\x55\xaa")
    with KernelLoad(memory, path) as load:
        assert list(load.expect()) == []


# --- what does not fit -----------------------------------------------------------------------------------


def test_a_kernel_larger_than_memory(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(kernels.elf(segments=((MIB, 8, b"x"), (30 * MIB, 3 * MIB, b"x"))))
    with pytest.raises(ImageError, match="needs memory up to 33 MiB; the machine has 32 MiB"):
        load_kernel(memory, path)


def test_a_command_line_longer_than_the_kernel_reads(memory: GuestMemory, kernel: Path) -> None:
    load_kernel(memory, kernel, cmdline="x" * 2047)
    assert memory.read(layout.CMDLINE_ADDRESS, 2048) == b"x" * 2047 + b"\0"
    with pytest.raises(SpecError, match="has 2048 bytes; this kernel reads 2047"):
        load_kernel(memory, kernel, cmdline="x" * 2048)
    with pytest.raises(SpecError, match="NUL"):
        load_kernel(memory, kernel, cmdline="a\0b")


def test_other_kernels_read_longer_lines(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", MIB)
    path.write_bytes(kernels.elf(note=note))
    load_kernel(memory, path, cmdline="x" * 10000)
    with pytest.raises(SpecError, match="command line has 65536 bytes"):
        load_kernel(memory, path, cmdline="x" * 65536)


@pytest.mark.parametrize("note", [b"", struct.pack("<III", 4, 4, 18) + b"Xen\0\0\0\x10\0"])
def test_an_initrd_larger_than_the_room(memory: GuestMemory, tmp_path: Path, note: bytes) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(kernels.elf(note=note, segments=((MIB, 20 * MIB, b"x"),)))
    with initrd.open("wb") as file:
        file.truncate(12 * MIB)
    with pytest.raises(SpecError, match="no room"):
        load_kernel(memory, kernel, initrd=initrd)


def test_an_initrd_that_is_not_there(memory: GuestMemory, kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no initrd at"):
        load_kernel(memory, kernel, initrd=tmp_path / "nothing")


# --- memory map and registers ----------------------------------------------------------------------------


def test_memory_above_4_gib_is_in_the_map() -> None:
    regions = (Region(0, 3 * GIB, 0, 0), Region(4 * GIB, GIB, 3 * GIB, 3 * GIB))
    entries = memory_map(regions)
    ram = [(entry.addr, entry.end) for entry in entries if entry.type == abi.E820_RAM]
    assert ram == [(0, layout.EBDA_START), (MIB, 3 * GIB), (4 * GIB, 5 * GIB)]
    ends = [0, *(entry.end for entry in entries)]
    assert all(entry.addr >= end for entry, end in zip(entries, ends, strict=False))


def test_memory_too_small_for_a_pc() -> None:
    with pytest.raises(SpecError, match="more than 1 MiB"):
        memory_map((Region(0, MIB, 0, 0),))


def test_long_mode_registers() -> None:
    sregs = initial_sregs(EntryState("long", 0x1234), kvm.Sregs(apic_base=0xFEE0_0900))
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db) == (0x10, 1, 0)
    assert (sregs.ss.selector, sregs.ss.l, sregs.ss.db) == (0x18, 0, 1)
    assert (sregs.cr0 >> 31, sregs.cr3, sregs.efer) == (1, layout.BOOT_PAGE_TABLES, 0x500)
    assert sregs.apic_base == 0xFEE0_0900


def test_protected_mode_registers() -> None:
    entry = EntryState("protected", 0x1234, {"rbx": 7})
    sregs, regs = initial_sregs(entry, kvm.Sregs(cr4=0x20, efer=0x500)), initial_regs(entry)
    assert (sregs.cs.l, sregs.cs.db, sregs.cr0, sregs.cr4, sregs.efer) == (0, 1, 0x11, 0, 0)
    assert (regs.rip, regs.rbx, regs.rflags) == (0x1234, 7, 2)


def test_a_boot_sector_is_entered_in_real_mode(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "sector"
    path.write_bytes(b"code".ljust(510, b"\0") + b"\x55\xaa")
    entry = load_kernel(memory, path)
    assert memory.read(0x7C00, 4) == b"code"
    assert entry == EntryState("real", 0x7C00, {"rdx": 0x80, "rsp": 0x7C00})
    reset = kvm.Sregs(cr0=0x6000_0010)
    reset.cs.base, reset.cs.selector = 0xFFFF_0000, 0xF000
    sregs = initial_sregs(entry, reset)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cr0) == (0, 0, 0x6000_0010)
