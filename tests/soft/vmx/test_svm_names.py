"""The table of names is data: it agrees with itself, and with an SVM processor that runs."""

from __future__ import annotations

import pytest

from hostel.soft.silicon import Pin, Primary, Reason, Secondary
from hostel.soft.state import RAX, RCX
from hostel.soft.vmx.fields import Field, Kind
from hostel.soft.vmx.svm_names import (
    CONTROLS,
    EXITS,
    FIELDS,
    INSTRUCTIONS,
    SAVE,
    intercept_place,
)


def test_every_control_that_the_silicon_has_is_named() -> None:
    has = {repr(control) for control in (*Pin, *Primary, *Secondary)}
    without = {repr(Pin.PREEMPTION_TIMER), repr(Primary.SECONDARY)}
    assert has - without == {repr(control) for control, _ in CONTROLS}


def test_reasons_without_a_counterpart_are_vmxs_own() -> None:
    own = {
        *(Reason.SIPI, Reason.VMCLEAR, Reason.VMPTRLD, Reason.VMPTRST, Reason.VMREAD),
        *(Reason.VMWRITE, Reason.VMXOFF, Reason.VMXON, Reason.INVEPT, Reason.INVVPID),
        *(Reason.ENTRY_MSR_LOADING, Reason.TPR_BELOW_THRESHOLD, Reason.PREEMPTION_TIMER),
    }
    assert set(Reason) - set(EXITS) == own


def test_fields_have_places_of_their_own() -> None:
    places = [place.offset for place in FIELDS.values()]
    assert len(set(places)) == len(places)
    for field, place in FIELDS.items():
        saved = place.offset >= SAVE
        assert saved == (field.kind is Kind.GUEST) or field is Field.GUEST_INTERRUPTIBILITY
        assert not place.offset % 2


def test_intercepts_have_the_places_of_the_manual() -> None:
    assert intercept_place(0x13) == (0, 19)  # CR3 write
    assert intercept_place(0x4E) == (8, 14)  # #PF
    assert intercept_place(0x72) == (12, 18)  # CPUID
    assert intercept_place(0x80) == (16, 0)  # VMRUN
    assert intercept_place(0x400) is None


def test_each_instruction_of_vmx_is_in_one_row() -> None:
    named = ", ".join(pair.vmx for pair in INSTRUCTIONS)
    for name in ("VMXON", "VMXOFF", "VMPTRLD", "VMCLEAR", "VMREAD", "VMLAUNCH", "INVEPT"):
        assert named.count(name) == 1


@pytest.mark.parametrize(
    ("source", "reason", "offset"),
    [
        ("cpuid", Reason.CPUID, 0),
        ("hlt", Reason.HLT, 0),
        ("invlpg (%rax)", Reason.INVLPG, 0),
        ("mov %rax, %cr3", Reason.CR_ACCESS, 0x13),
        ("mov %dr7, %rax", Reason.MOV_DR, 7),
        ("in $0x60, %al", Reason.IO, 0),
        ("mov $0x1b, %ecx; rdmsr", Reason.RDMSR, 0),
        ("lgdt (%rax)", Reason.GDTR_IDTR, 5),
        ("mov 0x123000, %al", Reason.EPT_VIOLATION, 0),
        ("div %ecx", Reason.EXCEPTION_NMI, 0),
        ("pause", Reason.PAUSE, 0),
        ("wbinvd", Reason.WBINVD, 0),
    ],
)
def test_a_processor_gives_the_exit_codes_of_the_table(
    source: str, reason: Reason, offset: int
) -> None:
    pytest.importorskip("unicorn", reason="the extra 'soft' is not installed")
    from soft.core.svm_rig import SvmGuest

    with SvmGuest(source) as guest:
        guest.physical.write_u64(guest.leaves + 8 * 0x123, 0)
        guest.state.gpr[RAX], guest.state.gpr[RCX] = 0x1000, 0
        guest.controls.exception_bitmap = 1
        guest.controls.primary |= int(
            Primary.INVLPG | Primary.CR3_LOAD | Primary.MOV_DR | Primary.PAUSE
        )
        guest.controls.secondary |= int(Secondary.DESCRIPTOR_TABLE | Secondary.WBINVD)
        assert guest.run().reason is reason
        assert guest.core.exit_code == EXITS[reason].code + offset
