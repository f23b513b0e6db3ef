from __future__ import annotations

import json

import pytest

from hostel import lab
from hostel.cli.entry import command_line
from hostel.errors import UserError
from hostel.lab.paging import Cost, _conclusions

COLUMNS = {
    "exits": 2,
    "fills": 4,
    "syncs": 5,
    "misses": 6,
    "references": 7,
    "longest": 8,
    "memory": 9,
}
Row = dict[str, float]


@pytest.fixture(scope="module")
def report() -> lab.Report:
    return lab.run("paging", ["compute", "churn", "switch"])


@pytest.fixture(scope="module")
def rows(report: lab.Report) -> dict[tuple[str, str], Row]:
    return {
        (str(row[0]), str(row[1])): {
            name: float(row[at] or 0)
            for name, at in COLUMNS.items()
            if not isinstance(row[at], str)
        }
        for row in report.tables[0].rows
    }


def test_shadow_pays_for_changes_and_switches(rows: dict[tuple[str, str], Row]) -> None:
    for workload in ("churn", "switch"):
        shadow, nested = rows[workload, "soft, shadow"], rows[workload, "soft, nested (EPT)"]
        assert shadow["exits"] > 100
        assert nested["exits"] < 10
        assert shadow["memory"] > nested["memory"]
    assert rows["churn", "soft, shadow"]["syncs"] > 0
    assert rows["compute", "soft, shadow"]["exits"] < 20


def test_nested_pays_for_tlb_misses(rows: dict[tuple[str, str], Row]) -> None:
    shadow, nested = rows["churn", "soft, shadow"], rows["churn", "soft, nested (EPT)"]
    assert shadow["longest"] == 4
    assert 4 * shadow["references"] < nested["references"] <= nested["longest"] <= 24


def test_what_is_said_follows_from_the_figures(report: lab.Report) -> None:
    assert "churn, switch take more than 100 exits more" in report.conclusions[0]
    assert "compute" in report.conclusions[1]
    none = [
        Cost("compute", way, exits=3, why="", references=2.0, longest=4, memory=8)
        for way in ("soft, shadow", "soft, nested (EPT)")
    ]
    assert not any("Shadow pays" in line for line in _conclusions(none))


def test_the_walk_is_drawn(report: lab.Report) -> None:
    nested = next(one for one in report.drawings if "nested" in one.title)
    assert nested.lines[0].startswith("GVA ")
    assert sum("read through the EPT" in line for line in nested.lines) == 4
    assert "HPA" in nested.lines[-1]


def test_a_workload_named_twice_runs_once(capsys: pytest.CaptureFixture[str]) -> None:
    """And an option may come behind the names."""
    assert command_line(["lab", "paging", "syscall", "syscall", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ways = [row[1] for row in report["tables"][0]["rows"]]
    assert len(ways) == len(set(ways)) >= 2


def test_an_unknown_workload() -> None:
    with pytest.raises(UserError, match="no workload 'fast'; there are compute, memory, churn"):
        lab.run("paging", ["fast"])
