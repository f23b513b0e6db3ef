"""KVM's tracepoints, counted: what its own statistics do not tell apart.

A count is a descriptor of perf's (perf_event_open(2)) for the *calling* thread, with a filter in the
kernel's language (Documentation/trace/events.rst §5). Nothing is recorded, there is no buffer to overflow,
and nothing outlives the descriptor. It takes root: tracefs, which knows the events' numbers, is closed to
others.
"""

from __future__ import annotations

import ctypes
import os

from hostel.abi import perf as abi
from hostel.errors import KvmError

from .ioctl import call, refused

PLACES = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

_libc = ctypes.CDLL(None, use_errno=True)


class TracepointCount:
    """How often ``event`` (such as ``kvm/kvm_exit``) met ``condition`` in this thread, from now on.

    ``KvmError`` where the host does not let us, or does not know the event or a field of the condition."""

    def __init__(self, event: str, condition: str = "") -> None:
        number = _number(event)
        attributes = abi.ATTR.pack(abi.TYPE_TRACEPOINT, abi.ATTR.size, number, 0, 0, 0, 0, 0, 0, 0)
        self.fd = _libc.syscall(abi.SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, abi.FLAG_FD_CLOEXEC)
        if self.fd < 0:
            raise refused("perf_event_open", _error())
        if condition:
            self._filter(condition)

    def _filter(self, condition: str) -> None:
        text = bytearray(condition.encode() + b"\0")
        try:
            call(self.fd, "PERF_EVENT_IOC_SET_FILTER", abi.EVENT_IOC_SET_FILTER, text)
        except KvmError:
            self.close()
            raise

    @property
    def value(self) -> int:
        return int.from_bytes(os.read(self.fd, 8), "little")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _number(event: str) -> int:
    """Of an event, as this kernel numbers it."""
    for place in PLACES:
        try:
            with open(f"{place}/events/{event}/id") as file:
                return int(file.read())
        except OSError as error:
            cause = error
    raise KvmError(f"tracepoint {event}: {cause.strerror}", cure="be root, with tracefs mounted")
