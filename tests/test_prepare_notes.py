"""What is said of a machine that is allowed and still worth a word."""

from __future__ import annotations

import os

from hostel.prepare import _notes
from hostel.spec import MachineSpec


def test_vcpus_that_wait_for_one_another() -> None:
    many = (os.cpu_count() or 1) + 1
    (said,) = _notes(MachineSpec(cpus=many))
    assert "they will wait for one another" in said
    assert not list(_notes(MachineSpec(cpus=many, engine="soft", kernel="k")))
