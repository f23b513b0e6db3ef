from __future__ import annotations

from hostel import lab


def test_what_leaves_the_guest() -> None:
    report = lab.run("rings")
    each = {str(row[0]).split(":")[0]: (row[1], row[3]) for row in report.tables[0].rows}
    assert each["SYSCALL and SYSRET"] == (0, 0)
    assert each["INT 0x80 and IRET"] == (0, 0)
    faults = each["a page missing, later read-only"]
    assert isinstance(faults[1], float)
    assert faults[1] >= 2, "one that is the guest's, one that fills the shadow"
    switches = each["a switch of address spaces (MOV to CR3)"]
    assert switches[0] == 0
    assert isinstance(switches[1], float)
    assert switches[1] >= 1
    assert report.conclusions[2].startswith(
        "Of 18 things that a ring 3 program tried 17 were exceptions, taken by its own kernel; 0 of them"
    )
