"""Guests with tables of the worst kind, on the whole of engine ``soft``: all four ways end alike."""

from __future__ import annotations

import pytest

from guests.machine import PATIENCE, SPIN, machine
from hostel.plan import Ending
from hostel.spec import Soft

WAYS = [
    pytest.param(Soft(paging=paging, trap=trap), id=f"{paging}-{trap}")
    for paging in ("ept", "shadow")
    for trap in ("translate", "intercept")
]
DONE = "; mov $0x31, %al; out %al, $0xf4" + SPIN
PAE = "; mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4"
PSE = "; mov %cr4, %eax; or $0x10, %eax; mov %eax, %cr4"
PAGING = "; mov %cr0, %eax; or $0x80010000, %eax; mov %eax, %cr0; nop; nop"
TABLES = "mov $0x800000, %edi"
"""A page of zeros, far from the code."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "source",
    [
        pytest.param("mov $0x7ff00000, %edi" + PAE + "; mov %edi, %cr3" + PAGING, id="nowhere"),
        pytest.param(TABLES + "; mov %edi, %cr3" + PAGING, id="empty"),
        pytest.param(
            TABLES + "; movl $0x200087, (%edi)" + PSE + "; mov %edi, %cr3" + PAGING, id="reserved"
        ),
    ],
)
def test_no_instruction_can_be_fetched(source: str, way: Soft) -> None:
    """#PF, and again for the IDT, and again: a triple fault."""
    with machine(source + SPIN, engine="soft", soft=way) as monitor:
        found = monitor.wait(PATIENCE)
        assert found is not None
        assert found.kind == "crash"
        assert "triple fault" in found.detail


@pytest.mark.parametrize("way", WAYS)
def test_tables_that_loop_and_change_themselves(way: Soft) -> None:
    """Entry 1 leads to the table as a table; so its own address is 0x401000, and there entry 1 is made
    a large page at 0: all of the first 4 MiB is at 4 MiB too."""
    source = (
        TABLES + "; movl $0x87, (%edi); movl $0x800067, 4(%edi)" + PSE + "; mov %edi, %cr3" + PAGING
        + "; movl $0x87, 0x401004; mov %edi, %cr3"
        + "; mov 0x50000c, %ebx; cmp 0x10000c, %ebx; jne 1f" + DONE + "; 1:" + SPIN
    )  # fmt: skip
    with machine(source, engine="soft", soft=way) as monitor:
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=2 * 0x31 + 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_table_in_no_memory_is_all_ones(way: Soft) -> None:
    """So its entries lead to the last page below 4 GiB, where nobody answers either."""
    source = (
        TABLES + "; movl $0x87, (%edi); movl $0x7ff00007, 4(%edi)" + PSE + "; mov %edi, %cr3"
        + PAGING + "; mov 0x400000, %eax; cmp $-1, %eax; jne 1f" + DONE + "; 1:" + SPIN
    )  # fmt: skip
    with machine(source, engine="soft", soft=way) as monitor:
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=2 * 0x31 + 1)


@pytest.mark.parametrize("way", WAYS)
def test_tables_written_through_global_pages(way: Soft) -> None:
    """As kernels write theirs. A translation that a CR3 load spares must not escape write protection."""
    switch = "; mov %cr3, %eax; mov %eax, %cr3; mov 0x400000, %eax"
    source = (
        TABLES + "; movl $0x183, (%edi); movl $0x802007, 4(%edi); movl $0x800183, 8(%edi)"
        + "; movl $1, 0x803000; movl $2, 0x804000; movl $0x803007, 0x802000"
        + "; movl $0x803007, 0x802004; mov %cr4, %eax; or $0x90, %eax; mov %eax, %cr4"
        + "; mov %edi, %cr3" + PAGING + "; mov 0x401000, %ebx; mov 0x400000, %eax; cmp $1, %eax; jne 1f"
        + "; movl $0x804007, 0x802000" + switch + "; cmp $2, %eax; jne 1f"
        + "; movl $0x803007, 0x802000" + switch + "; cmp $1, %eax; jne 1f" + DONE + "; 1:" + SPIN
    )  # fmt: skip
    with machine(source, engine="soft", soft=way) as monitor:
        assert monitor.wait(PATIENCE) == Ending("debug-exit", code=2 * 0x31 + 1)
