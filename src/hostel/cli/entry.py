"""The command line as a whole: verbs, exit codes, errors.

::

    0       --help, --version, and verbs that did what they were asked
    CMD's   `hostel run`: the command's own exit code; 128+N if a signal ended it
    124     --timeout has passed
    125     hostel itself failed: bad usage, the host, the guest, a bug
    126/127 the command cannot be executed / was not found
    130     Ctrl-C

Every failure becomes one line on standard error here, and nowhere else.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from hostel.errors import HostelError, MachineTimeout

from .lean import import_packages
from .say import say

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

_COMPLETE = "_HOSTEL_COMPLETE"

_START_MACHINES = ("run", "boot")

OK = 0
TIMED_OUT = 124
FAILED = 125


class EndedBySignal(BaseException):
    """A signal ends the command now. No ``Exception``: nothing may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def command_line(argv: Sequence[str]) -> int:
    """Run ``hostel argv…``; the exit code."""
    _open_streams()
    code = _run(list(argv))
    # Python's own end shows a traceback of an exception; a further Ctrl-C must not change the exit code.
    for handler in (_interrupt, _interrupt_once):
        _signals(handler, signal.SIG_IGN, (signal.SIGINT,))
    _signals(_interrupt, signal.SIG_DFL)
    try:
        sys.stdout.flush()
    except OSError as error:
        return failure(error)
    return code


def _open_streams() -> None:
    """A closed standard stream becomes /dev/null: else the next file opened would be it, and a guest's
    output would land there."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _signals(
    before: object,
    handler: Callable[[int, object], None] | signal.Handlers,
    numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
) -> None:
    """What is ignored, as under nohup(1), stays so."""
    for number in numbers:
        if signal.getsignal(number) is before:
            signal.signal(number, handler)


def _interrupt(number: int, _frame: object) -> None:
    """Leave by an exception, so that every ``finally`` is run."""
    raise EndedBySignal(number)


def hear_one_interrupt() -> None:
    """A second Ctrl-C is not heard: what the first one leaves has to be finished (a recording's seal)."""
    _signals(_interrupt, _interrupt_once, (signal.SIGINT,))


def _interrupt_once(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise EndedBySignal(number)


def _run(argv: list[str]) -> int:
    if _COMPLETE in os.environ:
        from . import clicked

        clicked.complete(argv, _COMPLETE)
    try:
        _signals(signal.SIG_DFL, _interrupt)
        return _call(argv)
    except EndedBySignal as error:
        return 128 + error.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return failure(error)


def _call(argv: list[str]) -> int:
    """The short way, or click's (``line.py``)."""
    if argv and argv[0] in _START_MACHINES:
        from importlib import import_module

        from .line import Verb, read

        verb: Verb = import_module(f".{argv[0]}", __package__).VERB
        if (line := read(verb, argv[1:])) is not None:
            return verb.call(line)
    import_packages("click")
    from . import clicked

    return clicked.call(argv)


def failure(error: Exception) -> int:
    """Say it; the exit code."""
    if isinstance(error, BrokenPipeError):
        return _broken_pipe()
    if _hung_up(error):
        return 128 + signal.SIGHUP
    if isinstance(error, OSError) and error.errno in _FULL:
        return _cannot_write(error)
    if isinstance(error, HostelError):
        say.error(error)
    else:
        say.fail(f"a bug in hostel: {type(error).__name__}: {error}; --debug shows where")
    if say.debug:
        import traceback

        traceback.print_exception(error)
    return TIMED_OUT if isinstance(error, MachineTimeout) else FAILED


def _cannot_write(error: OSError) -> int:
    say.fail(f"cannot write to {error.filename or 'standard output'}: {error.strerror}")
    _drop_stdout()
    return FAILED


def _hung_up(error: Exception) -> bool:
    """The terminal is gone, and SIGHUP is on its way: who was just writing learns it sooner."""
    cause = error.__cause__ or error
    if not (isinstance(cause, OSError) and cause.errno == errno.EIO):
        return False
    import termios

    for fd in range(3):
        try:
            termios.tcgetattr(fd)
        except termios.error as refused:
            if refused.args[0] == errno.EIO:
                return True
    return False


def _broken_pipe() -> int:
    """Nobody reads any more (``hostel doctor | head``): end as a program does that SIGPIPE ends."""
    _drop_stdout()
    return 128 + signal.SIGPIPE


def _drop_stdout() -> None:
    """What is left in the buffer has nowhere to go; Python would try again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
