"""The FUSE protocol against linux/fuse.h, by a compiled probe."""

from __future__ import annotations

import pytest

from abi.c_probe import evaluate
from hostel.abi import fuse
from hostel.abi.record import Record

RECORDS = [value for value in vars(fuse).values() if isinstance(value, Record)]
PARTIAL = {"fuse_in_header": "padding", "fuse_init_in": ""}
"""A later kernel has given a last field another use, or more fields behind."""
C_FIELDS = {"fuse_statfs_out": "st.", "fuse_dirent": "", "fuse_attr_out": ""}
WITHOUT_PREFIX = ("FATTR_", "FOPEN_")


def c_name(name: str) -> str:
    return name if name.startswith(WITHOUT_PREFIX) else f"FUSE_{name}"


def numbers() -> dict[str, int]:
    return {
        c_name(name): value
        for name, value in vars(fuse).items()
        if name.isupper() and isinstance(value, int)
    }


def fields(record: Record) -> dict[str, int]:
    prefix = C_FIELDS.get(record.c_name, "")
    return {
        prefix + name: offset
        for name, offset in record.offsets.items()
        if name != PARTIAL.get(record.c_name)
    }


@pytest.fixture(scope="module")
def c_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    names = list(numbers())
    for record in RECORDS:
        names.append(f"sizeof(struct {record.c_name})")
        names += [f"offsetof(struct {record.c_name}, {field})" for field in fields(record)]
    return evaluate(names, ["linux/fuse.h"], tmp_path_factory.mktemp("probe"))


def test_constants(c_values: dict[str, int]) -> None:
    ours = numbers()
    version = ours.pop("FUSE_KERNEL_MINOR_VERSION")
    assert version <= c_values["FUSE_KERNEL_MINOR_VERSION"]
    assert len(ours) > 60
    assert ours == {name: c_values[name] for name in ours}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.c_name)
def test_structures(c_values: dict[str, int], record: Record) -> None:
    name = record.c_name
    if name not in ("fuse_init_in",):
        assert record.size == c_values[f"sizeof(struct {name})"]
    for field, offset in fields(record).items():
        assert offset == c_values[f"offsetof(struct {name}, {field})"], field
