"""Estimated waits against what then happens, on virtual time: 1,000 jobs each, and the means of the real ledger."""

import heapq
import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest

from engines.catalogue import JobType
from tasks import fleet, routing
from tasks.fleet import Card, Roster
from tasks.job import Envelope, Job, JobState
from tasks.ledger import Ledger
from tasks.routing import Load
from tasks.store import open_store

QUEUE = "asia-east.llm"
JOBS = 1000
#: Estimates count once this many jobs have run.
WARM = 20


class Region:
    """Slots that serve one queue in order, first in first out, on a clock of its own."""

    def __init__(self, store_url: str, slots: int) -> None:
        self._ledger = Ledger(open_store(store_url, timeout_s=2))
        self._slots = slots
        self._running: list[tuple[float, float, float]] = []  # ends, began, took
        self._waiting: list[tuple[float, float, float | None]] = []  # came, takes, estimate
        self._done = 0
        #: (estimated, waited) of every job that came when enough had run.
        self.waits: list[tuple[float, float]] = []

    def come(self, now: float, takes_s: float) -> None:
        """A job comes, and is told how long it will wait."""
        self._run_until(now)
        mean_s = self._ledger.traffic([QUEUE])[QUEUE].mean_s
        load = Load(self._slots, self._slots, mean_s).with_running([now - began for _, began, _ in self._running], [])
        estimate = routing.estimated_wait_s(len(self._waiting), load)
        self._waiting.append((now, takes_s, estimate if self._done >= WARM else None))
        self._start(now)

    def _run_until(self, now: float) -> None:
        while self._running and self._running[0][0] <= now:
            end, _, took_s = heapq.heappop(self._running)
            job = Job(str(uuid.uuid4()), JobType.LLM, 1)
            envelope = Envelope(job.id, 1, "w", "asia-east", JobState.COMPLETED, took_s, result={})
            self._ledger.finish(envelope, queue=QUEUE)
            self._done += 1
            self._start(end)

    def _start(self, now: float) -> None:
        while self._waiting and len(self._running) < self._slots:
            came, takes_s, estimate = self._waiting.pop(0)
            heapq.heappush(self._running, (now + takes_s, now, takes_s))
            if estimate is not None:
                self.waits.append((estimate, now - came))

    def close(self) -> None:
        """Run what is left."""
        self._run_until(float("inf"))


def uniform(mean_s: float) -> Callable[[random.Random], float]:
    """Jobs much alike: within a third of their mean."""
    return lambda dice: dice.uniform(mean_s * 2 / 3, mean_s * 4 / 3)


def lognormal(mean_s: float) -> Callable[[random.Random], float]:
    """Answers of any length: one in twenty takes more than twice the mean."""
    return lambda dice: mean_s * dice.lognormvariate(-0.125, 0.5)


@pytest.mark.parametrize("takes", [uniform, lognormal])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("flow", ["bursts", "steady"])
def test_half_of_the_estimates_are_within_30_per_cent_once_20_jobs_have_run(store_url, takes, slots, flow):
    dice = random.Random(7)
    region = Region(store_url, slots)
    take = takes(mean_s := 3.0)
    now = 0.0
    for n in range(JOBS):
        if flow == "bursts":
            # Fifty at once, and time to work off most of them.
            now += mean_s * 45 / slots if n % 50 == 0 else 0.0
        else:
            # More than can be served at first, then less, so that the queue grows and shrinks.
            now += dice.expovariate(slots / mean_s * (1.2 if n < JOBS / 2 else 0.8))
        region.come(now, take(dice))
    region.close()

    errors = sorted(abs(estimate - waited) / max(waited, 0.1 * mean_s) for estimate, waited in region.waits)
    assert len(errors) > JOBS / 2
    assert median(errors) < 0.30


def test_a_job_waits_for_the_first_slot_that_becomes_free():
    load = Load(slots=2, free=2, service_s=10.0).with_running([4.0, 9.0], [])

    assert [routing.estimated_wait_s(ahead, load) for ahead in range(4)] == pytest.approx([1, 6, 11, 16])


def test_a_job_that_runs_longer_than_most_is_not_taken_to_be_done():
    load = Load(slots=1, free=1, service_s=10.0).with_running([60.0], [])

    assert routing.estimated_wait_s(0, load) == 1.0


def test_what_has_begun_since_the_load_was_read_counts():
    load = Load(slots=2, free=2, service_s=10.0).with_running([5.0], [])
    assert routing.estimated_wait_s(0, load) == 0.0

    assert routing.estimated_wait_s(0, load.with_busy(2, 0)) == 5.0
    assert routing.estimated_wait_s(0, load.with_busy(0, 0)) == 0.0


def card(name: str, model: str, slots: int) -> Card:
    return Card(name, name, "asia-east", "host", "cpu", {JobType.LLM: model}, {JobType.LLM: slots}, 0.0)


def test_jobs_that_share_workers_share_a_queue_as_far_as_they_do():
    roster = Roster([card("a", "m", 3), card("b", "other", 1)])

    assert roster.beside("asia-east", JobType.LLM) == ["asia-east.llm@m", "asia-east.llm@other"]
    assert roster.beside("asia-east", JobType.LLM, "m") == ["asia-east.llm"]
    assert roster.beside("asia-east", JobType.LLM, "nobody's") == []
    assert roster.load("asia-east", JobType.LLM, service_s=None).share_beside == 1
    named = roster.load("asia-east", JobType.LLM, "m", service_s=2.0)
    assert (named.slots, named.share_beside) == (3, 0.75)
    # Of four jobs that name no model, three run where this model is.
    assert named.with_running([], [0.0, 0.5, 1.0, 1.5]).free == 0


def test_who_takes_no_new_jobs_has_no_slots():
    draining = replace(fleet.load_of([], JobType.LLM), service_s=1.0)

    assert (draining.slots, routing.estimated_wait_s(0, draining)) == (0, None)
