"""MSRs that the hypervisor answers for, on a vCPU that has not run yet."""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.lab.stage import Stage
from hostel.soft.hypervisor.msrs import host_read, host_write
from hostel.soft.irqchip.lapic import LVT_TIMER
from hostel.soft.state import MSR_TSC, MSR_TSC_DEADLINE


def test_a_deadline_is_in_the_guests_own_time() -> None:
    """A guest that has written its time-stamp counter waits as long as any other (SDM vol. 3A §10.5.4.1)."""
    with Stage() as stage:
        vcpu = stage.actor("hello").vcpus[0]
        now = vcpu.machine.now
        vcpu.lapic.write(LVT_TIMER * 16, (2 << 17 | 0x41).to_bytes(4, "little"))
        for tsc in (1_000_000, 0):
            host_write(vcpu, MSR_TSC, tsc)
            host_write(vcpu, MSR_TSC_DEADLINE, tsc + 500)
            assert vcpu.lapic.deadline == now + 500
            assert host_read(vcpu, MSR_TSC_DEADLINE) == tsc + 500
        host_write(vcpu, MSR_TSC, 1_000_000)
        host_write(vcpu, MSR_TSC_DEADLINE, 999_000)
        assert vcpu.lapic.deadline == 1, "past: at once"
        host_write(vcpu, MSR_TSC_DEADLINE, 0)
        assert vcpu.lapic.deadline is None
