"""The state of the whole platform for /metrics, as the leading control process reads it: queues, workers, servers.

Only the leader shows it, so that a sum over all processes is right. It is read for at most one scrape a second, at a
cost that depends on neither depth nor the number of jobs, from all servers at once; one that does not answer within
READ_S is shown as down, and nothing of its regions is.
"""

import logging
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from app.dispatch import Dispatch
from app.links import Broker, Down, Mailbox
from engines.catalogue import JobType
from engines.contract import GIB
from tasks import routing
from tasks.fleet import Card, WorkerState
from tasks.records import Traffic

logger = logging.getLogger(__name__)

T = TypeVar("T")

FRESH_S = 1.0
#: Servers are asked at once; those that have not answered by then are shown as down.
READ_S = 1.5
#: A queue whose oldest job waits for longer wants one more worker than it has, however few jobs there are.
LONG_WAIT_S = 4.0

Kind = tuple[str, JobType]


@dataclass(frozen=True, slots=True)
class StoreState:
    """What one store says."""

    traffic: Mapping[str, Traffic]
    cards: Sequence[Card]
    discarded: int
    forged: int
    lost_workers: int
    memory_used: int
    memory_most: int


def desired_workers(queued: int, running: int, slots_per_worker: float, present: int, oldest_wait_s: float) -> int:
    """How many workers a region's type should have for what waits and runs.

    As many as hold it all, and one more than there are while the oldest job waits for longer than LONG_WAIT_S; none
    while there is nothing to do.
    """
    wanted = math.ceil((queued + running) / max(slots_per_worker, 1.0))
    return max(wanted, present + 1) if queued and oldest_wait_s > LONG_WAIT_S else wanted


