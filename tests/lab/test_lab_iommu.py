from __future__ import annotations

import pytest

from hostel import lab
from hostel.errors import UserError


def test_only_without_an_iommu_a_neighbour_is_reached() -> None:
    report = lab.run("iommu")
    table = report.tables[0]
    reached = {row[0]: row[1:] for row in table.rows}
    assert reached == {
        "emulated": ("reached", "stopped", "stopped"),
        "emulated, guest's own IOMMU": ("reached", "stopped", "stopped"),
        "passed through, no IOMMU": ("reached", "reached", "reached"),
        "passed through, host's IOMMU": ("reached", "stopped", "stopped"),
    }
    assert "adds 5 table reads" in report.conclusions[2], (
        "a 2 MiB page: root, context, three levels"
    )


def test_the_same_every_time() -> None:
    assert lab.run("iommu") == lab.run("iommu")


def test_wrong_names() -> None:
    with pytest.raises(UserError, match=r"no lab .x.; there are .*iommu"):
        lab.run("x")
    with pytest.raises(UserError, match="takes no argument, not 'fast'"):
        lab.run("iommu", ["fast"])
