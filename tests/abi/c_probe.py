"""What the C compiler makes of expressions: constants, sizes and offsets of the host's headers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

SHOW = """
#define SHOW(what) printf("%s=%s%llu\\n", #what, (what) < 0 ? "-" : "", \\
    (unsigned long long)((what) < 0 ? -(what) : (what)))
"""


def evaluate(
    expressions: Iterable[str], headers: Iterable[str], folder: Path, *, definitions: str = ""
) -> dict[str, int]:
    lines = [f"#include <{header}>" for header in (*headers, "stddef.h", "stdio.h")]
    lines += [SHOW, definitions, "int main(void) {"]
    lines += [f"SHOW({expression});" for expression in expressions]
    return run("\n".join([*lines, "}\n"]), folder)


def run(source: str, folder: Path) -> dict[str, int]:
    """A program that prints lines ``NAME=NUMBER``."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev linux-libc-dev")
    program = folder / "probe"
    program.with_suffix(".c").write_text(source)
    subprocess.run([compiler, "-w", "-o", program, program.with_suffix(".c")], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {
        name: int(value) for name, _, value in (at.rpartition("=") for at in output.splitlines())
    }
