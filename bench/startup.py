"""What a ``hostel`` command costs before it does anything: ``hostel --version`` against a bare
``python3 -c pass``, by the same interpreter.

Key of ``ratios``: ``time_vs_python`` (medians). ``added_ms`` is the difference of the medians; the goal
is at most 60.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from _common import interleave, ratio, report, rows

RUNS = 15
HOSTEL = [str(Path(sys.executable).with_name("hostel")), "--version"]
PYTHON = [sys.executable, "-c", "pass"]


def milliseconds(argv: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    work = {"hostel_ms": partial(milliseconds, HOSTEL), "python_ms": partial(milliseconds, PYTHON)}
    samples = interleave(work, RUNS)
    hostel, python = (statistics.median(values) for values in samples.values())
    ratios = {"time_vs_python": ratio(samples, "hostel_ms", "python_ms")}
    report("startup", rows(samples), ratios, added_ms=round(hostel - python, 2), goal_added_ms=60)


if __name__ == "__main__":
    main()
