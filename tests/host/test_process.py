"""Helper processes: their life, and that it ends with ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.killed import Victim, gone_within, lives
from hostel.errors import HelperError
from hostel.host import process
from hostel.host.process import Helper

Start = Callable[..., Helper]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a shell command as a helper; all are stopped at the end."""
    helpers: list[Helper] = []

    def run(script: str, name: str = "helper", **keywords: object) -> Helper:
        argv = ("/bin/sh", "-c", script)
        helpers.append(Helper(name, argv, runtime=tmp_path, **keywords))  # type: ignore[arg-type]
        return helpers[-1]

    yield run
    for helper in helpers:
        helper.stop(0)


def test_end_is_seen_and_told(start: Start) -> None:
    seen = threading.Event()
    helper = start("echo one >&2; echo sh: two >&2; exit 3", on_end=seen.set)
    assert helper.wait(5) == 3
    assert seen.wait(5)
    assert not helper.alive()
    assert str(helper.failure()) == "helper ended with 3: one | two"


def test_failure_names_the_signal(start: Start) -> None:
    helper = start("kill -SEGV $$")
    assert helper.wait(5) == -signal.SIGSEGV
    assert str(helper.failure()) == "helper was ended by SIGSEGV: it said nothing"


def test_stop_kills_what_ignores_term(start: Start) -> None:
    helper = start("trap '' TERM; echo ready >&2; while :; do sleep 1; done")
    while not helper.last_lines():
        time.sleep(0.01)
    assert helper.wait(0) is None
    assert helper.stop(grace=0.1) == -signal.SIGKILL
    assert not lives(helper.pid)
    assert helper.stop() == -signal.SIGKILL  # again: nothing


def test_stop_waits_a_bounded_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that hangs in the kernel, here one that is not killed."""
    helper = start("trap '' TERM; echo ready >&2; while :; do sleep 1; done")
    while not helper.last_lines():
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr("hostel.host.process.KILL_SECONDS", 0.1)
        patch.setattr(helper, "kill", lambda: None)
        with pytest.raises(HelperError, match=f"process {helper.pid}.* does not end"):
            helper.stop(grace=0.1)
    assert helper.stop(0) == -signal.SIGKILL


def test_record_names_it_while_it_lives(start: Start, tmp_path: Path) -> None:
    helper = start("exec sleep 100", name="sleeper")
    pid, started = (tmp_path / "sleeper.pid").read_text().split()
    assert (int(pid), int(started)) == (helper.pid, process.start_time(helper.pid))
    helper.stop()
    assert not (tmp_path / "sleeper.pid").exists()


def test_log_is_bounded(start: Start, tmp_path: Path) -> None:
    helper = start("yes | head -c 5000000 >&2; echo last >&2")
    assert helper.wait(30) == 0
    assert (tmp_path / "helper.log").stat().st_size == process.LOG_LIMIT
    assert helper.last_lines(1) == "last"


def test_missing_program_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HelperError, match="cannot start nothing: No such file or directory"):
        Helper("nothing", ("/no/such/program",), runtime=tmp_path, guarded=True)
    assert list(tmp_path.iterdir()) == []


def test_descriptors_are_passed_and_no_others(start: Start) -> None:
    reader, writer = os.pipe()
    other, _other = os.pipe()
    try:
        fds = "/proc/self/fd"
        script = f"echo hello > {fds}/{writer} && ! test -e {fds}/{other}"
        assert start(script, pass_fds=(writer,)).wait(5) == 0
        assert os.read(reader, 100) == b"hello\n"
    finally:
        for fd in (reader, writer, other, _other):
            os.close(fd)


def test_interrupt_from_the_terminal_does_not_reach_it(start: Start) -> None:
    helper = start("exec sleep 100")
    assert os.getsid(helper.pid) == helper.pid != os.getsid(0)


def test_outlives_the_thread_that_asked_for_it(start: Start) -> None:
    helpers: list[Helper] = []
    thread = threading.Thread(target=lambda: helpers.append(start("exec sleep 100")))
    thread.start()
    thread.join()
    assert helpers[0].wait(0.3) is None


def test_many_leave_no_descriptor(start: Start) -> None:
    start("true").wait(5)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(20):
        assert start("true", name=f"helper{index}").wait(5) == 0
    assert len(os.listdir("/proc/self/fd")) == before


PARENT = """
import sys, time
from pathlib import Path
from hostel.host.process import Helper
helper = Helper("sleeper", ("/bin/sleep", "1000"), runtime=Path(sys.argv[1]))
print(helper.pid, flush=True)
time.sleep(1000)
"""


def test_killed_parent_takes_it_along(tmp_path: Path) -> None:
    with Victim(PARENT, str(tmp_path)) as parent:
        pid = int(parent.line)
        assert lives(pid)
        parent.kill()
        assert gone_within(pid, 1.0)


def test_program_does_not_start_when_the_parent_is_gone(tmp_path: Path) -> None:
    """Between fork and the parent-death signal: the guard then sees another parent."""
    *guard, parent = process._guard()
    assert int(parent) == os.getpid()
    mark = str(tmp_path / "mark")
    assert subprocess.run([*guard, parent, "touch", mark], check=False).returncode == 0
    os.unlink(mark)
    assert subprocess.run([*guard, "1", "touch", mark], check=False).returncode != 0
    assert not os.path.exists(mark)


def test_recorded_process_is_killed_only_if_it_is_the_same(tmp_path: Path) -> None:
    record = tmp_path / "sleeper.pid"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as other:
        try:
            record.write_text(f"{other.pid} {(process.start_time(other.pid) or 0) + 1}\n")
            assert not process.kill_recorded(record)
            assert other.poll() is None
            record.write_text(f"{other.pid} {process.start_time(other.pid)}\n")
            assert process.kill_recorded(record)
            assert other.wait(5) == -signal.SIGKILL
        finally:
            other.kill()


@pytest.mark.parametrize("text", ["", "12", "x y", "99999999 1", "-1 1"])
def test_broken_record_is_ignored(tmp_path: Path, text: str) -> None:
    record = tmp_path / "x.pid"
    record.write_text(text)
    assert not process.kill_recorded(record)
