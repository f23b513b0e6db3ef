"""perf_event_open: the part that counts a kernel's tracepoint (<linux/perf_event.h>, x86-64 numbers)."""

from __future__ import annotations

from .record import Record

SYS_PERF_EVENT_OPEN = 298
TYPE_TRACEPOINT = 2
FLAG_FD_CLOEXEC = 1 << 3
EVENT_IOC_SET_FILTER = 0x4008_2406

ATTR = Record(
    "perf_event_attr",
    type="I",
    size="I",
    config="Q",
    sample_period="Q",
    sample_type="Q",
    read_format="Q",
    _flags="Q",
    wakeup_events="I",
    bp_type="I",
    bp_addr="Q",
)
"""As far as its first version goes (64 bytes); ``_flags`` are C's bit fields."""
