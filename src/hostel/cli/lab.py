"""``hostel lab``: guided runs of the mechanisms. Draws the reports of ``lab/``."""

from __future__ import annotations

import click

from hostel import lab

from .options import Command, Group, option, output, show_help


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


def _command(name: str, summary: str) -> click.Command:
    @click.command(name, cls=Command, help=summary)
    @click.argument("arguments", nargs=-1, metavar="[ARG]…")
    @option("Output", "--json", "as_json", is_flag=True, help="The report as JSON.")
    @option(
        "Output",
        "--steps",
        type=click.IntRange(min=0),
        default=60,
        show_default=True,
        help="Show so many lines of the trace.",
    )
    @output
    def one(arguments: tuple[str, ...], as_json: bool, steps: int) -> int:
        _show(lab.run(name, arguments), as_json, steps)
        return 0

    one.allow_interspersed_args = (
        True  # its arguments are names: no command of a guest's begins there
    )
    return one


def _show(report: lab.Report, as_json: bool, steps: int) -> None:
    if as_json:
        import json

        import msgspec

        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
        return
    from hostel.lab import draw

    for line in draw.report(report, steps=steps):
        click.echo(line)
