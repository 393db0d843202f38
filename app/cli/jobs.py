"""Jobs that were sent: list, show, follow, cancel, retry."""

import itertools
from collections.abc import Sequence
from typing import Any

import click

from app.cli import show
from app.cli.ask import attend, show_job, tell
from app.cli.root import EXIT_REFUSED, Group, Setup, completing, pass_setup
from app.client import ApiError

_PAGE = 200

_job_id = click.argument("job_id", metavar="ID", shell_complete=completing("jobs"))


@click.group(cls=Group)
def jobs() -> None:
    """Jobs that were sent."""


@jobs.command("list")
@click.option("--status", help="queued, running, completed, failed, cancelled or timeout.")
@click.option("--type", "job_type", help="Such as llm.")
@click.option("--region", shell_complete=completing("regions"))
@click.option("--after", "created_after", metavar="TIME", help="Sent after it: 2026-01-31T10:00:00Z")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
@pass_setup
def list_jobs(setup: Setup, job_type: str | None, limit: int, **filters: str | None) -> None:
    """List one's own jobs, newest first."""
    pages = setup.client.jobs(type=job_type, limit=min(limit, _PAGE), **filters)
    found = list(itertools.islice(pages, limit))
    if setup.json:
        show.document({"items": found})
        return
    rows = (
        (job.id, job.status, job["type"], job["model"], job["region"], job["priority"], job["created_at"])
        for job in found
    )
    click.echo(show.table(("ID", "STATUS", "TYPE", "MODEL", "REGION", "PRIORITY", "CREATED"), rows))


@jobs.command("show")
@_job_id
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write its picture to this file; - for stdout.")
@pass_setup
def show_one(setup: Setup, job_id: str, output: str | None) -> None:
    """Show a job, with its result; long texts are cut without --json."""
    job = setup.client.get(job_id)
    if output == "-" and setup.json:
        raise click.UsageError("--json and the picture cannot both go to stdout.")
    if output is not None:
        show.write(job, output)
    if output is not None and setup.json:
        show.document(show.without_picture(job, output))
    elif output != "-":
        show_job(setup, job)


@jobs.command()
@_job_id
@pass_setup
def follow(setup: Setup, job_id: str) -> None:
    """Print a job's events until it has ended: JSON lines with --json. Ctrl-C leaves it alone."""
    tell(setup, setup.client.follow(job_id))


@jobs.command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True, shell_complete=completing("jobs"))
@click.pass_context
def cancel(ctx: click.Context, job_ids: Sequence[str]) -> None:
    """Cancel jobs, queued or running."""
    setup: Setup = ctx.obj
    client, items, refused = setup.client, list[dict[str, Any]](), False
    for job_id in job_ids:
        try:
            items.append(client.cancel(job_id))
        except ApiError as error:
            if error.status >= 500:
                raise
            # The others are cancelled nevertheless.
            refused = True
            items.append({"job_id": job_id, "error": {"code": error.code, "detail": error.detail}})
            click.echo(f"{error.code}: {error.detail}", err=True)
    if setup.json:
        show.document({"items": items})
    if refused:
        ctx.exit(EXIT_REFUSED)


@jobs.command()
@_job_id
@click.option("--wait", is_flag=True, help="Until the new one has ended; Ctrl-C cancels it.")
@pass_setup
def retry(setup: Setup, job_id: str, wait: bool) -> None:
    """Run a job again that failed, timed out or was cancelled; prints the new one's id."""
    job = setup.client.retry(job_id)
    if wait:
        show_job(setup, attend(job.follow()))
    elif setup.json:
        show.document(job)
    else:
        click.echo(job.id)
