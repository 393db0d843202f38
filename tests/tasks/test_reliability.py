"""What counts for and against a worker, how it fades, and that nothing counts twice."""

import time
import uuid

import pytest

from engines.catalogue import JobType
from tasks.fleet import Card
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import Ledger
from tasks.reliability import HALF_LIFE_S, LOST_FAULTS, Tally, decayed, rank, score, weigh
from tasks.store import open_store

QUEUE = "asia-east.llm"


@pytest.mark.parametrize(
    ("good", "faults", "shown"), [(0, 0, 0.95), (100, 5, 0.952), (0, 5, 0.633), (1000, 0, 0.9995)], ids=str
)
def test_the_score_of(good, faults, shown):
    assert score(Tally(good, faults)) == pytest.approx(shown, abs=5e-4)


@pytest.mark.parametrize(
    ("good", "faults", "ranked"), [(0, 0, 0.0), (10, 0, 0.722), (100, 0, 0.963), (100, 5, 0.893), (0, 9, 0.0)], ids=str
)
def test_the_rank_of(good, faults, ranked):
    assert rank(Tally(good, faults)) == pytest.approx(ranked, abs=1e-3)


def test_half_of_everything_is_forgotten_in_a_half_life_and_nothing_by_a_clock_that_went_back():
    assert decayed(Tally(8, 2, at=100), 100 + 2 * HALF_LIFE_S) == Tally(2, 0.5, 100 + 2 * HALF_LIFE_S)
    assert decayed(Tally(8, 2, at=100), 50) == Tally(8, 2, 100)


@pytest.mark.parametrize(
    ("state", "code", "counted"),
    [
        (JobState.COMPLETED, None, (1, 0)),
        (JobState.CANCELLED, None, (0, 0)),
        (JobState.TIMEOUT, "run_timeout", (0, 0.5)),
        (JobState.FAILED, "engine_error", (0, 1)),
        (JobState.FAILED, "invalid_input", (0, 0)),
        (JobState.FAILED, "audio_too_long", (0, 0)),
        (JobState.FAILED, "out_of_memory", (0, 0)),
    ],
    ids=str,
)
def test_an_outcome_counts(state, code, counted):
    envelope = Envelope("j", 1, "w", "asia-east", state, 0.5, error=JobError(code, "") if code else None)

    assert weigh(envelope) == counted


# In the store


@pytest.fixture
def ledger(store_url):
    return Ledger(open_store(store_url, timeout_s=2))


def beat(ledger, worker_id, name="gpu", running=(), lease_s=10.0, state="ready"):
    card = Card(worker_id, name, "asia-east", "host", "cpu", {}, {JobType.LLM: 1}, time.time(), state)
    return ledger.presence.beat(worker_id, card.encode(), running, name=name, lease_s=lease_s)


def tally(ledger, name="gpu"):
    found = ledger.presence.tallies([name])[name]
    return round(found.good, 3), round(found.faults, 3)


def lose(ledger, worker_id):
    """Its lease ends as if its last beat was 20 s ago."""
    ledger.store.delete(f"lease:{worker_id}")
    ledger.store.zincrby("workers", -20, worker_id)


def states(ledger):
    return {seen.worker_id: seen.alive for seen in ledger.presence.workers()}


def test_an_outcome_that_is_handed_in_again_counts_once_and_one_that_is_refused_never(ledger):
    job = Job(str(uuid.uuid4()), JobType.LLM, 1)
    ledger.put(job, queue=QUEUE, priority=0, params="{}", timeout_s=60)
    ledger.begin(job, worker_id="w1", token="t")
    done = Envelope(job.id, 1, "w1", "asia-east", JobState.COMPLETED, 0.5)

    for _ in range(2):
        assert ledger.finish(done, queue=QUEUE, name="gpu")
    assert not ledger.finish(Envelope(job.id, 1, "w2", "asia-east", JobState.COMPLETED, 0.5), queue=QUEUE, name="other")

    assert tally(ledger) == (1, 0)
    assert tally(ledger, "other") == (0, 0)


def test_counts_fade_in_the_store_as_they_do_here(ledger):
    seconds, _ = ledger.store.time()
    ledger.store.hset("reliability:gpu", mapping={"good": 8, "faults": 2, "at": seconds - HALF_LIFE_S})
    assert tally(ledger) == (4, 1)

    beat(ledger, "w1")
    lose(ledger, "w1")
    ledger.orphans()

    assert tally(ledger) == (4, 1 + LOST_FAULTS)
    assert 0 < ledger.store.ttl("reliability:gpu") <= 8 * HALF_LIFE_S


def test_a_worker_that_is_lost_counts_once_whatever_it_ran_and_is_shown_until_it_comes_back(ledger):
    job = Job(str(uuid.uuid4()), JobType.LLM, 1)
    ledger.put(job, queue=QUEUE, priority=0, params="{}", timeout_s=60)
    beat(ledger, "w1")
    ledger.begin(job, worker_id="w1", token="t")
    lose(ledger, "w1")

    assert ledger.orphans() == [("w1", job.id)]
    ledger.bury("w1", job.id)
    for _ in range(3):
        assert ledger.orphans() == []
    assert tally(ledger) == (0, LOST_FAULTS)
    assert states(ledger) == {"w1": False}

    beat(ledger, "w1")
    assert (states(ledger), ledger.orphans(), tally(ledger)) == ({"w1": True}, [], (0, LOST_FAULTS))


@pytest.mark.parametrize("successor", ["before", "after"])
def test_a_lost_worker_is_no_longer_shown_once_its_name_is_taken(ledger, successor):
    beat(ledger, "w1")
    if successor == "before":
        beat(ledger, "w2")
    lose(ledger, "w1")
    ledger.orphans()
    if successor == "after":
        beat(ledger, "w2")

    assert states(ledger) == {"w2": True}
    assert tally(ledger) == (0, LOST_FAULTS)


def test_a_worker_that_ends_as_it_was_told_to_leaves_nothing_and_one_that_falls_is_lost(ledger):
    beat(ledger, "w1", name="stopped")
    beat(ledger, "w2", name="fallen")

    ledger.presence.retire("w1", name="stopped")
    ledger.presence.retire("w2", name="fallen", told=False)
    ledger.orphans()

    assert states(ledger) == {"w2": False}
    assert (tally(ledger, "stopped"), tally(ledger, "fallen")) == ((0, 0), (0, LOST_FAULTS))
    assert set(ledger.store.hkeys("names")) == {"fallen"}


def test_a_worker_that_dies_while_it_loads_is_shown_and_failed_nobody(ledger):
    beat(ledger, "w1", state="loading")
    lose(ledger, "w1")
    ledger.orphans()

    assert states(ledger) == {"w1": False}
    assert tally(ledger) == (0, 0)


def test_nothing_of_a_lost_worker_is_kept_after_a_day_but_its_counts(ledger):
    beat(ledger, "w1")
    lose(ledger, "w1")
    ledger.orphans()
    ledger.store.zincrby("lost", -25 * 3600, "w1")

    ledger.orphans()

    assert ledger.presence.workers() == []
    assert set(ledger.store.scan_iter()) == {"reliability:gpu"}
