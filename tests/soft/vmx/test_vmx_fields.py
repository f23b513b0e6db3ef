"""Fields: their encodings say what they are, and no two share bytes of the region."""

from __future__ import annotations

import itertools

import pytest

from hostel.soft.physical import PAGE
from hostel.soft.vmx.fields import ACCESS, CONTROLS, EXIT, GUEST, HOST, PLACE, Field, Kind, Width


def test_each_field_has_its_own_place() -> None:
    places = sorted(PLACE[field] for field in Field)
    assert len(places) == len(set(places)) == len(GUEST) + len(HOST) + len(CONTROLS) + len(EXIT)
    assert all(later - first >= 8 for first, later in itertools.pairwise(places))
    assert places[0] >= 16
    assert places[-1] + 8 <= PAGE


@pytest.mark.parametrize(
    ("field", "encoding", "kind", "width"),
    [
        (Field.VPID, 0x0000, Kind.CONTROL, Width.BITS16),
        (Field.HOST_TR_SELECTOR, 0x0C0C, Kind.HOST, Width.BITS16),
        (Field.EPT_POINTER, 0x201A, Kind.CONTROL, Width.BITS64),
        (Field.GUEST_PHYSICAL_ADDRESS, 0x2400, Kind.EXIT, Width.BITS64),
        (Field.EXIT_REASON, 0x4402, Kind.EXIT, Width.BITS32),
        (Field.PREEMPTION_TIMER, 0x482E, Kind.GUEST, Width.BITS32),
        (Field.HOST_RIP, 0x6C16, Kind.HOST, Width.NATURAL),
        (Field.GUEST_LINEAR_ADDRESS, 0x640A, Kind.EXIT, Width.NATURAL),
    ],
)
def test_encodings_are_the_manuals(field: Field, encoding: int, kind: Kind, width: Width) -> None:
    assert (int(field), field.kind, field.width) == (encoding, kind, width)


def test_only_64_bit_fields_have_a_high_half() -> None:
    high = {encoding for encoding in ACCESS if encoding & 1}
    assert high == {field + 1 for field in Field if field.width is Width.BITS64}
    assert Field.GUEST_RIP + 1 not in ACCESS
