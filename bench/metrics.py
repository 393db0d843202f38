"""What metrics cost: per request and per job in microseconds, and a scrape, in one process on an embedded Valkey.

    python -m bench.metrics [--jobs 20000]

"without" runs the same loop with everything but the counting; the platform that is scraped has 56 queues.
"""

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

from prometheus_client import generate_latest

from app.dispatch import open_dispatch
from app.gauges import FRESH_S, Platform
from app.job_table import JobRow
from app.metering import Metering
from app.tables import open_database, upgrade
from bench.rig import rig
from engines.catalogue import JobType
from tasks import routing
from tasks.fleet import Card
from tasks.job import Job, JobState
from tasks.settings import load_regions

WORKERS = 500


class Row:
    """What counting reads of a job that has ended."""

    region, type, status = "asia-east", JobType.LLM, JobState.COMPLETED
    created_at, started_at, completed_at = 100.0, 100.2, 101.0
    model = None
    meter = '{"model": "echo", "prompt_tokens": 10, "completion_tokens": 15, "run_s": 0.8}'


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=20_000)
    jobs: int = parser.parse_args().jobs
    row, metering = cast(JobRow, Row()), Metering()

    def count(metering: Any) -> None:
        metering.requested("jobs.create", "POST", 202, 0.003)
        metering.accepted(row)
        metering.account(None, [row])

    class Nothing:
        """Counts nothing."""

        def requested(self, *_: object) -> None: ...
        def accepted(self, *_: object) -> None: ...
        def account(self, *_: object) -> None: ...

    both = {"with": lambda: count(metering), "without": lambda: count(Nothing())}
    times = {name: median(loop(call, jobs) for _ in range(3)) for name, call in both.items()}
    print(f"a job and its request: {(times['with'] - times['without']) * 1e6:.1f} us of counting")
    text = generate_latest(metering.registry)
    print(
        f"scrape of an API process: {loop(lambda: generate_latest(metering.registry), 100) * 1e3:.2f} ms, {len(text)} B"
    )
    with rig() as made:
        made.start_store()
        scrape(made.environ, made.folder)


def scrape(environ: dict[str, str], folder: Path) -> None:
    """A leading control process's, of a platform with WORKERS workers and a job in each of its queues."""
    url = environ["DATABASE_URL"]
    upgrade(url)
    dispatch = open_dispatch(open_database(url), load_regions(environ), "asia-east", environ["BLOBS_URL"])
    ledger = dispatch.links["asia-east"].mailbox.ledger
    for region in dispatch.links:
        for job_type in JobType:
            for model in (None, "echo"):
                queue = routing.queue_name(region, job_type, model)
                ledger.put(Job(queue, job_type, 1), queue=queue, priority=0, params="{}", timeout_s=60)
    for number in range(WORKERS):
        card = Card(f"w{number}", f"w{number}", "asia-east", "h", "cpu", {JobType.LLM: "echo"}, {JobType.LLM: 8}, 0.0)
        ledger.presence.beat(card.worker_id, card.encode(), [])
    leads = threading.Event()
    leads.set()
    dispatch.metering.registry.register(Platform(dispatch, leads, {"database": folder}))
    fresh, text = [], b""
    for _ in range(5):
        time.sleep(FRESH_S)
        began = time.perf_counter()
        text = generate_latest(dispatch.metering.registry)
        fresh.append(time.perf_counter() - began)
    again = loop(lambda: generate_latest(dispatch.metering.registry), 20)
    print(
        f"scrape of the leader, {WORKERS} workers: {median(fresh) * 1e3:.1f} ms read anew, "
        f"{again * 1e3:.1f} ms again within {FRESH_S:g} s, {len(text)} B"
    )
    dispatch.close()


def loop(call: Callable[[], object], times: int) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    main()
