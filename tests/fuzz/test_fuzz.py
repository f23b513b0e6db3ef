"""Each fuzzing target for a moment: its corpus, then mutations of it, the same ones in each run.

For longer, and guided by coverage: ``./dev fuzz NAME [SECONDS]``.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from fuzz.mutate import CORPUS, corpus, mutations
from fuzz.targets import NAMES, make
from fuzz.wire import TARGETS, build

RUNS = {"queue": 5000}
USUAL_RUNS = 800


@pytest.mark.parametrize("name", NAMES)
def test_corpus_and_mutations(name: str, tmp_path: Path) -> None:
    seeds = corpus(name)
    target = make(name, tmp_path)
    runs = 0
    for data in (*seeds, *islice(mutations(seeds, seed=3), RUNS.get(name, USUAL_RUNS))):
        try:
            target.run(data)
        except Exception as error:
            raise AssertionError(f"run {runs}, input {data.hex()}") from error
        runs += 1
    target.close()
    assert runs > USUAL_RUNS


def test_every_corpus_has_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {*NAMES, *TARGETS}
    size = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    assert size < 300_000, "a corpus is small"


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_agent_reads(name: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    program = build(tmp_path, name)
    result = subprocess.run(
        [program, "20000", CORPUS / name], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("20000 runs")