class Platform(Collector):
    """Shows the platform's state while this process leads."""

    def __init__(self, dispatch: Dispatch, leads: threading.Event, folders: Mapping[str, Path]) -> None:
        """folders: those whose disk may fill up, by what they hold."""
        self._dispatch = dispatch
        self._leads = leads
        self._folders = folders
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._families: list[Metric] = []
        #: Jobs that wait for their key's turn, by queue, as the database said last.
        self._held: Mapping[str, int] = {}
        # As many as there are servers: one that hangs holds up no other.
        self._readers = ThreadPoolExecutor(2 * len(dispatch.links) + 3, thread_name_prefix="gauges")

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not ask the servers for names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """What the servers say, read anew once it is FRESH_S old."""
        leads = self._leads.is_set()
        yield GaugeMetricFamily("gpu_control_leader", "1 for the control process that leads.", value=float(leads))
        if not leads:
            return
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._families = list(self._read())
                self._read_at = time.monotonic()
            families = self._families
        yield from families

    def _read(self) -> Iterator[Metric]:
        links = self._dispatch.links
        mailboxes = {id(link.mailbox): link.mailbox for link in links.values()}
        brokers = {id(link.broker): link.broker for link in links.values()}
        first = next(iter(links))
        stores = {key: self._readers.submit(_ask_store, mailbox) for key, mailbox in mailboxes.items()}
        answers = {key: self._readers.submit(_ask_broker, broker, first) for key, broker in brokers.items()}
        overdue = self._readers.submit(self._dispatch.rows.census.overdue_s)
        held = self._readers.submit(self._dispatch.held_back)
        asked: list[Future[Any]] = [*stores.values(), *answers.values(), overdue, held]
        wait(asked, timeout=READ_S)
        states = {key: _result(future) for key, future in stores.items()}
        lag = _result(overdue)
        counted = _result(held)
        self._held = self._held if counted is None else counted
        up = GaugeMetricFamily(
            "gpu_region_up", "Whether a region's store and broker answer.", labels=("region", "part")
        )
        by_region: dict[str, StoreState] = {}
        for name, link in links.items():
            state = states[id(link.mailbox)]
            up.add_metric((name, "store"), float(state is not None))
            up.add_metric((name, "broker"), float(_result(answers[id(link.broker)]) is not None))
            if state is not None:
                by_region[name] = state
        yield up
        yield GaugeMetricFamily("gpu_database_up", "Whether the database answers.", value=float(lag is not None))
        if lag is not None:
            text = "Seconds by which the oldest job that control has to act on is overdue."
            yield GaugeMetricFamily("gpu_control_lag_seconds", text, value=lag)
        names = {id(link.mailbox): name for name, link in reversed(list(links.items()))}
        yield from _store_families({names[key]: state for key, state in states.items() if state is not None})
        yield from self._region_families(by_region)
        yield from self._disk_families()

    def _region_families(self, states: Mapping[str, StoreState]) -> Iterator[Metric]:
        queued: Counter[Kind] = Counter()
        running: Counter[Kind] = Counter()
        kind = ("region", "type")
        depth = GaugeMetricFamily("gpu_queue_jobs", "Jobs that wait, by queue.", labels=(*kind, "model"))
        runs = GaugeMetricFamily("gpu_running_jobs", "Jobs that run, by queue.", labels=(*kind, "model"))
        for region, state in states.items():
            # Those that are held wait like the others, though no store has them yet.
            for name in {**state.traffic, **self._held}:
                at, job_type = routing.split_queue(name)
                if at != region:
                    continue
                labels = (region, job_type, name.partition("@")[2])
                traffic = state.traffic.get(name)
                waiting = (traffic.depth if traffic else 0) + self._held.get(name, 0)
                run = len(traffic.elapsed_s) if traffic else 0
                depth.add_metric(labels, waiting)
                runs.add_metric(labels, run)
                queued[region, job_type] += waiting
                running[region, job_type] += run
        yield from (depth, runs)
        waits = self._waits(list(states))
        oldest = GaugeMetricFamily("gpu_queue_oldest_wait_seconds", "Age of the oldest job that waits.", labels=kind)
        for key in queued if waits is not None else ():
            oldest.add_metric(key, (waits or {}).get(key, 0.0))
        yield oldest
        fleets = {region: [card for card in state.cards if card.region == region] for region, state in states.items()}
        yield from _fleet_families(fleets)
        desired = GaugeMetricFamily(
            "gpu_desired_workers", "Workers that a region should have of a type; docs/metrics.md.", labels=kind
        )
        for region, cards in fleets.items():
            served = {job_type for card in cards for job_type in card.slots}
            for job_type in sorted({*served, *(name for at, name in queued if at == region)}):
                slots = [card.slots[job_type] for card in cards if card.slots.get(job_type)]
                present = sum(card.state is WorkerState.READY and job_type in card.slots for card in cards)
                key = (region, job_type)
                per_worker = sum(slots) / len(slots) if slots else 1.0
                wanted = desired_workers(queued[key], running[key], per_worker, present, (waits or {}).get(key) or 0.0)
                desired.add_metric(key, wanted)
        yield desired

    def _waits(self, regions: Sequence[str]) -> dict[Kind, float] | None:
        """None while the database is away."""
        reading = self._readers.submit(self._dispatch.rows.census.oldest_waits, regions)
        wait([reading], timeout=READ_S)
        return _result(reading)

    def _disk_families(self) -> Iterator[Metric]:
        size = GaugeMetricFamily("gpu_disk_size_bytes", "The disk that holds something of ours.", labels=("holds",))
        free = GaugeMetricFamily("gpu_disk_free_bytes", "What is free of it.", labels=("holds",))
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:
                continue
            size.add_metric((name,), usage.total)
            free.add_metric((name,), usage.free)
        yield from (size, free)


