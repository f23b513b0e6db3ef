"""The thread of one vCPU: enter the guest, see why it came out, hand that to its owner, again.

::

    ──► vcpu.run() ──exit──► table[type(exit)] ──► bus … ─┐
          ▲                                               │
          └───────────── until stop() ────────────────────┘

Rules: nothing escapes this thread. What the guest did wrong, what KVM refused and what is a bug of
ours all become one call of ``on_error`` with a HostelError of one line, and the thread ends.
``stop`` returns soon whatever the guest does: KVM_RUN is interrupted, and no handler blocks.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from hostel.errors import GuestCrash, HostelError, HostError
from hostel.hypervisor import (
    DebugExit,
    Exit,
    FailEntry,
    HaltExit,
    HypercallExit,
    InternalError,
    Interrupted,
    IoapicEoi,
    MmioExit,
    MsrExit,
    PioExit,
    ShutdownExit,
    SystemEvent,
    UnknownExit,
    Vcpu,
)

from .bus import Bus

JOIN_SECONDS = 5.0

_INTERNAL_ERRORS = {  # KVM_INTERNAL_ERROR_*
    1: "an instruction that KVM cannot emulate",
    2: "two exceptions at once",
    3: "an exception while an event was delivered",
    4: "an unexpected exit",
}


class VcpuThread:
    """``start`` to ``stop``."""

    def __init__(
        self,
        vcpu: Vcpu,
        ports: Bus,
        mmio: Bus,
        *,
        on_event: Callable[[int], None],
        on_error: Callable[[HostelError], None],
        pcpu: int | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.tid = 0
        self._on_event = on_event
        self._on_error = on_error
        self._pcpu = pcpu
        self._stopping = False
        self._handlers: dict[type[Exit], Callable[[Any], None]] = {
            PioExit: ports.handle_pio,
            MmioExit: mmio.handle_mmio,
            Interrupted: lambda exit: None,
            SystemEvent: lambda exit: self._on_event(exit.type),
            ShutdownExit: self._crash,
            InternalError: self._crash,
            FailEntry: self._crash,
            HaltExit: self._crash,
            DebugExit: self._crash,
            MsrExit: self._crash,
            HypercallExit: self._crash,
            IoapicEoi: self._crash,
            UnknownExit: self._crash,
        }
        self._counts = dict.fromkeys(self._handlers, 0)
        self._thread = threading.Thread(
            target=self._main, name=f"hostel-vcpu{vcpu.id}", daemon=True
        )

    @property
    def exits(self) -> dict[str, int]:
        """How often each kind of exit came to us. Most exits never leave the kernel."""
        return {kind.__name__: count for kind, count in self._counts.items() if count}

    def start(self) -> None:
        self._thread.start()

    def request_stop(self) -> None:
        """Ask; from any thread, its own too. ``stop`` also waits."""
        self._stopping = True
        self.vcpu.kick()

    def stop(self, seconds: float = JOIN_SECONDS) -> bool:
        """Whether the thread has ended, at the latest after that time."""
        self.request_stop()
        if self._thread.ident is None or self._thread is threading.current_thread():
            return True
        self._thread.join(max(seconds, 0))
        return not self._thread.is_alive()

    @property
    def place(self) -> str:
        """What the thread is at, for a person."""
        return place(self._thread)

    def _main(self) -> None:
        try:
            self.tid = threading.get_native_id()
            self._pin()
            self._loop()
        except HostelError as error:
            self._on_error(error)
        except Exception as error:
            self._on_error(bug(error))

    def _loop(self) -> None:
        run, handlers, counts = self.vcpu.run, self._handlers, self._counts
        while not self._stopping:
            exit = run()
            kind = type(exit)
            counts[kind] += 1
            handlers[kind](exit)

    def _pin(self) -> None:
        if self._pcpu is None:
            return
        try:
            os.sched_setaffinity(0, {self._pcpu})  # 0 is the calling thread
        except OSError as error:
            raise HostError(
                f"vCPU {self.vcpu.id} cannot be pinned to pCPU {self._pcpu}: {error.strerror}",
                cure=f"choose among {sorted(os.sched_getaffinity(0))}",
            ) from None

    def _crash(self, exit: Exit) -> None:
        raise GuestCrash(f"vCPU {self.vcpu.id}: {describe(exit)}; {registers(self.vcpu)}")


def describe(exit: Exit) -> str:
    """A fatal exit in words."""
    match exit:
        case ShutdownExit():
            return "triple fault"
        case InternalError():
            return exit.words or _internal_error(exit)
        case FailEntry(reason):
            return f"the processor refused to enter the guest, reason {reason:#x}"
        case HaltExit():
            return "halted with no interrupt controller to wake it"
        case UnknownExit(reason):
            return f"exit {reason}, which was never asked for"
        case _:
            return f"{type(exit).__name__}, which was never asked for"


def _internal_error(exit: InternalError) -> str:
    words = _INTERNAL_ERRORS.get(exit.suberror, f"internal error {exit.suberror}")
    return f"KVM met {words} ({' '.join(f'{word:#x}' for word in exit.data[:4])})"


def registers(vcpu: Vcpu) -> str:
    """Where a vCPU is, in one line."""
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except HostelError as error:
        return f"registers unreadable: {error}"
    general = " ".join(
        f"{name}={getattr(regs, name):#x}" for name in ("rip", "rsp", "rflags", "rax", "rcx", "rdx")
    )
    control = " ".join(
        f"{name}={getattr(sregs, name):#x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")
    )
    return f"{general} cs={sregs.cs.selector:#x} {control}"


def place(thread: threading.Thread) -> str:
    """Where a thread is: its name, and its innermost code."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return f"{thread.name} has ended"
    code = frame.f_code
    return f"{thread.name} is in {code.co_name}, {code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"


def bug(error: Exception) -> HostError:
    """A mistake of ours as one line: what, and where."""
    import traceback

    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {where[0].filename.rsplit('/', 1)[-1]}:{where[0].lineno}" if where else ""
    return HostError(f"a bug in hostel: {type(error).__name__}: {error}{place}")
