"""``./dev fuzz NAME [SECONDS [SEED]]``: a target under new inputs for so long.

Guided by coverage where atheris can be had (a wheel exists for CPython 3.11 and a few later ones), else by
chance alone, which is said. What is found to be new stays in the cache, beside the repository's corpus; a
finding ends the campaign, and its input is kept there too. ``wire`` and ``dhcp`` are C code
of the agent (``engine.c``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from fuzz.mutate import CORPUS, corpus, mutations
from fuzz.wire import TARGETS, build
from hostel import cache

TOP = Path(__file__).resolve().parent.parent.parent
SECONDS = 60


def main(name: str, seconds: int, seed: int) -> int:
    """Each campaign is a process of its own: libFuzzer ends its process, and must not leave files."""
    found = cache.home() / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hostel-fuzz-") as folder:
        if name in TARGETS:
            command = [str(build(Path(folder), name)), str(seconds), str(found), str(CORPUS / name)]
        else:
            command = [
                sys.executable,
                __file__,
                "--campaign",
                name,
                str(seconds),
                str(seed),
                folder,
            ]
        status = subprocess.run(command, cwd=found, check=False).returncode
    if status:
        print(f"{name}: a finding; its input is among {found}/crash-*", file=sys.stderr)
    return status


def campaign(name: str, seconds: int, seed: int, folder: Path) -> None:
    if find_spec("atheris") is not None:
        _guided(name, seconds, seed, folder)
    print("atheris is not there: inputs by chance, not guided by coverage", file=sys.stderr)
    from fuzz.targets import make

    target = make(name, folder)
    until, runs = time.monotonic() + seconds, 0
    for data in mutations(corpus(name), seed=seed):
        try:
            target.run(data)
        except BaseException:
            Path(f"crash-{runs}").write_bytes(data)
            raise
        runs += 1
        if time.monotonic() > until:
            break
    target.close()
    print(f"{name}: {runs} runs, no finding", file=sys.stderr)


def _guided(name: str, seconds: int, seed: int, folder: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["hostel"]):
        from fuzz.targets import make

        target = make(name, folder)
    options = [
        *(f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4096", "-timeout=30"),
        "-print_final_stats=1",
        "-handle_xfsz=0",  # a file that would be too large (``bounded``) is an error for the target
    ]
    atheris.Setup([name, *options, os.getcwd(), str(CORPUS / name)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--campaign"]:
        campaign(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        sys.exit(0)
    names = sorted(path.name for path in CORPUS.iterdir())
    if not sys.argv[1:] or sys.argv[1] not in names:
        sys.exit(f"usage: ./dev fuzz NAME [SECONDS [SEED]]; NAME: {' '.join(names)}")
    name, seconds, seed = [
        *sys.argv[1:],
        *(str(SECONDS), str(int(time.time())))[len(sys.argv) - 2 :],
    ]
    sys.exit(main(name, int(seconds), int(seed)))
