"""vhost's requests and layouts against <linux/vhost.h>, by a compiled probe."""

from __future__ import annotations

from pathlib import Path

from abi.c_probe import evaluate
from hostel.abi import vhost as abi
from hostel.abi.record import Record


def expected() -> dict[str, int]:
    """C expression, and what we say it is. Types that are no structure have no name here."""
    table = {f"VHOST_{name}": value for name, value in vars(abi).items() if type(value) is int}
    for record in vars(abi).values():
        if isinstance(record, Record) and record.c_name.startswith("vhost_"):
            table[f"sizeof(struct {record.c_name})"] = record.size
            for field, offset in record.offsets.items():
                table[f"offsetof(struct {record.c_name}, {field})"] = offset
    return table


def test_every_definition_agrees_with_the_header(tmp_path: Path) -> None:
    ours = expected()
    assert len(ours) > 35
    assert evaluate(ours, ["linux/vhost.h"], tmp_path) == ours
