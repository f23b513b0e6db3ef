from __future__ import annotations

import json

import pytest

from hostel import lab
from hostel.cli.entry import command_line
from hostel.errors import UserError
from hostel.lab.paging_report import Column, conclusions
from hostel.lab.workloads import Cost

Row = dict[str, float]


@pytest.fixture(scope="module")
def report() -> lab.Report:
    return lab.run("paging", ["compute", "churn", "switch"])


@pytest.fixture(scope="module")
def rows(report: lab.Report) -> dict[tuple[str, str], Row]:
    """By workload and way, from the tables that have such rows."""
    found: dict[tuple[str, str], Row] = {}
    for table in report.tables:
        if table.columns[:2] == ("workload", "way"):
            for row in table.rows:
                cells = zip(table.columns[2:], row[2:], strict=True)
                figures = {name: float(cell or 0) for name, cell in cells}
                found.setdefault((str(row[0]), str(row[1])), {}).update(figures)
    return found


def for_memory(report: lab.Report, way: str) -> dict[str, int]:
    table = report.tables[0]
    at = table.columns.index(way)
    return {str(row[0]): int(row[at] or 0) for row in table.rows}


def test_shadow_pays_for_changes_and_switches(
    report: lab.Report, rows: dict[tuple[str, str], Row]
) -> None:
    shadow, nested = for_memory(report, "soft, shadow"), for_memory(report, "soft, nested")
    assert min(shadow["churn"], shadow["switch"]) > 100
    assert shadow["compute"] < 20
    assert max(nested.values()) < 10
    changes, switches = rows["churn", "soft, shadow"], rows["switch", "soft, shadow"]
    assert changes["INVLPG"] == 32 * 6, "one for each page unmapped"
    assert changes["syncs"] > 0
    assert switches["MOV CR"] >= 4 * 50, "one for each switch"
    for workload in ("churn", "switch"):
        tables = [rows[workload, f"soft, {way}"]["tables KiB"] for way in ("shadow", "nested")]
        assert tables[0] > tables[1]


def test_nested_pays_for_tlb_misses(rows: dict[tuple[str, str], Row]) -> None:
    shadow, nested = rows["churn", "soft, shadow"], rows["churn", "soft, nested"]
    assert shadow["most"] == 4
    assert 4 * shadow["refs / walk"] < nested["refs / walk"] <= nested["most"] <= 24


def test_what_has_nothing_to_do_with_memory_is_the_same_in_both_ways(
    rows: dict[tuple[str, str], Row],
) -> None:
    for workload in ("compute", "churn", "switch"):
        shadow, nested = rows[workload, "soft, shadow"], rows[workload, "soft, nested"]
        assert shadow["I/O"] == nested["I/O"] > 0
        assert shadow["MSR"] == nested["MSR"] == 2, "RDMSR and WRMSR of EFER"
        assert shadow["other"] == nested["other"] == 0


def test_what_is_said_follows_from_the_figures(report: lab.Report) -> None:
    assert report.conclusions[0].endswith("nested paging for churn, switch.")
    assert "compute" in report.conclusions[1]
    cheap = {"compute": Cost("compute", {"#PF": 3}, references=2.0, longest=4, tables=8)}
    none = [Column(f"soft, {way}", way, cheap) for way in ("shadow", "nested")]
    assert not any("Shadow pays" in line for line in conclusions(none))


def test_the_walk_is_drawn(report: lab.Report) -> None:
    nested = next(one for one in report.drawings if "nested" in one.title)
    assert nested.lines[0].startswith("GVA ")
    assert sum("read through the EPT" in line for line in nested.lines) == 4
    assert "HPA" in nested.lines[-1]


def test_the_first_exits_are_told(report: lab.Report) -> None:
    """What the one way leaves for, the other does not: MOV to CR3, and pages that the EPT lacks."""
    told = {
        name: [step for step in report.steps if step.who == f"compute, {name}"]
        for name in ("shadow", "nested")
    }
    assert all(step.time for steps in told.values() for step in steps)
    words = {name: "; ".join(step.what for step in steps) for name, steps in told.items()}
    assert "EXCEPTION_NMI" in words["shadow"]
    assert "MOV to CR3" in words["shadow"]
    assert "EPT_VIOLATION" not in words["shadow"]
    assert "EPT_VIOLATION" in words["nested"]
    assert "MOV to CR3" not in words["nested"]


def test_a_workload_named_twice_runs_once(capsys: pytest.CaptureFixture[str]) -> None:
    """And an option may come behind the names."""
    assert command_line(["lab", "paging", "syscall", "syscall", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row[0] for row in report["tables"][0]["rows"]] == ["syscall"]
    ways = [row[1] for row in report["tables"][1]["rows"]]
    assert len(ways) == len(set(ways)) >= 2


def test_an_unknown_workload() -> None:
    with pytest.raises(UserError, match="no workload 'fast'; there are compute, memory, churn"):
        lab.run("paging", ["fast"])
