"""Mini guests on the core by intercept, under EPT: the same least hypervisor carries them.

Nested paging, their exceptions and their page tables are unicorn's C here. Emulating an instruction on what
is no memory is a hypervisor's business: ``mmio`` is not among them.
"""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn", reason="the extra 'soft' is not installed")

from hostel.soft import mini
from hostel.soft.core.svm import SvmCore
from soft.core.test_mini_on_core import ALONE, Carrier


class SvmCarrier(Carrier):
    def __init__(self, guest: mini.Guest) -> None:
        super().__init__(guest)
        self.svm = SvmCore(self.physical)

    def run(self) -> str:
        event = None
        while True:
            exit = self.svm.enter(self.state, self.controls, event)
            if ends := self.answer(exit):
                return ends
            event, self.event = self.event, None

    def close(self) -> None:
        self.svm.close()
        super().close()


@pytest.mark.parametrize("name", [name for name in ALONE if name != "segments"])
def test_a_mini_guest_says_on_svm_what_it_says_on_kvm(name: str) -> None:
    guest = mini.guest(name)
    carrier = SvmCarrier(guest)
    try:
        ends = carrier.run()
        assert (carrier.said.decode("latin-1"), ends) == (guest.console, guest.ends)
    finally:
        carrier.close()


def test_two_runs_are_one() -> None:
    counts = []
    for _ in range(2):
        carrier = SvmCarrier(mini.guest("demand"))
        carrier.run()
        counts.append(carrier.svm.statistics)
        carrier.close()
    assert counts[0] == counts[1]
    assert counts[0].instructions > 1000
