"""`./dev test`: the suite in two parts, and one closing line for both.

::

    here             everything but what is marked linux_kvm
    in the testbed   what is marked linux_kvm, in one boot of it; where the server froze, or a test in it
                     stood still, what was left undone, in a fresh boot

On a host whose KVM is hardware the tests marked linux_kvm run here as well: the testbed's CPU is an
emulated one, and what a user has is not. Arguments go to pytest, in both parts.

Rules: it ends, whatever stands still, and says what did. In the testbed what stood still or failed is tried
once more, in a fresh boot: its processors are emulated, and those of its guests by that emulation, and both
were seen to go wrong. The second time is a failure; more than a few failures are, at once. What passed by a
second try is said, by name: it is a lead, not a success. Here nothing is tried twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PYTEST = [str(TOP / ".venv/bin/python"), "-m", "pytest", "--color=no"]
NO_TESTS = 5
"""pytest's exit code for a selection that is empty (an argument may name tests of one part only)."""
TESTBED_FAILED = 125
ENDED = 124
"""Our code for a pytest that we ended, as timeout(1) has it."""
BOOTS = 5
"""Of the testbed, at most."""
FEW = 3
"""Failures in the testbed that may be its own."""
BUDGET = 3300.0
"""Seconds for everything."""
PATIENCE = 400.0
"""Seconds without a byte of output. A test may take 300 here, by pytest-timeout."""
TESTBED_PATIENCE = 300.0
"""Seconds that a test takes at most in there; tools/testbed.py watches, not pytest-timeout: that raises in
one thread of a process whose others may hang, and cannot get past a kernel that does."""
IN_TESTBED = [
    *(str(TOP / "dev"), "testbed", "--patience", f"{TESTBED_PATIENCE:.0f}", "--", *PYTEST),
    *("-v", "--timeout=0", "-m", "linux_kvm"),
]
TIME_IS_UP = f"the {BUDGET / 60:.0f} minutes for all tests are over"
LAST_WORDS = 5.0
"""Seconds for a process to show where it stands (Python's faulthandler) before it is killed."""
DONE = ("PASSED", "SKIPPED", "XFAIL", "XPASS")
BAD = ("FAILED", "ERROR")
VERDICT = re.compile(rf"(.+::.+?) ({'|'.join((*BAD, *DONE))})\b")
SUMMARY = re.compile(r" in [\d.]+s( \([\d:]+\))?( =+)?$")


def say(text: str) -> None:
    print(f"dev: {text}", flush=True)


def hardware_kvm() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Path("/dev/kvm").exists() and bool({"vmx", "svm"} & set((flags or [""])[0].split()))


