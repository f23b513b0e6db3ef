"""The signal that gets a thread out of ``KVM_RUN``.

``kvm_run.immediate_exit`` alone stops the *next* entry; a vCPU that is in the guest comes out only
for a signal to its thread (api.rst §5, "immediate_exit"). The handler has nothing to do, for the
signal's arrival is the message. Python installs handlers in the main thread only and runs them
there, so ours is installed with libc's ``sigaction`` and is a libc function that neither touches
memory nor errno when called with the signal's number: ``abs``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading

from hostel.errors import HostError

_SA_RESTART = 0x1000_0000
_SYS_TGKILL = 234  # x86-64; libc wraps it in newer versions only

_libc = ctypes.CDLL(None, use_errno=True)


class _Sigaction(ctypes.Structure):
    """libc's ``struct sigaction`` on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Here(threading.local):
    """The calling thread, ready to be kicked: it may have inherited a mask that blocks the signal.

    Made once a thread and gone with it. A cache by ``get_ident`` would be wrong: the next thread may
    get the same one.
    """

    def __init__(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {kick_signal()})
        self.thread = threading.get_native_id()


def kick_thread(thread: int) -> None:
    """Interrupt a thread of this process by its kernel id. One that has ended is no error."""
    _libc.syscall(_SYS_TGKILL, os.getpid(), thread, kick_signal())


@functools.cache
def kick_signal() -> int:
    """A real-time signal that nobody in this process uses, with our handler installed."""
    handler = ctypes.cast(_libc.abs, ctypes.c_void_p).value
    for number in range(signal.SIGRTMIN + 1, signal.SIGRTMAX):
        found = _Sigaction()
        _libc.sigaction(number, None, ctypes.byref(found))
        if found.handler in (None, handler):
            # SA_RESTART spares the thread's other system calls an EINTR; KVM_RUN gives it anyway.
            ours = _Sigaction(handler=handler, flags=_SA_RESTART)
            _libc.sigaction(number, ctypes.byref(ours), None)
            return number
    raise HostError("every real-time signal of this process is taken")


here = _Here()
