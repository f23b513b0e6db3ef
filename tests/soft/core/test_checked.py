"""The core by intercept with its helper: who runs when, and that nobody notices the change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.soft.core.checked import CheckedCore, needs_checks
from hostel.soft.exceptions import DB, GP, PF
from hostel.soft.silicon import Pin, Reason
from hostel.soft.state import CR0_PE, RAX, RBX, RIGHTS_DATA32, RIGHTS_UNUSABLE, Segment
from soft.core.svm_rig import CODE, GDT, SvmGuest

SMALL = Segment(16, 0x9000, 15, RIGHTS_DATA32)
NULL = Segment(0, 0, 0, RIGHTS_UNUSABLE)


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Iterator[SvmGuest]:
    with SvmGuest(request.param, bits=32) as made:
        made.core.close()
        made.core = CheckedCore(made.physical)  # type: ignore[assignment]
        yield made


@pytest.mark.parametrize("name", ["ds", "es", "ss", "fs", "gs"])
def test_who_needs_checks(name: str) -> None:
    with SvmGuest("nop", bits=32) as flat:
        state = flat.state
        assert not needs_checks(state)
        setattr(state, name, SMALL)
        assert needs_checks(state)
        setattr(state, name, NULL)
        assert needs_checks(state)
        state.cr0 &= ~CR0_PE
        assert not needs_checks(state), "real mode"
    with SvmGuest("nop") as long:
        setattr(long.state, name, NULL)
        assert not needs_checks(long.state)
        long.state.dr7 |= 2
        assert needs_checks(long.state)


@pytest.mark.parametrize(
    "guest", ["cpuid; mov %eax, 12; cpuid; movaps %xmm0, %xmm1; mov %eax, 13"], indirect=True
)
def test_from_one_core_to_the_other_and_back(guest: SvmGuest) -> None:
    guest.controls.exception_bitmap = 1 << GP
    assert guest.run().reason is Reason.CPUID
    fpu = guest.core.save_fpu()
    guest.state.rip += 2
    guest.state.ds, guest.state.gpr[RAX] = SMALL, 0x1234
    before = guest.core.statistics.instructions
    assert guest.run().reason is Reason.CPUID
    assert guest.memory.read_u32(0x900C) == 0x1234
    assert guest.core.statistics.instructions == before + 1
    assert guest.core.save_fpu() == fpu
    guest.state.rip += 2
    exit = guest.run()
    assert exit.interruption is not None
    assert exit.interruption.vector == GP


@pytest.mark.parametrize("guest", ["1: inc %ebx; cpuid; jmp 1b"], indirect=True)
def test_code_that_the_other_core_has_changed(guest: SvmGuest) -> None:
    """Each holds it translated. ``inc`` becomes ``dec``, by a store of the guest's on the other core."""
    for ds in (guest.state.ds, SMALL, guest.state.ds):
        guest.state.ds = ds
        assert guest.run().reason is Reason.CPUID
        guest.state.rip = CODE
    assert guest.state.gpr[RBX] == 3
    guest.memory.write(0xB000, bytes.fromhex("c605 00800000 4b f4"))  # movb $0x4b, 0x8000; hlt
    guest.state.fs, guest.state.rip = SMALL, 0xB000
    assert guest.run().reason is Reason.HLT
    guest.state.fs, guest.state.rip = guest.state.ds, CODE
    assert guest.run().reason is Reason.CPUID
    assert guest.state.gpr[RBX] == 2


@pytest.mark.parametrize("guest", ["mov %eax, 0x9000; hlt"], indirect=True)
def test_a_breakpoint_is_hit(guest: SvmGuest) -> None:
    guest.controls.exception_bitmap = 1 << DB
    guest.state.dr[0], guest.state.dr7 = 0x9000, 0x400 | 2 | 1 << 16 | 3 << 18
    exit = guest.run()
    assert (exit.reason, exit.qualification) == (Reason.EXCEPTION_NMI, 1)


@pytest.mark.parametrize("guest", ["cpuid"], indirect=True)
def test_code_of_a_segment_that_runs_over_4_gib(guest: SvmGuest) -> None:
    """QEMU fetches it from behind 4 GiB: the other core, from the start of it."""
    guest.state.cs.base, guest.state.rip = 0xFFFF_F000, CODE + 0x1000
    assert needs_checks(guest.state)
    assert guest.run().reason is Reason.CPUID


def test_code_that_runs_over_4_gib_where_no_entry_was() -> None:
    """It gets there by a far return: an exit for nothing, and the next entry is the other core's."""
    with SvmGuest("push $0x28; push $0x9010; lretq") as guest:
        guest.core.close()
        guest.core = CheckedCore(guest.physical)  # type: ignore[assignment]
        guest.memory.write_u64(GDT + 0x28, 0xFFCF_9BFF_F000_FFFF)
        guest.memory.write(CODE + 0x10, b"\x0f\xa2")  # cpuid
        guest.controls.pin, guest.controls.timer = int(Pin.PREEMPTION_TIMER), 1000
        guest.controls.exception_bitmap = 1 << PF
        assert guest.run().reason is Reason.EXTERNAL_INTERRUPT
        assert guest.run().reason is Reason.CPUID
        assert guest.state.rip == 0x9010
