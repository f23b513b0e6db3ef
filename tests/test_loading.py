"""A kernel on its way into memory: what is copied, what is made ahead of the guest, and how that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guests import kernels
from guests.machine import PATIENCE, planned
from hostel.memory import HUGE_PAGE, GuestMemory
from hostel.monitor.loading import Loading
from hostel.plan import Plan

MIB = 1 << 20
BSS = 12 * MIB


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Of a kernel that is nearly all bss, in 32 MiB."""
    path = tmp_path / "kernel"
    path.write_bytes(kernels.elf(segments=((MIB, BSS, b"code"),)))
    with planned("hlt") as plan:
        yield msgspec.structs.replace(plan, kernel=path)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hostel-load"]


def test_pages_are_made_ahead_of_the_guest(plan: Plan) -> None:
    with GuestMemory(HUGE_PAGE) as trial:
        if not trial.populate(0, HUGE_PAGE):
            pytest.skip("the host's kernel cannot populate memory (before Linux 5.14)")
    with Loading(plan) as loading:
        loading.entry()
        memory = loading.memory
        deadline = time.monotonic() + PATIENCE
        while workers() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert memory.allocated >= BSS + 4 * MIB  # and the top
        assert memory.read(MIB, 8) == b"code" + bytes(4)
        assert memory.read(MIB + BSS - 8, 8) == bytes(8)
        loading.cancel()


def test_what_nobody_enters_is_given_back(plan: Plan) -> None:
    with Loading(plan) as loading:
        memory = loading.memory
    assert workers() == []
    assert memory.fd == -1
    loading.cancel()
