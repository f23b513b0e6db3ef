"""``hostel completion SHELL``: click's completion scripts."""

from __future__ import annotations

import click

from .clicked import Command, output


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output
def command(shell: str) -> int:
    """Print a script that completes hostel's commands.

    \b
    bash:  eval "$(hostel completion bash)"             in ~/.bashrc
    zsh:   eval "$(hostel completion zsh)"              in ~/.zshrc
    fish:  hostel completion fish > ~/.config/fish/completions/hostel.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from .clicked import hostel

    kind = get_completion_class(shell)
    assert kind is not None
    # Not kind.source(): for bash that runs bash first, to look at its version.
    script = ShellComplete.source(kind(hostel, {}, "hostel", "_HOSTEL_COMPLETE"))
    click.echo(script)
    return 0
