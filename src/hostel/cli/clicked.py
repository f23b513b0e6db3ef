"""The command line by click: help pages, errors, completion, and every line that ``line.read`` leaves.

Verbs that start machines are data (``line.Verb``), and click's commands are made of them; the others are
written as click's commands. Imported when it is needed: it takes longer than all else before a machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from hostel.errors import HostelError, UserError
from hostel.version import VERSION

from . import line
from .options import OUTPUT, meant
from .say import say

F = TypeVar("F", bound=Callable[..., Any])

VERBS = {
    "run": "Run a command in a fresh virtual machine.",
    "boot": "Boot any kernel on its raw serial console.",
    "kernel": "List and fetch guest kernels.",
    "vsock": "Connect to a vsock port of a running machine.",
    "lab": "Watch a mechanism of virtualization at work.",
    "doctor": "Say what this host offers and what it lacks.",
    "completion": "Print a script that completes hostel's commands in a shell.",
}


class Option(click.Option):
    """An option that knows its section of the help page."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A verb: its options end at the first argument, its help has sections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_interspersed_args = False

    def make_parser(self, ctx: click.Context) -> Any:
        """A bare ``--vsock`` has the value that is its default when named, whatever comes next. click
        would take the next word for its value: a command."""
        parser: Any = super().make_parser(ctx)
        match = parser._match_long_opt
        flags = {
            name: param.flag_value
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and isinstance(param.flag_value, str)
            for name in param.opts
        }

        def match_long(name: str, value: str | None, state: Any) -> None:
            # -m: click looks for what is near before it tries the short ones
            if not name.startswith("--"):
                raise click.NoSuchOption(name, ctx=ctx)
            match(name, flags.get(name) if value is None else value, state)

        parser._match_long_opt = match_long
        return parser

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "section", "Output"), []).append(record)
        for title, records in sorted(sections.items(), key=lambda pair: pair[0] == "Output"):
            with formatter.section(title):
                formatter.write_dl(records)


class Group(click.Group):
    """Verbs: a wrong one is met with the nearest right one, none with the help page."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"no_args_is_help": False, **kwargs})
        self.invoke_without_command = True

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        verbs = self.list_commands(ctx)
        if args[0] not in verbs:
            from difflib import get_close_matches

            near = get_close_matches(args[0], verbs)
            raise click.UsageError(f"no verb {args[0]!r}{meant(near)}", ctx)
        return super().resolve_command(ctx, args)


def show_help(ctx: click.Context) -> None:
    """What a group does when it is called without a verb."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# -- of data ---------------------------------------------------------------------------------------


def command(verb: line.Verb) -> click.Command:
    def call(**values: Any) -> int:
        context = click.get_current_context()
        named = [
            one.name
            for one in verb.options
            if context.get_parameter_source(one.name) is ParameterSource.COMMANDLINE
        ]
        return verb.call(line.Line(values, frozenset(named)))

    params: list[click.Parameter] = [_option(one) for one in verb.options]
    if verb.command:
        arguments = click.Argument(
            ["command"], nargs=-1, type=click.UNPROCESSED, metavar=verb.command
        )
        params.insert(0, arguments)
    return Command(verb.name, params=params, callback=call, help=verb.call.__doc__)


def _option(one: line.Option) -> Option:
    about: dict[str, Any] = {
        "section": one.section,
        "default": one.default,
        "help": one.help,
        "shell_complete": _COMPLETIONS[one.completes],
    }
    if one.flag:
        about["is_flag"] = True
    else:
        about["type"] = click.Choice(one.choices) if one.choices else one.type
        about |= {"multiple": one.multiple, "metavar": one.metavar or None}
    if one.bare:
        about |= {"flag_value": one.bare, "is_flag": False}
    if one.voice:
        about |= {"is_eager": True, "expose_value": False, "callback": _set_voice}
    off = [f" /{name}" for name in one.off]  # the space: nothing but off
    return Option([*one.names, *off, one.name], **about)


def option(section: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """``click.option`` in a section."""
    return click.option(*names, cls=Option, section=section, **attributes)


def output(function: F) -> F:
    """How much hostel says."""
    made: list[click.Parameter] = [_option(one) for one in OUTPUT]
    # As click's own decorators do: from the last to the first.
    function.__click_params__ = made[::-1] + getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    return function


def apply(function: F, *options: Callable[[F], F]) -> F:
    """Decorators are applied from the last to the first, so that help shows them in this order."""
    for one in reversed(options):
        function = one(function)
    return function


def _set_voice(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    setattr(say, param.name or "", value)


def _complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """The shell completes file names itself, when told to."""
    return [CompletionItem(incomplete, type="file")]


def _complete_kernel(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    from hostel.host import kernels

    if "/" in incomplete:
        return _complete_path(ctx, param, incomplete)
    return [k.release for k in kernels.survey() if k.release.startswith(incomplete)]


_COMPLETIONS = {"": None, "path": _complete_path, "kernel": _complete_kernel}


# -- the whole -------------------------------------------------------------------------------------


class Verbs(Group):
    """Knows its verbs by name, and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        from importlib import import_module

        module = import_module(f".{cmd_name}", __package__)
        if isinstance(verb := getattr(module, "VERB", None), line.Verb):
            return command(verb)
        made: click.Command = module.command
        return made

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


def call(argv: Sequence[str]) -> int:
    """Run ``hostel argv…``: what it returns. A mistake is a ``UserError`` with click's words."""
    # Not hostel.main(): it has exit codes of its own for Ctrl-C and for a closed pipe.
    try:
        with hostel.make_context("hostel", list(argv)) as context:
            return int(hostel.invoke(context) or 0)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        raise _mistake(error) from error


def complete(argv: Sequence[str], variable: str) -> None:
    """Answer the shell, if it asks for a completion, and end."""
    hostel.main(list(argv), prog_name="hostel", complete_var=variable)


def _mistake(error: click.ClickException) -> UserError:
    """click's words as one line of ours, with the command that helps."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        message = f"no option {error.option_name}{meant(_near(error))}"
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "hostel"
    return UserError(f"{message[:1].lower()}{message[1:]}", cure=f"see `{path} --help`")


def _near(error: click.NoSuchOption) -> list[str]:
    """click's own measure also counts the dashes, and takes --verbose for near --bogus."""
    from difflib import get_close_matches

    names = {name.lstrip("-"): name for name in error.possibilities or ()}
    return [names[name] for name in get_close_matches(error.option_name.lstrip("-"), names, 1, 0.7)]
