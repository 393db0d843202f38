"""Completion in bash, zsh and fish, which click has built in."""

import click
from click.shell_completion import get_completion_class

from app.cli import show
from app.cli.root import Command, Setup, gpuctl, pass_setup


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_setup
def completion(setup: Setup, shell: str) -> None:
    """Print what makes SHELL complete gpuctl: eval "$(gpuctl completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(gpuctl, {}, "gpuctl", "_GPUCTL_COMPLETE").source()
    if setup.json:
        show.document({"shell": shell, "script": script})
    else:
        click.echo(script)
