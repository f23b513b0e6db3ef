from __future__ import annotations

from hostel.lab import Report, Step, Table, draw
from hostel.lab.draw import Node, Span


def test_table_aligns_numbers_right() -> None:
    table = Table("Costs", ("way", "exits"), (("shadow", 12345), ("EPT", None)))
    assert list(draw.table(table)) == [
        "Costs",
        "way      exits",
        "shadow  12,345",
        "EPT          –",
    ]


def test_timeline() -> None:
    lanes = {"pCPU 0": [Span(0, 50, "a"), Span(50, 100, "b")], "pCPU 1": [Span(25, 75, "c")]}
    assert list(draw.timeline(lanes, width=8)) == [
        "pCPU 0 │aaaabbbb│",
        "pCPU 1 │  cccc  │",
        "       0      100",
    ]


def test_a_timeline_of_nothing_is_nothing() -> None:
    assert list(draw.timeline({"pCPU 0": []})) == []


def test_tree() -> None:
    root = Node("PML4", (Node("[0] PDPT", (Node("[1] page"),)), Node("[511] loop")))
    assert list(draw.tree(root)) == ["PML4", "├─ [0] PDPT", "│  └─ [1] page", "└─ [511] loop"]


def test_a_long_trace_is_cut_and_says_so() -> None:
    steps = tuple(Step("guest", f"step {n}", n) for n in range(5))
    lines = list(draw.report(Report("x", "Why?", steps), steps=2))
    assert lines == [
        "Why?",
        "",
        "0  guest  step 0",
        "1  guest  step 1",
        "… and 3 steps more (--steps)",
    ]


def test_no_steps_wanted() -> None:
    lines = list(draw.report(Report("x", "Why?", (Step("guest", "step"),)), steps=0))
    assert lines == ["Why?", "… and 1 steps more (--steps)"]


def test_a_wide_table_is_wrapped_heads_first_and_no_word_broken() -> None:
    told = Table(
        "Costs",
        ("way", "page faults", "what"),
        (("soft, shadow", 12345, "a few words"), ("KVM", None, "bounds")),
    )
    assert list(draw.table(told, width=33)) == [
        "Costs",
        "way             page  what",
        "              faults",
        "soft, shadow  12,345  a few words",
        "KVM                –  bounds",
    ]
    assert list(draw.table(told, width=28))[3:5] == [
        "soft,      12,345  a few",
        "shadow             words",
    ]
    assert "12,345" in "\n".join(draw.table(told, width=5)), "too wide for anything: never cut"


def test_bounds_stand_to_the_right() -> None:
    told = Table("Costs", ("way", "exits"), (("a", "≤ 7"), ("b", 1234)))
    assert list(draw.table(told))[2:] == ["a      ≤ 7", "b    1,234"]
