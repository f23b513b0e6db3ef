"""vhost's requests and layouts against <linux/vhost.h>, by a compiled probe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: apt-get install gcc linux-libc-dev")
    ours = expected()
    lines = ["#include <linux/vhost.h>", "#include <stddef.h>", "#include <stdio.h>"]
    lines += ["int main(void) {", *(f'printf("%lld\\n", (long long)({e}));' for e in ours), "}"]
    source = tmp_path / "probe.c"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-o", tmp_path / "probe", source], check=True)
    output = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)
    theirs = dict(zip(ours, map(int, output.stdout.split()), strict=True))
    assert len(theirs) > 35
    assert ours == theirs
