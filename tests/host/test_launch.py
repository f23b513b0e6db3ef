"""What a file server of an ordinary user may do besides serving: a shell in its place tries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostel.host import jail

STRANGER = 54322
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="plays another user: needs root"),
    pytest.mark.skipif(jail.landlock_version() < 2, reason="this kernel has no Landlock"),
]

TRIES = """
cd /proc/self/fd/$HOSTEL_SHARE && cat file
echo changed > file && echo wrote in the share
echo no > "$OUTSIDE/new" && echo wrote outside
cat "$OUTSIDE/own" && echo read outside
ls /proc/self/fd/$HOSTEL_SHARE/..
"""


def tries(tmp_path: Path, mode: str) -> str:
    """What ``TRIES`` prints as the server of a share with a ``file`` in it, by its owner."""
    share, outside, stage = (tmp_path / name for name in ("share", "outside", "stage"))
    for folder in (share, outside, stage):
        folder.mkdir()
        os.chown(folder, STRANGER, STRANGER)
    for path in (share / "file", outside / "own"):
        path.write_text(f"{path.name}\n")
        os.chown(path, STRANGER, STRANGER)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o755)
    code = tmp_path / "code/hostel/host"
    code.mkdir(parents=True)
    for name in ("host/launch.py", "host/jail.py", "host/__init__.py", "__init__.py"):
        (tmp_path / "code/hostel" / name).write_bytes(
            (Path(jail.__file__).parents[1] / name).read_bytes()
        )
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if not os.path.exists(python):
        pytest.skip(f"no {python}: nobody else may run {sys.executable}, perhaps")
    what = (str(share), "", str(stage), mode, "/bin/sh", "-c", TRIES)
    done = subprocess.run(
        [python, "-IS", code / "launch.py", str(os.getpid()), "", *what],
        user=STRANGER,
        group=STRANGER,
        extra_groups=[],
        env={"OUTSIDE": str(outside), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert not (outside / "new").exists()
    assert (share / "file").read_text() == ("changed\n" if mode == "rw" else "file\n"), done.stderr
    return done.stdout


def test_server_of_a_writable_share_has_that_and_nothing_else(tmp_path: Path) -> None:
    assert tries(tmp_path, "rw") == "file\nwrote in the share\nfile\n"  # nothing is above it


def test_server_of_a_read_only_share_writes_nowhere(tmp_path: Path) -> None:
    assert "wrote" not in tries(tmp_path, "ro")
