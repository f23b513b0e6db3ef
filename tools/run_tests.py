"""`./dev test`: the suite in two runs, and one closing line for both.

    here                 everything but what is marked linux_kvm
    in the testbed       what is marked linux_kvm, in one boot of it

On a host whose KVM is hardware the tests marked linux_kvm run here as well: the testbed's CPU is an
emulated one, and what a user has is not. Arguments go to pytest, in both runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PYTEST = [str(TOP / ".venv/bin/python"), "-m", "pytest", "--color=no"]
NO_TESTS = 5
"""pytest's exit code for a selection that is empty (an argument may name tests of one run only)."""
TESTBED_FAILED = 125
TESTBED_TRIES = 3
SLOW = "--timeout=1200"
"""Seconds a test may take in the testbed, an emulated CPU: several times what it may take here."""
IN_TESTBED = [str(TOP / "dev"), "testbed", "--", *PYTEST, SLOW, "-m", "linux_kvm"]


def hardware_kvm() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Path("/dev/kvm").exists() and bool({"vmx", "svm"} & set((flags or [""])[0].split()))


def run(title: str, command: list[str]) -> tuple[int, Counter[str]]:
    """Run pytest, show what it says as it comes, and read the counts off its last line."""
    print(f"\n=== {title} ===", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    counts: Counter[str] = Counter()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.search(r" in [\d.]+s( \([\d:]+\))?( =+)?$", line):
            counts = Counter({what: int(n) for n, what in re.findall(r"(\d+) ([a-z]+)", line)})
    return process.wait(), counts


def is_path(argument: str) -> bool:
    return Path(argument.partition("::")[0]).exists()


def testbed_command(arguments: list[str]) -> list[str]:
    """Empty if the arguments select no test for the testbed. Which tests they select is found out here,
    where collecting takes seconds: in there, collecting the whole suite took two minutes."""
    quiet = [
        argument for argument in arguments if not re.match(r"-[qv]+$|--(quiet|verbose)$", argument)
    ]
    collect = [*PYTEST, "--collect-only", "-q", "-m", "linux_kvm", *quiet]
    listing = subprocess.run(collect, stdout=subprocess.PIPE, text=True, check=False).stdout
    tests = [line for line in listing.splitlines() if "::" in line and is_path(line)]
    options = [argument for argument in arguments if not is_path(argument)]
    return [*IN_TESTBED, *options, *tests] if tests else []


def main() -> int:
    arguments = sys.argv[1:]
    here = [] if hardware_kvm() else ["-m", "not linux_kvm"]
    started = time.monotonic()
    runs = [run("here", [*PYTEST, *here, *arguments])]
    if testbed := testbed_command(arguments):
        runs.append(run("in the testbed: KVM with Linux", testbed))
        for _ in range(TESTBED_TRIES - 1):
            if runs[-1][0] != TESTBED_FAILED:
                break
            print("dev: the testbed itself failed; once more", flush=True)
            runs[-1] = run("in the testbed, once more", testbed)
    total = sum((counts for _, counts in runs), Counter())
    total.pop("deselected", None)
    summary = ", ".join(f"{number} {what}" for what, number in total.items()) or "no tests ran"
    codes = [code for code, _ in runs if code != NO_TESTS]
    print(f"\n=== {summary} in {time.monotonic() - started:.0f}s ===", flush=True)
    return max(codes, default=NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
