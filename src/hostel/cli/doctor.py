"""``hostel doctor``: what this host offers. Draws the report of ``host/doctor.py``."""

from __future__ import annotations

import sys
import textwrap

import click
import msgspec

from hostel.host.doctor import Finding, Report, examine
from hostel.version import VERSION

from .clicked import Command, option, output
from .say import BOLD, GREEN, RED, YELLOW, paint

WIDTH = 80
_COLORS = {"ok": GREEN, "limited": YELLOW, "missing": RED}
_NAME = 16
_INDENT = 9 + _NAME


@click.command("doctor", cls=Command)
@option("Output", "--json", "as_json", is_flag=True, help="The report as JSON.")
@output
def command(as_json: bool) -> int:
    """Say what this host offers to machines, what each missing thing costs, and the one command
    that mends it. Exit code 0 if `hostel run` can work here, else 1."""
    report = examine()
    if as_json:
        import json

        click.echo(
            json.dumps(
                {"version": VERSION, "works": report.works, **msgspec.to_builtins(report)}, indent=2
            )
        )
    else:
        _draw(report)
    return 0 if report.works else 1


def _draw(report: Report) -> None:
    host = report.host
    click.echo(f"hostel {VERSION} on {host.system}, Linux {host.kernel}")
    click.echo(f"{host.cpu}, {host.cpus} CPUs, {host.memory / (1 << 30):.1f} GiB of memory\n")
    for finding in report.findings:
        _draw_row(finding)
    click.echo()
    click.echo(paint(_verdict(report), BOLD, sys.stdout))


def _draw_row(finding: Finding) -> None:
    state = paint(f"{finding.state:<9}", _COLORS[finding.state], sys.stdout)
    name = f"{finding.name:<{_NAME}}"
    _paragraph(state + name, finding.found)
    if finding.state != "ok":
        _paragraph(" " * _INDENT, finding.cost)
        _paragraph(" " * (_INDENT - 2) + "→ ", finding.cure)


def _paragraph(head: str, text: str) -> None:
    lines = textwrap.wrap(text, WIDTH - _INDENT, break_on_hyphens=False, break_long_words=False)
    for number, line in enumerate(lines):
        click.echo((head if number == 0 else " " * _INDENT) + line)


def _verdict(report: Report) -> str:
    if report.works:
        return f"`hostel run` works here, with engine {report.engine}."
    return f"`hostel run` cannot work here: see {', '.join(report.obstacles)}."