def _store_families(states: Mapping[str, StoreState]) -> Iterator[Metric]:
    """Of each store, named after the first region that uses it."""
    counted: Sequence[tuple[str, str, Callable[[StoreState], int]]] = (
        ("gpu_outcomes_discarded", "Outcomes that came too late for their attempt.", lambda state: state.discarded),
        ("gpu_outcomes_forged", "Outcomes that no worker of ours wrote.", lambda state: state.forged),
    )
    for name, text, read in counted:
        counter = CounterMetricFamily(name, text, labels=("store",))
        for store, state in states.items():
            counter.add_metric((store,), read(state))
        yield counter
    shown: Sequence[tuple[str, str, Callable[[StoreState], int]]] = (
        ("gpu_lost_workers", "Workers that fell silent within a day.", lambda state: state.lost_workers),
        ("gpu_store_memory_used_bytes", "Memory that a store uses.", lambda state: state.memory_used),
        ("gpu_store_memory_limit_bytes", "What it may use; 0 without a limit.", lambda state: state.memory_most),
    )
    for name, text, read in shown:
        gauge = GaugeMetricFamily(name, text, labels=("store",))
        for store, state in states.items():
            gauge.add_metric((store,), read(state))
        yield gauge


def _fleet_families(fleets: Mapping[str, Sequence[Card]]) -> Iterator[Metric]:
    """Of the live workers, by region."""
    kind = ("region", "type")
    workers = GaugeMetricFamily(
        "gpu_workers", "Live workers, by what they do about new jobs.", labels=("region", "state")
    )
    ready = GaugeMetricFamily("gpu_ready_workers", "Workers that take jobs of a type.", labels=kind)
    slots = GaugeMetricFamily("gpu_slots", "Jobs that the workers that take some may run at once.", labels=kind)
    busy = GaugeMetricFamily("gpu_slots_busy", "Those that run.", labels=kind)
    jobs = GaugeMetricFamily("gpu_batch_jobs", "Jobs that are computed in batches now.", labels=kind)
    batches = GaugeMetricFamily(
        "gpu_batches", "Batches that are computed now; jobs by batches is their size.", labels=kind
    )
    held = GaugeMetricFamily("gpu_engine_memory_bytes", "What workers hold for their engines.", labels=("region",))
    used = GaugeMetricFamily("gpu_memory_used_bytes", "Memory in use on the workers' GPUs.", labels=("region",))
    total = GaugeMetricFamily("gpu_memory_bytes", "All memory of the workers' GPUs.", labels=("region",))
    for region, cards in fleets.items():
        states = Counter(card.state for card in cards)
        for state in WorkerState:
            if state is not WorkerState.LOST:
                workers.add_metric((region, state), states[state])
        for job_type in sorted({name for card in cards for name in card.slots}):
            takers = [card for card in cards if card.state is WorkerState.READY and job_type in card.slots]
            labels = (region, job_type)
            ready.add_metric(labels, len(takers))
            slots.add_metric(labels, sum(card.slots[job_type] for card in takers))
            busy.add_metric(labels, sum(card.busy.get(job_type, 0) for card in cards))
            sizes = [size for card in cards if (size := card.batch.get(job_type, 0))]
            jobs.add_metric(labels, sum(sizes))
            batches.add_metric(labels, len(sizes))
        held.add_metric((region,), GIB * sum(card.engine_memory_gib or 0.0 for card in cards))
        used.add_metric((region,), GIB * sum(card.gpu_memory_used_gib or 0.0 for card in cards))
        total.add_metric((region,), GIB * sum(card.gpu_memory_gib or 0.0 for card in cards))
    yield from (workers, ready, slots, busy, jobs, batches, held, used, total)


def _ask_store(mailbox: Mailbox) -> StoreState:
    """Raises Down."""
    traffic, roster, memory = mailbox.traffic.get(), mailbox.workers.get(), mailbox.memory.get()
    with mailbox.breaker:
        discarded, forged = mailbox.ledger.discarded(), mailbox.ledger.forged()
        lost = mailbox.ledger.presence.lost_workers()
    return StoreState(traffic, roster.all(), discarded, forged, lost, memory.used, memory.most)


def _ask_broker(broker: Broker, region: str) -> bool:
    """Raises Down."""
    with broker.breaker:
        broker.publisher.depths([routing.queue_name(region, JobType.LLM)])
    return True


def _result(asked: "Future[T]") -> T | None:
    """None of what failed, or has not ended yet."""
    if not asked.done():
        asked.cancel()
        return None
    try:
        return asked.result()
    except (Down, SQLAlchemyError):
        return None
