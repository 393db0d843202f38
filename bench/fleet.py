"""Many workers: how long the API takes to choose a region among them, and what their heartbeats cost a store.

python -m bench.fleet [--workers 10000] [--regions 50] [--beating 1000] [--seconds 5]
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median, quantiles

import redis

from app.dispatch import Dispatch, open_dispatch
from app.request import Request
from app.tables import open_database
from bench.rig import Rig, rig
from engines.catalogue import JobType
from tasks.fleet import Card
from tasks.job import Job
from tasks.ledger import Ledger
from tasks.presence import BEAT_S
from tasks.routing import Region
from tasks.store import open_store

#: Jobs that each beating worker runs.
RUNNING = 4
SLOTS = 8
#: For so long decisions are made, one after the other; cards and running jobs are read twice a second meanwhile.
DECISIONS_S = 5.0
CLIENTS = 2


def main() -> None:
    """Measure both, and print a table of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--regions", type=int, default=50)
    parser.add_argument("--beating", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    with rig() as made:
        made.start_store()
        routing(made, options.workers, options.regions)
        heartbeats(made, options.beating, options.seconds)


def routing(made: Rig, workers: int, regions: int) -> None:
    """Where the API sends a job, with all regions on one store."""
    ledger = Ledger(open_store(made.environ["GPU_STORE_URL"], timeout_s=30))
    cards = fleet(workers, regions)
    show(ledger, cards)
    for number in range(regions):
        # The first is full.
        of_one = workers // regions * (SLOTS if number == 0 else RUNNING)
        now = time.time() * 1000
        ledger.store.zadd(f"begun:region-{number}.llm", {f"{number}-{job}": now - job for job in range(of_one)})
    # A database that is never asked.
    dispatch = opened(made, regions)
    mailbox = dispatch.links["region-0"].mailbox
    print(f"{workers} workers in {regions} regions on one store, {RUNNING} running jobs each")

    def refresh() -> None:
        mailbox.workers._read_at = float("-inf")
        mailbox.workers.get()

    def recount() -> None:
        mailbox.traffic._read_at = float("-inf")
        mailbox.traffic.get()

    line("read all cards, first time", [timed(refresh)], "ms")
    line("read again, none changed", [timed(refresh) for _ in range(5)], "ms")

    def changed() -> float:
        some = random.sample(cards, workers // 10)
        show(ledger, [replace(card, busy={JobType.LLM: random.randint(0, 3)}) for card in some])
        return timed(refresh)

    line("read again, one in ten changed", [changed() for _ in range(5)], "ms")
    line("read the running jobs", [timed(recount) for _ in range(5)], "ms")
    for home, what in (("region-1", "home has a free slot"), ("region-0", f"all {regions} regions compared")):
        decide = partial(dispatch.placement.decide, replace(request, region=home))
        took = []
        end = time.monotonic() + DECISIONS_S
        while time.monotonic() < end:
            took.append(timed(decide))
            time.sleep(0.001)
        line(f"decision, {what}", took, "us")
        line("  the slowest, which reads all of the above", [max(took)], "ms")
    line("list of all workers, for admins", [timed(ledger.presence.workers) for _ in range(5)], "ms")
    dispatch.close()
    ledger.store.flushdb()


request = Request(
    type=JobType.LLM,
    model=None,
    params={},
    priority=0,
    region="region-0",
    allow_cross_region=True,
    timeout_seconds=300,
    queue_timeout_seconds=None,
    requested_model=None,
)


def heartbeats(made: Rig, workers: int, seconds: float) -> None:
    """What the beats of so many workers, and the reconciler that watches them, cost the store."""
    url = made.environ["GPU_STORE_URL"]
    ledger = Ledger(open_store(url, timeout_s=30))
    cards = fleet(workers, 1)
    jobs = {card.worker_id: hold(ledger, card) for card in cards}
    show(ledger, cards)
    rate = workers / BEAT_S
    print(f"\n{workers} workers that run {RUNNING} jobs each, on one store")
    with spent(ledger.store) as most:
        counts = from_clients(url, cards, jobs, seconds, None)
    line("beats that the store takes, at most", [sum(counts) / most.seconds], "/s", scale=1)
    line("processor time of the store, a beat", [most.processor / sum(counts)], "us")
    with spent(ledger.store) as paced:
        sent = sum(from_clients(url, cards, jobs, seconds, rate / CLIENTS))
    line(f"beats, one every {BEAT_S:g} s from each", [sent / paced.seconds], "/s", scale=1)
    line("share of one core that the store takes", [paced.processor / paced.seconds], "%", scale=100)
    watching = [timed(ledger.orphans) for _ in range(200)]
    line("look for dead workers, 4 times a second", watching, "us")


def fleet(workers: int, regions: int) -> list[Card]:
    """That many cards, evenly spread."""
    return [
        Card(
            worker_id=f"region-{number % regions}-gpu{number}-0123abcd",
            name=f"region-{number % regions}-gpu{number}",
            region=f"region-{number % regions}",
            host=f"gpu{number}.example",
            device="cuda:0",
            models={JobType.LLM: "Qwen/Qwen2.5-7B-Instruct", JobType.EMBEDDING: "BAAI/bge-m3"},
            slots={JobType.LLM: SLOTS, JobType.EMBEDDING: SLOTS},
            started_at=time.time(),
            country="CN",
            city="Shanghai",
            gpu_name="NVIDIA GeForce RTX 4090",
            gpu_memory_gib=23.6,
            version="0.1.0",
            direct_url=f"https://gpu{number}.example:8080",
            busy={JobType.LLM: RUNNING},
        )
        for number in range(workers)
    ]


def show(ledger: Ledger, cards: list[Card]) -> None:
    """Each beats once, and its lease outlives the measurement."""
    for card in cards:
        ledger.presence.beat(card.worker_id, card.encode(), [], name=card.name, lease_s=3600)


def hold(ledger: Ledger, card: Card) -> list[str]:
    """Ids of jobs that the worker has begun."""
    ids = [f"{card.worker_id}-{number}" for number in range(RUNNING)]
    for job_id in ids:
        job = Job(job_id, JobType.LLM, 1)
        ledger.put(job, queue=f"{card.region}.llm", priority=0, params="{}", timeout_s=300)
        ledger.begin(job, worker_id=card.worker_id, token=job_id)
    return ids


def opened(made: Rig, regions: int) -> Dispatch:
    """The API's side of that many regions, all over the map."""
    broker, store = made.environ["GPU_BROKER_URL"], made.environ["GPU_STORE_URL"]
    places = {
        f"region-{number}": Region(
            f"region-{number}",
            broker,
            store,
            latitude=(number * 37) % 120 - 60.0,
            longitude=(number * 71) % 360 - 180.0,
        )
        for number in range(regions)
    }
    return open_dispatch(open_database(made.environ["DATABASE_URL"]), places, "region-0", str(made.folder / "blobs"))


def from_clients(
    url: str, cards: list[Card], jobs: dict[str, list[str]], seconds: float, rate: float | None
) -> list[int]:
    """Beats that each of some processes has sent; rate: of each, in beats a second; None is as fast as it can."""
    with multiprocessing.Pool(CLIENTS) as pool:
        shares = [(url, cards[number::CLIENTS], jobs, seconds, rate) for number in range(CLIENTS)]
        return pool.starmap(beat_for, shares)


def beat_for(url: str, cards: list[Card], jobs: dict[str, list[str]], seconds: float, rate: float | None) -> int:
    """How many beats were sent in so many seconds."""
    ledger = Ledger(open_store(url, timeout_s=30))
    said = [(card.worker_id, card.encode(), jobs[card.worker_id], card.name) for card in cards]
    began, count = time.monotonic(), 0
    while time.monotonic() < began + seconds:
        worker_id, text, running, name = said[count % len(said)]
        ledger.presence.beat(worker_id, text, running, name=name)
        count += 1
        if rate is not None:
            time.sleep(max(began + count / rate - time.monotonic(), 0))
    return count


class Spent:
    """Seconds on the clock and of the store's processor time."""

    seconds = 0.0
    processor = 0.0


@contextmanager
def spent(store: redis.Redis) -> Iterator[Spent]:
    """What passes inside, known afterwards."""
    found, began, used = Spent(), time.monotonic(), _processor(store)
    yield found
    found.seconds, found.processor = time.monotonic() - began, _processor(store) - used


def _processor(store: redis.Redis) -> float:
    used = store.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])  # type: ignore[index]


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def line(what: str, values: list[float], unit: str, *, scale: float | None = None) -> None:
    """One row: the median, and the 99th percentile of many."""
    factor = scale or {"ms": 1e3, "us": 1e6}[unit]
    many = f"   p99 {quantiles(values, n=100)[98] * factor:.1f}" if len(values) >= 100 else ""
    print(f"  {what:42}{median(values) * factor:10.1f} {unit}{many}")


if __name__ == "__main__":
    main()
