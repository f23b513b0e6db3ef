from __future__ import annotations

from hostel import lab


def test_shares_migration_and_isolation() -> None:
    report = lab.run("schedule")
    shares = {str(row[0]): row[3] for row in report.tables[0].rows}
    heavy, light = shares["A"], shares["B"]
    assert isinstance(heavy, float)
    assert isinstance(light, float)
    assert heavy > 1.3 * light, "weight 2 against 1"
    moves = [step.what.split(":")[0] for step in report.steps if step.who.startswith("pCPU")]
    assert None not in [step.time for step in report.steps if step.who.startswith("pCPU")]
    assert moves[0] == "VMCLEAR"
    assert moves[1] == "VMPTRLD"
    assert "INVVPID" in moves
    assert moves[-1] == "VMLAUNCH", "not VMRESUME: its launch state is clear"
    assert "A, B, P, T, of A, B, P, T" in report.conclusions[1]


def test_the_same_every_time() -> None:
    assert lab.run("schedule") == lab.run("schedule")
