"""perf_event_open's numbers and layout against <linux/perf_event.h>, by a compiled probe."""

from __future__ import annotations

from pathlib import Path

from abi.c_probe import evaluate
from hostel.abi import perf as abi


def test_every_definition_agrees_with_the_header(tmp_path: Path) -> None:
    ours = {
        "__NR_perf_event_open": abi.SYS_PERF_EVENT_OPEN,
        "PERF_TYPE_TRACEPOINT": abi.TYPE_TRACEPOINT,
        "PERF_FLAG_FD_CLOEXEC": abi.FLAG_FD_CLOEXEC,
        "PERF_EVENT_IOC_SET_FILTER": abi.EVENT_IOC_SET_FILTER,
        "PERF_ATTR_SIZE_VER0": abi.ATTR.size,
    }
    for field, offset in abi.ATTR.offsets.items():
        if not field.startswith("_"):
            ours[f"offsetof(struct perf_event_attr, {field})"] = offset
    assert len(ours) > 12
    headers = ("linux/perf_event.h", "sys/ioctl.h", "sys/syscall.h")
    assert evaluate(ours, headers, tmp_path) == ours
