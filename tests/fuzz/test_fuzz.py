"""Each fuzzing target for a moment: its corpus, then mutations of it, the same ones in each run.

Then guided by coverage, where there is atheris; for longer: ``./dev fuzz NAME [SECONDS]``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from fuzz import campaign
from fuzz.mutate import CORPUS, corpus, mutations
from fuzz.targets import NAMES, make
from fuzz.wire import TARGETS, build

RUNS = {"queue": 5000}
USUAL_RUNS = 800
SECONDS = 3
"""Of a guided campaign."""


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


@pytest.mark.skipif(find_spec("atheris") is None, reason="no atheris: pip install -e .[fuzz]")
@pytest.mark.parametrize("name", NAMES)
def test_a_guided_campaign(name: str, tmp_path: Path) -> None:
    command = [sys.executable, campaign.__file__, name, str(SECONDS), "7"]
    folders = os.pathsep.join((str(CORPUS.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": folders}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None
    assert int(runs[1]) > len(corpus(name))
    assert "cov: " in done.stderr, "guided by what of hostel was reached"


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
