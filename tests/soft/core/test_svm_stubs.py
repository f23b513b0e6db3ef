"""The host instructions that the core by intercept adds are what their source says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostel.soft.core.svm_stubs import CODE, ENTRY, SOURCE


def test_the_bytes_are_the_source(tmp_path: Path) -> None:
    source, thing, binary = (tmp_path / name for name in ("s.s", "s.o", "s.bin"))
    source.write_text(SOURCE)
    try:
        subprocess.run(["as", "-o", thing, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no assembler (binutils)")
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", thing, binary], check=True)
    assert binary.read_bytes() == CODE
    symbols = subprocess.run(["nm", thing], check=True, capture_output=True, text=True).stdout
    found = {name: int(at, 16) for at, _, name in map(str.split, symbols.splitlines())}
    assert {name: found[name] for name in ENTRY} == ENTRY
