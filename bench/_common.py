"""What every benchmark shares: interleaved runs, rows of samples, and one JSON object at the end.

::

    samples = interleave({"hostel_us": ours, "c_us": theirs}, runs=5)   # ours, theirs, ours, theirs …
    report("exit", rows(samples), {"time_vs_c": ratio(samples, "hostel_us", "c_us")})

A figure alone says little about a host that others use too: what counts is a ratio of medians from
runs that took turns. A row's unit is the end of its key (``boot_ms``, ``read_mb_per_s``) or named.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

UNITS = {"mb_per_s": "MB/s", "per_s": "1/s", "ns": "ns", "us": "µs", "ms": "ms", "s": "s"}
UNITS |= {"mib": "MiB", "kib": "KiB", "count": "count"}

Rows = dict[str, dict[str, Any]]


def interleave(work: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Each piece of work in turn, ``runs`` times."""
    samples: dict[str, list[float]] = {label: [] for label in work}
    for _ in range(runs):
        for label, once in work.items():
            samples[label].append(once())
    return samples


def rows(samples: Mapping[str, Sequence[float]], unit: str = "") -> Rows:
    """Minimum, median and maximum of each row; ``unit``: of them all, where the keys do not say."""
    return {
        key: {
            "min": _short(min(values)),
            "median": _short(statistics.median(values)),
            "max": _short(max(values)),
            "unit": unit or _unit(key),
            "runs": len(values),
        }
        for key, values in samples.items()
    }


def ratio(samples: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float:
    """Of the medians: hostel divided by the peer."""
    return statistics.median(samples[ours]) / statistics.median(samples[theirs])


def report(
    name: str,
    rows: Rows,
    ratios: Mapping[str, float],
    *,
    versions: Mapping[str, str] | None = None,
    **more: object,
) -> None:
    """Print the one JSON object of a benchmark. ``versions``: of the peers; ``more``: its own keys."""
    result: dict[str, object] = {
        "bench": name,
        "host": host(),
        "versions": {"python": platform.python_version(), "hostel": _hostel(), **(versions or {})},
        "rows": rows,
        "ratios": {key: _short(value) for key, value in ratios.items()},
        **more,
    }
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False)
    print()


def host() -> dict[str, Any]:
    from hostel.kvm.probe import probe

    report = probe()
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "kvm": report.reason,
        "load": _short(os.getloadavg()[0]),
        "testbed": os.environ.get("HOSTEL_TESTBED") == "1",
    }


def _hostel() -> str:
    from importlib.metadata import version

    return version("hostel")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _unit(key: str) -> str:
    return next((unit for end, unit in UNITS.items() if key.endswith("_" + end)), "")


def _short(value: float) -> float:
    """Four significant digits: the rest is noise."""
    return float(f"{value:.4g}")
