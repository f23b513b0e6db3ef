"""The user's cache: entries whole or not at all, whoever dies meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostel import HostError, cache

WORKER = """
import sys, time, pathlib
from hostel import cache
with cache.workshop(pathlib.Path(sys.argv[1])) as work:
    (work / "half").write_bytes(b"half")
    print(work, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_the_killed_left_goes_and_what_the_living_make_stays(folder: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        works = []
        for worker in workers:
            assert worker.stdout
            works.append(Path(worker.stdout.readline().strip()))
        assert all((work / "half").exists() for work in works)
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        cache.store(folder / "entry", b"whole")
        assert names(folder) == {"entry", works[1].name}
        assert (works[1] / "half").exists()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    cache.store(folder / "entry", b"anew")
    assert names(folder) == {"entry"}
    assert (folder / "entry").read_bytes() == b"anew"


def test_a_failure_leaves_nothing(folder: Path) -> None:
    (folder / "entry").mkdir()
    with pytest.raises(HostError, match=r"entry cannot be written: Is a directory; make room"):
        cache.store(folder / "entry", b"whole")
    assert names(folder) == {"entry"}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="gone cannot be written: No such file"):
        cache.store(tmp_path / "gone" / "entry", b"whole")
