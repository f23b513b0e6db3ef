"""Builds the fuzzers of the agent's C code that reads bytes from others (``TARGETS``), under ``engine.c``."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hostel.guest.protocol import c_header

AGENT = Path(__file__).resolve().parents[2] / "src/hostel/guest/agent"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TARGETS = {"wire": "wire.c", "dhcp": "lease.c"}
"""Its own file here gives ``run()``, the agent's file is what is looked at."""


def build(folder: Path, name: str) -> Path:
    """In ``folder``. Only the agent's own code tells of its edges."""
    (folder / "protocol.h").write_text(c_header())
    flags = ["gcc", "-g", "-O1", "-Wall", *SANITIZERS, f"-I{folder}", f"-I{AGENT}", "-c"]
    objects = []
    for source in ("engine.c", f"{name}.c"):
        objects.append(folder / f"{source}.o")
        subprocess.run([*flags, "-o", objects[-1], Path(__file__).with_name(source)], check=True)
    covered = [*flags, "-fsanitize-coverage=trace-pc"]
    objects.append(folder / "agent.o")
    subprocess.run([*covered, "-o", objects[-1], AGENT / TARGETS[name]], check=True)
    program = folder / name
    subprocess.run(["gcc", *SANITIZERS, "-o", program, *objects], check=True)
    return program
