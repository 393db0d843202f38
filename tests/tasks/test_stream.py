"""What a running job says, from its engine through the store to whoever listens."""

import json
import threading
import time
import uuid

import pytest

from engines.catalogue import JobType
from engines.contract import Progress, Text
from tasks import stream
from tasks.fleet import Card
from tasks.job import Job, JobState
from tasks.ledger import ENDED_EVENTS_TTL_S, EVENTS_TTL_S, MOST_ENTRIES, Ledger
from tasks.records import Said
from tasks.station import Station
from tasks.store import open_store
from tasks.stream import Feed, Teller
from tests.rig import until

QUEUE = "asia-east.llm"


class Told:
    """An engine that says what a test puts into it."""

    slots = 4

    def __init__(self):
        self.texts = []
        self.go = threading.Semaphore(0)
        self.said = threading.Semaphore(0)

    def run(self, params, report):
        for text in self.texts:
            report(text)
            self.said.release()
            self.go.acquire(timeout=30)
        return {"response": "".join(text.delta for text in self.texts)}

    def close(self):
        for _ in self.texts:
            self.go.release()


@pytest.fixture
def ledger(store_url):
    return Ledger(open_store(store_url, timeout_s=0.5), waiting=open_store(store_url, timeout_s=2, block_s=5))


@pytest.fixture
def engine():
    return Told()


@pytest.fixture
def station(ledger, engine):
    card = Card("w1", "w1", "asia-east", "host", "cpu", {JobType.LLM: "m"}, {JobType.LLM: 4}, time.time())
    station = Station(card, {JobType.LLM: engine}, ledger, leave=lambda code: None)
    station.open()
    yield station
    engine.close()
    station.close()


def enter(ledger):
    job = Job(str(uuid.uuid4()), JobType.LLM, 1)
    ledger.put(job, queue=QUEUE, priority=0, params="{}", timeout_s=60)
    return job


def run(station, job):
    thread = threading.Thread(target=station.execute, args=[job])
    thread.start()
    return thread


def heard(ledger, job, after=(0, 0)):
    """All entries until nothing more follows."""
    entries = []
    while not entries or not entries[-1].last:
        found = stream.hear(ledger, job.id, after, 5)
        assert found, "it says nothing more"
        entries += found
        after = entries[-1].run, entries[-1].number
    return entries


def text_of(entries, choice=0):
    return "".join(
        each.delta for entry in entries for each in entry.said if isinstance(each, Text) and each.choice == choice
    )


def test_a_first_word_is_heard_while_the_engine_has_not_got_to_the_second(ledger, station, engine):
    engine.texts = [Text("one "), Text("two", logprobs=[{"token": "two", "logprob": -0.5}])]
    job = enter(ledger)
    thread = run(station, job)
    first = []
    until(lambda: first.extend(stream.hear(ledger, job.id, (0, 0), 1)) or text_of(first) == "one ")

    assert thread.is_alive()
    engine.go.release()
    engine.go.release()
    thread.join()
    entries = heard(ledger, job)

    assert text_of(entries) == "one two"
    assert [entry.last for entry in entries] == [False] * (len(entries) - 1) + [True]
    assert [entry.number for entry in entries[:-1]] == list(range(1, len(entries)))
    assert {entry.attempt for entry in entries} == {1}
    (said,) = (each for entry in entries for each in entry.said if each.logprobs)
    assert said.logprobs == [{"token": "two", "logprob": -0.5}]


def test_many_words_are_joined_by_choice_and_none_is_lost(ledger, station, engine):
    engine.texts = [Text(f"{number} ", choice=number % 2) for number in range(2000)]
    for _ in engine.texts:
        engine.go.release()
    job = enter(ledger)
    station.execute(job)
    entries = heard(ledger, job)

    assert text_of(entries, 0) == "".join(f"{number} " for number in range(0, 2000, 2))
    assert text_of(entries, 1) == "".join(f"{number} " for number in range(1, 2000, 2))
    assert len(entries) < 1000


