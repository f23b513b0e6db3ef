"""``hostel lab``: guided runs of the mechanisms. Draws the reports of ``lab/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hostel import lab

from .clicked import Command, Group, apply, option, output, show_help
from .say import say


class Labs(Group):
    """Its verbs are the labs; one is imported when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["list", *lab.LABS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "list":
            return list_labs
        return _command(cmd_name, lab.LABS[cmd_name]) if cmd_name in lab.LABS else None


@click.group("lab", cls=Labs)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Watch a mechanism of virtualization at work: guided, deterministic runs."""
    show_help(ctx)


@click.command("list", cls=Command)
@option("Output", "--json", "as_json", is_flag=True, help="As a JSON object: name, question.")
@output
def list_labs(as_json: bool) -> int:
    """List the labs and what each shows."""
    if as_json:
        import json

        click.echo(json.dumps(lab.LABS, indent=2))
        return 0
    width = max(map(len, lab.LABS))
    for name, summary in lab.LABS.items():
        click.echo(f"{name:<{width}}  {summary}")
    return 0


def _report(function: Any) -> Any:
    """What every lab takes."""
    return apply(
        function,
        click.argument("arguments", nargs=-1, metavar="[ARG]…"),
        option("Output", "--json", "as_json", is_flag=True, help="The report as JSON."),
        option(
            "Output",
            "--steps",
            type=click.IntRange(min=0),
            default=60,
            show_default=True,
            help="Show so many lines of the trace.",
        ),
        output,
    )


def _command(name: str, summary: str) -> click.Command:
    if name == "paging":
        made = _paging
    else:

        @click.command(name, cls=Command, help=summary)
        @_report
        def made(arguments: tuple[str, ...], as_json: bool, steps: int) -> int:
            _show(lab.run(name, arguments), as_json, steps)
            return 0

    made.allow_interspersed_args = (
        True  # its arguments are names: no command of a guest's begins there
    )
    return made


@click.command("paging", cls=Command, help=lab.LABS["paging"])
@option(
    "KVM elsewhere",
    "--save",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Only measure this host's KVM, and write that to FILE (-: standard output).",
)
@option(
    "KVM elsewhere",
    "--with",
    "beside",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Show beside the rest what another KVM did, by its --save. May be repeated.",
)
@_report
def _paging(
    arguments: tuple[str, ...],
    save: Path | None,
    beside: tuple[Path, ...],
    as_json: bool,
    steps: int,
) -> int:
    if save is None:
        _show(lab.run("paging", arguments, beside=beside), as_json, steps)
    elif beside or as_json:
        raise click.UsageError("--save shows nothing: it goes with neither --with nor --json")
    else:
        _save(arguments, save)
    return 0


def _save(arguments: tuple[str, ...], path: Path) -> None:
    from hostel.lab import paging_kvm, workloads

    measured = paging_kvm.measure(workloads.choose(arguments))
    if str(path) == "-":
        click.echo(paging_kvm.encode(measured), nl=False)
        return
    paging_kvm.save(measured, path)
    say.note(f"KVM with {measured.paging} paging: saved; hostel lab paging --with {path} shows it")


def _show(report: lab.Report, as_json: bool, steps: int) -> None:
    if as_json:
        import json

        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
        return
    import shutil

    from hostel.lab import draw

    width = shutil.get_terminal_size((draw.WIDTH, 0)).columns
    for line in draw.report(report, steps=steps, width=max(60, min(width, draw.WIDTH))):
        click.echo(line)
