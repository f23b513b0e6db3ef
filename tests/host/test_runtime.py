"""Runtime directories: one owner each, and no leftovers of the killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.killed import Victim, gone_within, lives
from hostel.errors import HostError, UserError
from hostel.host import runtime
from hostel.host.runtime import Runtime, socket_path, sweep


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "hostel"
    sweep()


def test_made_for_us_alone_and_removed(place: Path) -> None:
    with Runtime("web") as one:
        assert one.path == place / "web"
        assert one.path.stat().st_mode & 0o777 == 0o700
        assert place.stat().st_mode & 0o777 == 0o700
        (one.path / "some.sock").touch()
    assert not one.path.exists()
    one.close()  # again: nothing


def test_a_name_is_taken_while_its_machine_lives() -> None:
    with Runtime("web"), pytest.raises(UserError, match="a machine named web runs already"):
        Runtime("web")
    Runtime("web").close()


def test_sweep_spares_the_living() -> None:
    with Runtime("web") as one:
        assert sweep() == []
        assert one.path.is_dir()


KILLED = """
import subprocess, sys, time
from hostel.host.process import start_time
from hostel.host.runtime import Runtime
runtime = Runtime("web")
survivor = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL)
(runtime.path / "survivor.pid").write_text(f"{survivor.pid} {start_time(survivor.pid)}\\n")
(runtime.path / "some.sock").touch()
(runtime.path / "stage").mkdir()
print(survivor.pid, flush=True)
time.sleep(1000)
"""


def test_sweep_clears_away_what_a_killed_one_left(place: Path) -> None:
    with Victim(KILLED) as victim:
        pid = int(victim.line)
        assert sweep() == []
        victim.kill()
    assert lives(pid)
    assert sweep() == ["web"]
    assert gone_within(pid, 1.0)
    assert not (place / "web").exists()
    assert sweep() == []


def test_a_killed_ones_name_is_free_without_a_sweep() -> None:
    with Victim(KILLED) as victim:
        pid = int(victim.line)
        victim.kill()
    with Runtime("web"):
        assert gone_within(pid, 1.0)


def test_directory_without_a_lock_is_a_leftover(place: Path) -> None:
    sweep()
    (place / "half").mkdir()
    assert sweep() == ["half"]


def test_starts_and_sweeps_at_once() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with Runtime() as one:
                    sweep()
                    assert (one.path / "lock").exists()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_starts_of_one_name_in_many_processes() -> None:
    script = """
from hostel.host.runtime import Runtime
from hostel.errors import UserError
import time
try:
    with Runtime("web"):
        time.sleep(1)
        print("mine")
except UserError:
    print("taken")
"""
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = sorted(process.communicate(timeout=30)[0].strip() for process in running)
    assert said == ["mine", "taken", "taken", "taken"]


def test_a_place_that_others_can_enter_is_refused(place: Path) -> None:
    place.mkdir(mode=0o755)
    with pytest.raises(HostError, match="not a directory that only this user can enter"):
        Runtime("web")
    place.chmod(0o700)


def test_a_link_in_its_place_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="not a directory that only this user can enter"):
        runtime.base()
    place.unlink()


def test_without_xdg_it_is_in_run_or_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    uid = os.geteuid()
    assert runtime.base() == Path("/run/hostel" if uid == 0 else f"/tmp/hostel-{uid}")


def test_a_place_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostel").touch()
    with pytest.raises(HostError, match=r"cannot use .*/hostel: File exists"):
        Runtime("web")
    (tmp_path / "hostel").unlink()


def test_socket_paths_fit() -> None:
    with Runtime("web") as one:
        assert socket_path(one.path, "root") == one.path / "root.sock"
        with pytest.raises(HostError, match="too long for a socket"):
            socket_path(one.path, "x" * 108)
