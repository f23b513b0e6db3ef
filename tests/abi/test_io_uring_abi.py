"""io_uring's numbers and layouts against <linux/io_uring.h>, by a compiled probe."""

from __future__ import annotations

from pathlib import Path

from abi.c_probe import evaluate
from hostel.abi import io_uring as abi
from hostel.abi.record import Record


def c_name(name: str) -> str:
    if name.startswith("SYS_"):
        return f"__NR_io_uring_{name[4:].lower()}"
    return f"IORING_{name}"


def expected() -> dict[str, int]:
    table = {c_name(name): value for name, value in vars(abi).items() if type(value) is int}
    for record in vars(abi).values():
        if isinstance(record, Record):
            table[f"sizeof(struct {record.c_name})"] = record.size
            for field, offset in record.offsets.items():
                if not field.startswith("_"):
                    table[f"offsetof(struct {record.c_name}, {field})"] = offset
    return table


def test_every_definition_agrees_with_the_header(tmp_path: Path) -> None:
    ours = expected()
    headers = ("linux/io_uring.h", "sys/uio.h", "sys/syscall.h")
    assert len(ours) > 50
    assert evaluate(ours, headers, tmp_path) == ours
