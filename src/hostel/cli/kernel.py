"""``hostel kernel ls`` and ``hostel kernel fetch``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hostel.host import kernels

from .clicked import Command, Group, option, output, show_help
from .say import DIM, paint, say


@click.group("kernel", cls=Group)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List and fetch guest kernels."""
    show_help(ctx)


@command.command("ls", cls=Command)
@option("Output", "--json", "as_json", is_flag=True, help="As a JSON list.")
@output
def ls(as_json: bool) -> int:
    """List the guest kernels of this host, the one that is taken by default first."""
    found = kernels.survey()
    if as_json:
        import json

        click.echo(json.dumps([_record(kernel) for kernel in found], indent=2))
        return 0
    if not found:
        say.note("no guest kernel on this host; fetch one with `hostel kernel fetch`")
    for kernel in found:
        click.echo(_row(kernel, max(len(k.release) for k in found)))
    return 0


@command.command("fetch", cls=Command)
@click.argument("package", default="linux-image-cloud-amd64", metavar="[PACKAGE]")
@output
def fetch(package: str) -> int:
    """Fetch a guest kernel with the host's own apt into your cache: no root, no installation.

    PACKAGE is a Debian kernel package or meta package. [default: linux-image-cloud-amd64]
    """
    from hostel.host.fetch import fetch as fetch_kernel

    kernel = fetch_kernel(
        package, say=say.note, progress=lambda done: say.progress(f"downloading: {done:.0f} %")
    )
    say.progress("")
    say.note(f"guest kernel {kernel.release} is in {kernel.image.parent.parent}")
    return 0


def _record(kernel: kernels.Kernel) -> dict[str, str | None]:
    return {
        "release": kernel.release,
        "image": str(kernel.image),
        "modules": str(kernel.modules) if kernel.modules else None,
        "source": kernel.source,
        "problem": kernel.problem or None,
    }


def _row(kernel: kernels.Kernel, width: int) -> str:
    words = "no modules" if kernel.modules is None else ""
    remark = kernel.problem or words
    row = f"{kernel.release:<{width}}  {kernel.source:<7}  {_short(kernel.image)}"
    return f"{row}  {paint(f'({remark})', DIM, sys.stdout)}" if remark else row


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
