"""Who serves: workers, models, and a live view of both and of the queues."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click

from app.cli import show
from app.cli.root import Command, Group, Setup, completing, pass_setup
from app.client import BROKEN, GPUInferenceClient, Unavailable

_region = click.option("--region", help="Of one region alone.", shell_complete=completing("regions"))
_worker = click.argument("worker", shell_complete=completing("workers"))


@click.command(cls=Command)
@_region
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="In seconds.")
@click.option("--once", is_flag=True, help="Show it once.")
@pass_setup
def watch(setup: Setup, region: str | None, interval: float, once: bool) -> None:
    """Show queues and workers, live, until Ctrl-C; without a terminal one view after the other."""
    client = setup.client
    view = _look(client, region)
    with _screen(setup) as draw:
        draw(view)
        while not once:
            time.sleep(interval)
            try:
                view = _look(client, region)
            except (*BROKEN, Unavailable) as error:
                # What was seen last stays; its time says how old it is.
                view = {**view, "error": f"The API does not answer: {type(error).__name__}"}
            draw(view)


@click.group(cls=Group)
def workers() -> None:
    """Who serves."""


@workers.command("list")
@_region
@click.option("--type", "job_type", help="That serve it.")
@click.option("--state", help="starting, ready, draining, ... or lost.")
@pass_setup
def list_workers(setup: Setup, job_type: str | None, **filters: str | None) -> None:
    """List workers; without scope admin, their numbers."""
    found = setup.client.workers(type=job_type, **filters)
    if setup.json:
        show.document(found)
    elif found["items"] is None:
        click.echo(_numbers(found))
    else:
        click.echo(_table(found["items"]))


@workers.command()
@_worker
@pass_setup
def drain(setup: Setup, worker: str) -> None:
    """Let WORKER, an id or a name, take no new jobs until it is told to resume."""
    _ordered(setup, setup.client.drain(worker))


@workers.command()
@_worker
@pass_setup
def resume(setup: Setup, worker: str) -> None:
    """Let a drained WORKER take jobs again."""
    _ordered(setup, setup.client.resume(worker))


@click.command(cls=Command)
@click.option("--type", "job_type", help="Such as llm.")
@click.option("--live", is_flag=True, default=None, help="That a worker has loaded now.")
@pass_setup
def models(setup: Setup, job_type: str | None, live: bool | None) -> None:
    """List models: what a job's --model may say."""
    found = setup.client.models(type=job_type, live="true" if live else None)
    if setup.json:
        show.document({"items": found})
        return
    rows = ((model["id"], model["type"], model["memory_gib"], _places(model["live"])) for model in found)
    click.echo(show.table(("ID", "TYPE", "GIB", "LIVE"), rows))


def _ordered(setup: Setup, worker: Mapping[str, Any]) -> None:
    if setup.json:
        show.document(worker)
    else:
        click.echo(f"{worker['name']}: {'takes no new jobs' if worker['drained'] else 'takes jobs'}")


def _look(client: GPUInferenceClient, region: str | None) -> dict[str, Any]:
    workers = client.workers(**({"region": region} if region else {}))
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {"at": now, "queues": client.stats(region), "workers": workers}


@contextmanager
def _screen(setup: Setup) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What a view is shown with: JSON lines, a live screen, or text."""
    if setup.json:
        yield show.document
    elif show.RICH and sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(screen=True, auto_refresh=False) as live:
            yield lambda view: live.update(Text(_view(view), no_wrap=True), refresh=True)
    else:

        def draw(view: Mapping[str, Any]) -> None:
            click.clear()
            click.echo(_view(view) + "\n")

        yield draw


def _view(view: Mapping[str, Any]) -> str:
    queues, fleet = view["queues"], view["workers"]
    regions = (
        (
            name,
            found["queued"],
            found["running"],
            found["oldest_wait_seconds"],
            found["available_workers"],
            "" if found["reachable"] else "store does not answer",
        )
        for name, found in queues["by_region"].items()
    )
    waiting = ", ".join(f"{name} {count}" for name, count in queues["by_type"].items() if count)
    parts = [
        f"{view['at']}  queued {queues['total_queued']}{f' ({waiting})' if waiting else ''}, "
        f"running {queues['running']}, a new job waits {show.seconds(queues['estimated_wait_seconds'])}",
        show.table(("REGION", "QUEUED", "RUNNING", "OLDEST (s)", "WORKERS", ""), regions),
        _numbers(fleet) if fleet["items"] is None else _table(fleet["items"]),
    ]
    return "\n\n".join([view["error"], *parts] if "error" in view else parts)


def _numbers(found: Mapping[str, Any]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in found["by_state"].items())
    unreachable = f"; no answer from {', '.join(found['unreachable'])}" if found["unreachable"] else ""
    return f"{found['total']} workers" + (f": {states}" if states else "") + unreachable


def _table(workers: list[Mapping[str, Any]]) -> str:
    rows = (
        (
            worker["name"],
            worker["region"],
            f"{worker['state']}{' (drained)' if worker['drained'] and worker['state'] != 'draining' else ''}",
            worker["types"],
            f"{worker['slots']['used']}/{worker['slots']['total']}",
            worker["gpu_name"] or worker["device"],
            worker["reliability_score"],
        )
        for worker in workers
    )
    return show.table(("NAME", "REGION", "STATE", "TYPES", "SLOTS", "DEVICE", "RELIABILITY"), rows)


def _places(live: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"{place['region']} {place['free']}/{place['slots']} free" for place in live)
