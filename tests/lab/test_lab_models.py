from __future__ import annotations

from hostel import lab


def test_three_models_one_device() -> None:
    report = lab.run("models")
    rows = {str(row[0]): row[1:] for row in report.tables[0].rows}
    words = len(str(report.data["device"]))
    assert words > 20
    assert rows["hypervisor"] == (words, 0, 0, 0)
    assert rows["host"] == (words, words, words, 0)
    exits, returns, calls, switches = rows["hybrid, a service OS"]
    assert (exits, returns, calls) == (words, 0, words)
    assert isinstance(switches, int)
    assert switches >= words / 2, "a real process, which sleeps between the requests"
    assert report.conclusions[0] == f"The device got the same {words} bytes each time."