class Part:
    """One pytest: shown as it speaks, byte for byte, and ended where it stands still or time is up."""

    def __init__(
        self, title: str, command: Sequence[str], deadline: float, patience: float
    ) -> None:
        print(f"\n=== {title} ===", flush=True)
        self.why = ""
        """Why we ended it."""
        self.text = ""
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        with self._process:
            try:
                self._follow(deadline, patience)
            except KeyboardInterrupt:
                self._end(signal.SIGINT)
                raise
        code = self._process.returncode
        self.code = ENDED if self.why else code if code >= 0 else 128 - code

    def _follow(self, deadline: float, patience: float) -> None:
        assert self._process.stdout is not None
        pipe, heard, raw = self._process.stdout.fileno(), time.monotonic(), b""
        while select.select([pipe], [], [], max(min(deadline, heard + patience) - heard, 0))[0]:
            if not (data := os.read(pipe, 65536)):
                break
            heard, raw = time.monotonic(), raw + data
            os.write(1, data)
        else:
            silent = f"it wrote nothing for {patience:.0f} s"
            self.why = silent if time.monotonic() < deadline else TIME_IS_UP
            print(f"\ndev: {self.why}; it is ended", flush=True)
            self._end(signal.SIGABRT)
        self.text = raw.decode(errors="replace")

    def _end(self, number: signal.Signals) -> None:
        """With its process group; what has left that dies with its parent."""
        os.killpg(self._process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def counts(self) -> Counter[str]:
        """From pytest's last line."""
        lines = [line for line in self.text.splitlines() if SUMMARY.search(line)]
        return Counter(
            {what: int(n) for n, what in re.findall(r"(\d+) ([a-z]+)", "".join(lines[-1:]))}
        )

    def verdicts(self, tests: Sequence[str]) -> dict[str, str]:
        """Of the tests that were begun, in that order; "" where there is none yet. Needs ``-v``."""
        found, wanted = {}, set(tests)
        for line in self.text.splitlines():
            match = VERDICT.match(line)
            name, verdict = match.groups() if match else (line.rstrip(), "")
            if name in wanted:
                found[name] = verdict
        return found


class Boots:
    """The tests for the testbed, in as many boots as it takes, within reason."""

    def __init__(self, command: Sequence[str], tests: Sequence[str], deadline: float) -> None:
        self.command = command
        self.left = list(tests)
        self.deadline = deadline
        self.code = 0
        self.counts: Counter[str] = Counter()
        self.boots = 0
        self.stood: list[str] = []
        """The tests that a boot which did not end well was in: it stood still there, or froze."""
        self.failed: list[str] = []
        """The few that failed, and were tried once more."""
        self.hung: list[str] = []
        """Those of two boots."""
        self.saved: list[str] = []
        """What such a boot had begun, and passed in a later one."""

    def run(self) -> None:
        begun: set[str] = set()
        while self.left and self.boots < BOOTS and time.monotonic() < self.deadline:
            self.boots += 1
            title = "in the testbed: KVM with Linux" + (", a fresh boot" if self.boots > 1 else "")
            command = [*self.command, *self.left]
            part = Part(title, command, self.deadline, 2 * TESTBED_PATIENCE)
            verdicts = part.verdicts(self.left)
            self.saved += [
                test for test, verdict in verdicts.items() if test in begun and verdict in DONE
            ]
            begun |= verdicts.keys()
            if part.code in (TESTBED_FAILED, ENDED):
                self._sift(verdicts, part.why)
            else:
                self.code, self.counts, self.left = part.code, self.counts + part.counts, []
                self._doubt(part, verdicts)
        if self.hung or self.left:
            self.code = 1

    def _doubt(self, part: Part, verdicts: dict[str, str]) -> None:
        """A few failures, for the first time: they are what is left."""
        failed = [test for test, verdict in verdicts.items() if verdict in BAD]
        if failed and not self.failed and len(failed) <= FEW:
            self.code, self.failed, self.left = 0, failed, failed
            self.counts -= Counter(
                {what: part.counts[what] for what in ("failed", "error", "errors")}
            )

    def _sift(self, verdicts: dict[str, str], why: str) -> None:
        """What is kept of a boot that did not end well. What failed in it runs again, for its report is lost,
        and so does the last test, whatever its verdict: it may be what it cleared up that stood still."""
        last = next(reversed(verdicts), "")
        if last in self.stood:
            self.hung.append(last)
            self.counts["failed"] += 1
        elif last and why != TIME_IS_UP:
            self.stood.append(last)
        done = [test for test, verdict in verdicts.items() if verdict in DONE and test != last]
        self.counts.update(verdicts[test].lower() for test in done)
        self.left = [test for test in self.left if test not in (*done, *self.hung)]

    def notes(self) -> list[str]:
        notes = [f"stood still twice: {test}" for test in self.hung]
        notes += [f"failed at first: {test}" for test in self.failed if test in self.saved]
        saved = [test for test in self.saved if test not in self.hung]
        notes += [f"passed by a second try: {test}" for test in saved]
        if self.left:
            why = "the testbed failed too often" if time.monotonic() < self.deadline else TIME_IS_UP
            notes.append(f"{len(self.left)} tests did not run ({why}), from {self.left[0]} on")
        return notes


def is_path(argument: str) -> bool:
    return Path(argument.partition("::")[0]).exists()


def is_verbosity(argument: str) -> bool:
    return re.fullmatch(r"-[qv]+|--(quiet|verbose)", argument) is not None


def tests_for_testbed(arguments: list[str]) -> list[str]:
    """Which tests the arguments select is found out here, where collecting takes seconds: in there,
    collecting the whole suite took two minutes."""
    collect = [*PYTEST, "--collect-only", "-q", "-m", "linux_kvm"]
    collect += [argument for argument in arguments if not is_verbosity(argument)]
    listing = subprocess.run(collect, stdout=subprocess.PIPE, text=True, check=False).stdout
    return [line for line in listing.splitlines() if "::" in line and is_path(line)]


def main() -> int:
    arguments = sys.argv[1:]
    started = time.monotonic()
    marks = [] if hardware_kvm() else ["-m", "not linux_kvm"]
    here = Part("here", [*PYTEST, *marks, *arguments], started + BUDGET, PATIENCE)
    options = [one for one in arguments if not is_path(one) and not is_verbosity(one)]
    testbed = Boots([*IN_TESTBED, *options], tests_for_testbed(arguments), started + BUDGET)
    testbed.run()
    for note in [f"here: {here.why}"] * bool(here.why) + testbed.notes():
        say(note)
    total = here.counts + testbed.counts
    total.pop("deselected", None)
    summary = ", ".join(f"{number} {what}" for what, number in total.items()) or "no tests ran"
    print(f"\n=== {summary} in {time.monotonic() - started:.0f}s ===", flush=True)
    codes = [code for code in (here.code, testbed.code) if code != NO_TESTS]
    return max(codes, default=NO_TESTS) if total else NO_TESTS


if __name__ == "__main__":
    sys.exit(main())
