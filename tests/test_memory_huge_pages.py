"""Guest memory uses transparent huge pages where the host lets it, however shared memory is set up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostel import memory as module
from hostel.memory import HUGE_PAGE, GuestMemory

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def huge_kilobytes(hva: int) -> int:
    """Of the mapping that begins at ``hva``, what is mapped by huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(f"{hva:x}-"):
            inside = True
        elif inside and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1])
    raise AssertionError(f"no mapping at {hva:#x}")


@pytest.mark.skipif(os.geteuid() != 0, reason="a tmpfs of one's own needs root")
def test_memory_is_mapped_by_huge_pages() -> None:
    if not SHMEM_ENABLED.exists() or "[deny]" in SHMEM_ENABLED.read_text():
        pytest.skip("the host has no transparent huge pages for shared memory")
    with GuestMemory(8 << 20) as memory:
        memory.write(2 << 20, b"x")
        if not huge_kilobytes(memory.regions[0].hva):
            pytest.skip("the host had no free huge page")
        assert memory.read(2 << 20, 2) == b"x\0"


def test_without_the_right_to_mount_it_is_a_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, *arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_system_call", refuse)
    with GuestMemory(2 * HUGE_PAGE) as memory:
        assert "memfd:" in os.readlink(f"/proc/self/fd/{memory.fd}")
        memory.write(0, b"works")


def test_nothing_is_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        GuestMemory(4 << 20).close()
    assert sorted(os.listdir("/proc/self/fd")) == before
