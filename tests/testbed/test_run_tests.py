"""`./dev test` ends, whatever stands still. A pytest that ends with 125 plays a testbed that froze."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import run_tests
from run_tests import ENDED, TESTBED_FAILED, TIME_IS_UP, Boots, Part

PYTEST = [sys.executable, "-m", "pytest", "-v", "--color=no", "-c", "/dev/null"]
SUITE = f"""
import os
from pathlib import Path
import pytest

def freeze(times):
    begun = Path("begun")
    begun.write_text((begun.read_text() if begun.exists() else "") + "x")
    if len(begun.read_text()) <= times:
        os._exit({TESTBED_FAILED})

@pytest.fixture(scope="module")
def machine():
    yield
    STOP

def test_before(machine): pass
def test_red(): assert 1 == 2
@pytest.mark.parametrize("text", ["x y"])
def test_freezes(text): CALL
def test_after(): pass
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def suite(call: str = "pass", stop: str = "pass", *, red: bool = False) -> list[str]:
    """Write it; its tests."""
    text = SUITE.replace("CALL", call).replace("STOP", stop)
    Path("test_suite.py").write_text(text if red else text.replace("assert 1 == 2", "pass"))
    names = ("before", "red", "freezes[x y]", "after")
    return [f"test_suite.py::test_{name}" for name in names]


def run(tests: list[str], seconds: float = 60) -> Boots:
    testbed = Boots(PYTEST, tests, time.monotonic() + seconds)
    testbed.run()
    return testbed


def test_one_boot_is_enough() -> None:
    testbed = run(suite())
    assert (testbed.code, testbed.boots, testbed.notes()) == (0, 1, [])
    assert testbed.counts == Counter(passed=4)


def test_a_failure_is_tried_once_more() -> None:
    tests = suite(red=True)
    testbed = run(tests)
    assert (testbed.code, testbed.boots, testbed.notes()) == (1, 2, [])
    assert testbed.counts == Counter(passed=3, failed=1)


def test_what_passes_then_is_said() -> None:
    tests = suite("assert Path('tried').exists() or Path('tried').touch()")
    testbed = run(tests)
    assert (testbed.code, testbed.boots) == (0, 2)
    assert testbed.counts == Counter(passed=4)
    assert testbed.notes() == [
        f"failed at first: {tests[2]}",
        f"passed by a second try: {tests[2]}",
    ]


def test_more_than_a_few_failures_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_tests, "FEW", 0)
    testbed = run(suite(red=True))
    assert (testbed.code, testbed.boots) == (1, 1)
    assert testbed.counts == Counter(passed=3, failed=1)


def test_what_a_frozen_server_left_undone_runs_in_another() -> None:
    tests = suite("freeze(1)", red=True)
    testbed = run(tests)
    assert (testbed.code, testbed.boots) == (1, 3)
    assert testbed.counts == Counter(passed=3, failed=1), "what failed has its report"
    assert testbed.notes() == [f"passed by a second try: {tests[2]}"]


def test_a_test_that_stands_still_twice_has_failed() -> None:
    tests = suite("freeze(2)")
    testbed = run(tests)
    assert (testbed.code, testbed.boots) == (1, 3)
    assert testbed.counts == Counter(passed=3, failed=1)
    assert testbed.notes() == [f"stood still twice: {tests[2]}"]


def test_what_is_cleared_up_counts_for_the_last_test() -> None:
    tests = suite(stop="freeze(1)")
    testbed = run(tests)
    assert (testbed.code, testbed.boots) == (0, 2)
    assert testbed.counts == Counter(passed=4)
    assert testbed.notes() == [f"passed by a second try: {tests[3]}"]


def test_a_testbed_that_never_comes_up() -> None:
    testbed = Boots(["sh", "-c", f"exit {TESTBED_FAILED}"], ["a::b", "a::c"], time.monotonic() + 60)
    testbed.run()
    assert (testbed.code, testbed.boots) == (1, run_tests.BOOTS)
    assert testbed.notes() == ["2 tests did not run (the testbed failed too often), from a::b on"]


def test_time_is_up() -> None:
    tests = suite("import time; time.sleep(60)")
    begin = time.monotonic()
    testbed = run(tests, seconds=3)
    assert time.monotonic() - begin < 10
    assert (testbed.code, testbed.boots) == (1, 1)
    assert testbed.counts == Counter(passed=2)
    assert testbed.notes() == [f"2 tests did not run ({TIME_IS_UP}), from {tests[2]} on"]


def test_silence_ends_a_part(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it says where it stood; whatever it does about signals, and whatever it has started."""
    monkeypatch.setattr(run_tests, "LAST_WORDS", 1.0)
    script = """
import faulthandler, signal, subprocess, time
faulthandler.enable()
def stands_still():
    time.sleep(60)
print("started", flush=True)
stands_still()
"""
    begin = time.monotonic()
    part = Part("here", [sys.executable, "-c", script], begin + 60, 1)
    assert (part.code, part.why, part.text) == (ENDED, "it wrote nothing for 1 s", "started\n")
    assert "stands_still" in capfd.readouterr().err
    part = Part("here", ["sh", "-c", "trap : ABRT; sleep 60; sleep 60"], begin + 60, 1)
    assert part.code == ENDED
    assert time.monotonic() - begin < 20
