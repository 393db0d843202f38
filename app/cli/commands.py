"""Every command, and the entry."""

from app.cli import ask, completion, fleet, jobs, keys
from app.cli.root import gpuctl

for _command in (
    *(ask.chat, ask.image, ask.describe, ask.transcribe, ask.embed, ask.submit),
    *(jobs.jobs, fleet.watch, fleet.workers, fleet.models),
    *(keys.keys, keys.usage, completion.completion),
):
    gpuctl.add_command(_command)


def main() -> None:
    """Do what the arguments say, and exit."""
    gpuctl(prog_name="gpuctl")
