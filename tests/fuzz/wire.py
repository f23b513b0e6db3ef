"""Builds the fuzzer of the agent's wire format (``wire.c``)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hostel.guest.protocol import c_header

AGENT = Path(__file__).resolve().parents[2] / "src/hostel/guest/agent"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(folder: Path) -> Path:
    """In ``folder``. Only the agent's own code tells of its edges."""
    (folder / "protocol.h").write_text(c_header())
    flags = ["gcc", "-g", "-O1", "-Wall", *SANITIZERS, f"-I{folder}", f"-I{AGENT}", "-c"]
    fuzzer = Path(__file__).with_name("wire.c")
    subprocess.run([*flags, "-o", folder / "fuzzer.o", fuzzer], check=True)
    covered = [*flags, "-fsanitize-coverage=trace-pc"]
    subprocess.run([*covered, "-o", folder / "wire.o", AGENT / "wire.c"], check=True)
    program = folder / "wire"
    objects = [folder / "fuzzer.o", folder / "wire.o"]
    subprocess.run(["gcc", *SANITIZERS, "-o", program, *objects], check=True)
    return program
