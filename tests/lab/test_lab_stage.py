from __future__ import annotations

from typing import get_args

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.lab.stage import Stage
from hostel.soft.vmx.events import TraceEvent
from hostel.spec import Paging, Trap


def trace(name: str, paging: Paging, trap: Trap) -> tuple[str, list[int], list[TraceEvent]]:
    with Stage(trap=trap, traced=True) as stage:
        actor = stage.actor(name, paging)
        actor.play()
        return actor.words, [vcpu.instructions for vcpu in actor.vcpus], stage.trace


@pytest.mark.parametrize("name", ["ipi", "migrate"])
@pytest.mark.parametrize("paging", get_args(Paging))
@pytest.mark.parametrize("trap", get_args(Trap))
def test_two_vcpus_give_the_same_trace_every_time(name: str, paging: Paging, trap: Trap) -> None:
    """Every VMX instruction, its operands, its time; and every guest instruction is counted."""
    first = trace(name, paging, trap)
    assert len(first[1]) == 2
    assert min(first[1]) > 1000
    assert sum(event.what == "VM exit" for event in first[2]) > 100
    assert trace(name, paging, trap) == first


@pytest.mark.parametrize("name", ["migrate", "windows", "churn"])
@pytest.mark.parametrize("paging", get_args(Paging))
def test_both_cores_take_the_same_path(name: str, paging: Paging) -> None:
    assert trace(name, paging, "translate") == trace(name, paging, "intercept")
