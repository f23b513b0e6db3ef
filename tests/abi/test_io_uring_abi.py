"""io_uring's numbers and layouts against <linux/io_uring.h>, by a compiled probe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc linux-libc-dev")
    ours = expected()
    headers = ("linux/io_uring.h", "sys/uio.h", "sys/syscall.h", "stddef.h", "stdio.h")
    lines = [f"#include <{header}>" for header in headers]
    lines += ["int main(void) {", *(f'printf("%lld\\n", (long long)({e}));' for e in ours), "}"]
    source = tmp_path / "probe.c"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-o", tmp_path / "probe", source], check=True)
    output = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)
    theirs = dict(zip(ours, map(int, output.stdout.split()), strict=True))
    assert len(theirs) > 50
    assert ours == theirs