def test_a_frozen_store_holds_up_no_engine_and_hears_each_word_once(ledger, station, engine, valkey):
    engine.texts = [Text(f"{number} ") for number in range(300)]
    job = enter(ledger)
    thread = run(station, job)
    engine.said.acquire(timeout=10)
    until(lambda: text_of(stream.hear(ledger, job.id, (0, 0), 1)) == "0 ")
    valkey.stop()
    for _ in engine.texts[1:]:
        engine.go.release()
        assert engine.said.acquire(timeout=0.4), "the engine waits for the store"
        time.sleep(0.004)
    valkey.cont()
    engine.go.release()
    thread.join()

    assert text_of(heard(ledger, job)) == "".join(text.delta for text in engine.texts)


def test_a_worker_that_lost_its_job_says_nothing_more_and_no_entry_is_added_twice(ledger):
    job = enter(ledger)
    ledger.begin(job, worker_id="w1", token="t")
    for worker, attempt, number in (("w1", 1, 1), ("w2", 1, 2), ("w1", 2, 2), ("w1", 1, 2), ("w1", 1, 2), ("w1", 1, 1)):
        text = json.dumps({"text": [[0, f"{worker}{attempt}{number}"]]})
        ledger.tell(worker, [Said(job.id, attempt, None, number, text)])

    assert text_of(stream.hear(ledger, job.id, (0, 0), 0)) == "w111w112"

    ledger.release(job, worker_id="w1")
    ledger.begin(job, worker_id="w2", token="t")
    ledger.tell("w1", [Said(job.id, 1, Progress(1, 2, "token"), 3, '{"text":[[0,"late"]]}')])
    ledger.tell("w2", [Said(job.id, 1, None, 1, '{"text":[[0,"anew"]]}')])

    # Whoever comes now hears the present run alone.
    assert text_of(stream.hear(ledger, job.id, (0, 0), 0)) == "anew"
    assert ledger.progress(job.id) is None


def test_whoever_comes_just_after_a_cancel_hears_of_it(ledger):
    job = enter(ledger)
    ledger.begin(job, worker_id="w1", token="t")
    ledger.cancel(job.id)

    (entry,) = stream.hear(ledger, job.id, (0, 0), 0)
    assert entry.last
    assert stream.hear(ledger, job.id, (entry.run, entry.number), 0) == []


def test_a_run_is_heard_though_the_clock_of_the_store_went_back(ledger):
    job = enter(ledger)
    ledger.begin(job, worker_id="w1", token="t")
    ledger.store.xadd(f"events:{job.id}", {"attempt": 1, "said": "{}"}, id=f"{int(time.time() * 1000) + 60_000}-5")

    for number in (1, 2, 1):
        ledger.tell("w1", [Said(job.id, 1, None, number, json.dumps({"text": [[0, str(number)]]}))])

    assert text_of(stream.hear(ledger, job.id, (0, 0), 0)) == "12"


def test_a_stream_is_bounded_and_goes_soon_after_its_job(ledger, station, engine):
    job = enter(ledger)
    ledger.begin(job, worker_id="w1", token="t")
    for start in range(1, MOST_ENTRIES + 1000, 500):
        ledger.tell("w1", [Said(job.id, 1, None, number, "{}") for number in range(start, start + 500)])
    key = f"events:{job.id}"

    assert ledger.store.xlen(key) <= MOST_ENTRIES + 100
    assert ENDED_EVENTS_TTL_S < ledger.store.ttl(key) <= EVENTS_TTL_S
    ledger.forget([job.id])
    assert 0 < ledger.store.ttl(key) <= ENDED_EVENTS_TTL_S

    quiet = enter(ledger)
    station.execute(quiet)
    assert ledger.look(quiet.id).outcome.outcome is JobState.COMPLETED
    assert 0 < ledger.store.ttl(f"events:{quiet.id}") <= ENDED_EVENTS_TTL_S


def test_what_waits_for_a_store_that_is_away_is_bounded(ledger, monkeypatch):
    monkeypatch.setattr(stream, "MOST_WAITING", 1000)
    feed = Feed(Teller(ledger, "w1"), Job("j", JobType.LLM, 1))
    for _ in range(100):
        feed.say(Text("x" * 100))
        feed.gather()

    assert len(feed.next_entry(None)) < 1100


def test_a_longer_run_writes_more_slowly_so_that_its_whole_text_fits(ledger):
    feed = Feed(Teller(ledger, "w1"), Job("j", JobType.LLM, 1))
    clock = 0.0
    # An hour of words without a pause.
    while clock < 3600:
        feed.number += 1
        feed.sent_at = clock
        clock = feed.due_at

    assert feed.number < MOST_ENTRIES
