"""Helper processes: QEMU, virtiofsd and whatever else runs beside a machine.

The rule: nothing of ours outlives us, however we end.

::

    ends normally      stop(): TERM, then KILL, by pidfd; reaped; its record removed
    we are killed      the kernel kills it: parent-death signal, set before the program starts
    not even that      the record (pid and start time) lets the next start find it: runtime.sweep()

A parent-death signal is sent when the *thread* that forked ends (prctl(2), PR_SET_PDEATHSIG). So all
helpers are started by one thread that lives as long as this process, ``_loop()``; it also reads what
they write to standard error, and reaps them. No code of ours runs between fork and exec, where a
process with threads may do next to nothing: ``setpriv`` sets the signal, and a shell then checks that
we are still there, for a parent that died before that is never reported.

Helpers get a session of their own: a Ctrl-C in the caller's terminal is for the guest, not for them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hostel.errors import HelperError
from hostel.vmm.loop import EventLoop

from . import toolbox

RECORD_SUFFIX = ".pid"
LOG_SUFFIX = ".log"
LOG_LIMIT = 1 << 20
TAIL_LIMIT = 4 << 10
GRACE = 2.0
"""Seconds from TERM to KILL."""
KILL_SECONDS = 30.0
"""And from KILL to its end: a large guest's memory takes a while to give back."""

_GUARD = 'test "$PPID" -eq "$0" && exec "$@"'


class Helper:
    """One running helper process. Thread-safe."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        runtime: Path,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        guarded: bool = False,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """Start it. ``guarded``: the program itself sets its parent-death signal, first thing.

        ``pass_fds`` stay the caller's to close. ``on_end`` is called once, on the helpers' thread.
        """
        self.name = name
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._on_end = on_end
        self._prefix = f"{os.path.basename(argv[0])}: "
        self._code = 0
        self._tail = b""
        self._written = 0
        self._record = runtime / f"{name}{RECORD_SUFFIX}"
        self._log_path = runtime / f"{name}{LOG_SUFFIX}"
        self._stderr, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write_end, True)
        command = list(argv) if guarded else [*_guard(), *argv]
        try:
            self.pid = _spawn(command, (write_end, *pass_fds), os.environ if env is None else env)
        except OSError as error:
            os.close(self._stderr)
            raise HelperError(f"cannot start {name}: {error.strerror}") from None
        finally:
            os.close(write_end)
        self._pidfd = os.pidfd_open(self.pid)
        with contextlib.suppress(OSError):  # a full disk: it only costs the sweep a trace
            self._record.write_text(f"{self.pid} {start_time(self.pid)}\n")
        _loop().add(self._stderr, self._read)
        _loop().add(self._pidfd, self._reap)

    def alive(self) -> bool:
        return not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code (negative: the signal), or None if it still runs after ``timeout`` seconds."""
        return self._code if self._ended.wait(timeout) else None

    def kill(self) -> None:
        """At once; does not wait."""
        self._signal(signal.SIGKILL)

    def stop(self, grace: float = GRACE) -> int:
        """End it and wait until it has gone. Idempotent."""
        self._signal(signal.SIGTERM)
        if not self._ended.wait(grace):
            self.kill()
            if not self._ended.wait(KILL_SECONDS):  # it hangs in the kernel
                raise HelperError(
                    f"{self.name} (process {self.pid}) does not end, though it was killed",
                    cost="what it holds stays taken",
                )
        return self._code

    def usage(self) -> dict[str, int | float]:
        """What it has used so far, while it lives (proc(5), /proc/pid/stat)."""
        fields = _stat(self.pid)
        ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        used = {"cpu_seconds": (int(fields[11]) + int(fields[12])) / ticks} if fields else {}
        resident = {"resident_bytes": int(fields[21]) * page} if fields else {}
        return {"pid": self.pid, **used, **resident}

    def last_lines(self, count: int = 3) -> str:
        """The end of what it wrote to standard error."""
        lines = self._tail.decode("utf-8", "replace").splitlines()
        clean = (line.removeprefix(self._prefix).strip() for line in lines)
        return "\n".join([line for line in clean if line][-count:])

    def failure(self) -> HelperError:
        """An error that says how it ended, in one line, with its own last words."""
        how = f"ended with {self._code}"
        if self._code < 0:
            how = f"was ended by {_signal_name(-self._code)}"
        words = " | ".join(self.last_lines().splitlines()) or "it said nothing"
        return HelperError(f"{self.name} {how}: {words}")

    def _signal(self, number: int) -> None:
        with self._lock:
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    # -- on the helpers' thread ---------------------------------------------------------------

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._take():
                _loop().remove(self._stderr)

    def _take(self) -> bool:
        """Read what it wrote; False at the end of it."""
        data = os.read(self._stderr, 1 << 16)
        self._tail = (self._tail + data)[-TAIL_LIMIT:]
        room = LOG_LIMIT - self._written
        self._written += len(data)
        if data and room > 0:
            with contextlib.suppress(OSError), self._log_path.open("ab") as log:
                log.write(data[:room])
        return bool(data)

    def _reap(self) -> None:
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with contextlib.suppress(BlockingIOError):
            while self._take():
                pass
        loop = _loop()
        loop.remove(self._stderr)
        loop.remove(self._pidfd)
        os.close(self._stderr)
        with self._lock:
            os.close(self._pidfd)
            self._pidfd = -1
        with contextlib.suppress(OSError):
            self._record.unlink(missing_ok=True)
        self._ended.set()
        if self._on_end:
            self._on_end()


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process.

    Together with the pid it names one process for good (proc(5), /proc/pid/stat, field 22).
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/pid/stat from the third on, the state; none if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return stat[stat.rindex(")") + 2 :].split()


def kill_recorded(record: Path) -> bool:
    """Kill the process that a helper's record names, if it is still that one."""
    try:
        pid, started = (int(word) for word in record.read_text().split())
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):  # gone, or its record was cut short
        return False
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], GRACE)
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)


def _guard() -> list[str]:
    setpriv = toolbox.find("setpriv", package="util-linux", cost="no helper process can be guarded")
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _GUARD, str(os.getpid())]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_lock = threading.Lock()
_loops: dict[int, EventLoop] = {}


def _loop() -> EventLoop:
    """The helpers' thread: one a process, for good. A fork of this process makes its own."""
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = EventLoop(on_error=_show)
            loop.start()
        return loop


def _show(error: Exception) -> None:
    sys.excepthook(type(error), error, error.__traceback__)


def _spawn(argv: list[str], fds: Sequence[int], env: Mapping[str, str]) -> int:
    """Start a program on the helpers' thread; its standard error is ``fds[0]``."""
    result: list[int | OSError] = []
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, fds[0], 2),
        # onto itself: that makes it inheritable in the child only (posix_spawn(3), glibc 2.29)
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds[1:]),
    ]

    def run() -> None:
        try:
            result.append(
                os.posix_spawn(
                    argv[0],
                    argv,
                    env,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM),
                )
            )
        except OSError as error:
            result.append(error)

    _loop().run_sync(run)
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
