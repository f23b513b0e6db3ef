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

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

import click

from hostel.errors import HostelError, MachineTimeout
from hostel.version import VERSION

from .options import Group, meant, show_help
from .say import say

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

_COMPLETE = "_HOSTEL_COMPLETE"

OK = 0
TIMED_OUT = 124
FAILED = 125

VERBS = {
    "run": "Run a command in a fresh virtual machine.",
    "boot": "Boot any kernel on its raw serial console.",
    "kernel": "List and fetch guest kernels.",
    "vsock": "Connect to a vsock port of a running machine.",
    "lab": "Watch a mechanism of virtualization at work.",
    "doctor": "Say what this host offers and what it lacks.",
    "completion": "Print a script that completes hostel's commands in a shell.",
}


class EndedBySignal(BaseException):
    """A signal ends the command now. No ``Exception``: nothing may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Verbs(Group):
    """Knows its verbs by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        from importlib import import_module

        module = import_module(f".{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(VERSION, "-V", "--version", message="hostel %(version)s")
@click.pass_context
def hostel(ctx: click.Context) -> None:
    """Virtual machines as everyday things: run a command in one, boot a kernel, watch it.

    \b
    hostel run -- uname -a          a command in a machine of its own
    hostel run                      a shell in one
    hostel doctor                   what this host can do
    """
    show_help(ctx)
    if ctx.invoked_subcommand in ("kernel", "doctor"):  # those that start machines do it then
        from hostel.host.runtime import sweep

        with contextlib.suppress(HostelError):
            sweep()


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
    except BrokenPipeError:
        return _broken_pipe()
    except OSError as error:
        return _cannot_write(error)
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
        hostel.main(argv, prog_name="hostel", complete_var=_COMPLETE)
    try:
        _signals(signal.SIG_DFL, _interrupt)
        # Not hostel.main(): it has exit codes of its own for Ctrl-C and for a closed pipe.
        with hostel.make_context("hostel", argv) as context:
            return int(hostel.invoke(context) or OK)
    except click.exceptions.Exit as done:
        return done.exit_code
    except EndedBySignal as error:
        return 128 + error.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        return _broken_pipe()
    if isinstance(error, OSError) and error.errno in _FULL:
        return _cannot_write(error)
    if isinstance(error, click.ClickException):
        say.fail(_usage(error))
    elif isinstance(error, HostelError):
        say.error(error)
    else:
        say.fail(f"a bug in hostel: {type(error).__name__}: {error}; --debug shows where")
    if say.debug:
        import traceback

        traceback.print_exception(error)
    return TIMED_OUT if isinstance(error, MachineTimeout) else FAILED


def _usage(error: click.ClickException) -> str:
    """click's words as one line of ours, with the command that helps."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        message = f"no option {error.option_name}{meant(_near(error))}"
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "hostel"
    return f"{message[:1].lower()}{message[1:]}; see `{path} --help`"


def _near(error: click.NoSuchOption) -> list[str]:
    """click's own measure also counts the dashes, and takes --verbose for near --bogus."""
    from difflib import get_close_matches

    names = {name.lstrip("-"): name for name in error.possibilities or ()}
    return [names[name] for name in get_close_matches(error.option_name.lstrip("-"), names, 1, 0.7)]


def _cannot_write(error: OSError) -> int:
    say.fail(f"cannot write to {error.filename or 'standard output'}: {error.strerror}")
    _drop_stdout()
    return FAILED


def _broken_pipe() -> int:
    """Nobody reads any more (``hostel doctor | head``): end as a program does that SIGPIPE ends."""
    _drop_stdout()
    return 128 + signal.SIGPIPE


def _drop_stdout() -> None:
    """What is left in the buffer has nowhere to go; Python would try again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
