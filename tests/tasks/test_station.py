"""A station in this process: what it does with its jobs when an engine of its own hangs or breaks."""

import json
import threading
import time
import uuid

import pytest

from engines import echo
from engines.catalogue import JobType, find
from engines.contract import Device, EngineBroken, Progress
from tasks.duty import Duty
from tasks.fleet import Card, WorkerState, load_of
from tasks.job import Job, JobState
from tasks.ledger import Ledger
from tasks.presence import Presence
from tasks.records import Answer, Said
from tasks.station import EXIT_BROKEN, Station
from tasks.store import open_store
from tests.rig import BUSY_S, until

QUEUE = "asia-east.llm"


class Stuck:
    """An engine whose one thread hangs: nobody inside comes out before it is let go."""

    slots = 4

    def __init__(self):
        self.go = threading.Event()

    def run(self, params, report):
        self.go.wait(30)
        raise EngineBroken("let go")

    def close(self):
        self.go.set()


@pytest.fixture
def ledger(store_url):
    return Ledger(open_store(store_url, timeout_s=2))


def start(ledger, engine, warnings=None, open_it=True):
    left = []
    card = Card("w1", "w1", "asia-east", "host", "cpu", {JobType.LLM: "m"}, {JobType.LLM: 4}, time.time())
    station = Station(card, {JobType.LLM: engine}, ledger, warnings=warnings, leave=left.append, hang_grace_s=0.2)
    if open_it:
        station.open()
    return station, left


def enter(ledger, timeout_s):
    job = Job(str(uuid.uuid4()), JobType.LLM, 1)
    ledger.put(job, queue=QUEUE, priority=0, params="{}", timeout_s=timeout_s)
    return job


def test_a_hung_engine_costs_its_job_and_gives_the_others_back_uncounted(ledger):
    engine = Stuck()
    station, left = start(ledger, engine)
    hung, beside = enter(ledger, 0.1), enter(ledger, 600)
    threads = [threading.Thread(target=station.execute, args=[job]) for job in (hung, beside)]
    for thread in threads:
        thread.start()

    until(lambda: left, 15)
    engine.close()
    for thread in threads:
        thread.join()
    station.close()

    assert left[0] == EXIT_BROKEN
    assert ledger.look(hung.id).outcome.outcome is JobState.TIMEOUT
    assert ledger.position(beside.id, QUEUE) == 1
    assert ledger.begin(beside, worker_id="w2", token="t").answer is Answer.RUN
    assert ledger.presence.cards() == []


class Counting:
    """An engine that says how far it is whenever a test lets it."""

    slots = 1

    def __init__(self):
        self.go = threading.Semaphore(0)

    def run(self, params, report):
        for done in (1, 2):
            report(Progress(done, 2, "step"))
            self.go.acquire(timeout=30)
        return {"warnings": ["its own"]}

    def close(self):
        pass


def test_the_ledger_shows_how_far_a_running_job_is_and_forgets_it_with_its_end(ledger):
    engine = Counting()
    station, _ = start(ledger, engine, warnings={JobType.LLM: "of the worker"})
    job = enter(ledger, 600)
    assert ledger.progress(job.id) is None
    thread = threading.Thread(target=station.execute, args=[job])
    thread.start()

    until(lambda: ledger.progress(job.id) == Progress(1, 2, "step"))
    engine.go.release()
    until(lambda: ledger.progress(job.id) == Progress(2, 2, "step"))
    engine.go.release()
    thread.join()

    assert ledger.progress(job.id) is None
    assert ledger.look(job.id).outcome.result == {"warnings": ["of the worker", "its own"]}
    ledger.tell("w2", [Said(job.id, 1, Progress(1, 2, "step"), 1, "{}")])  # of a worker that lost the job
    assert ledger.progress(job.id) is None
    station.close()


def test_a_job_that_an_older_api_took_has_the_params_that_it_did_not_know(ledger):
    known = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0, "top_p": 1, "seed": 1}
    station, _ = start(ledger, echo.Engine(find(JobType.LLM, "echo"), Device("cpu")))
    job = Job(str(uuid.uuid4()), JobType.LLM, 1)
    ledger.put(job, queue=QUEUE, priority=0, params=json.dumps(known), timeout_s=5)

    assert station.execute(job) == "completed"

    assert ledger.look(job.id).outcome.result["response"] == "hi"
    station.close()


class FrozenOnce(Ledger):
    """A ledger whose first answer is heard after another worker has taken the job over."""

    thawed = False

    def begin(self, job, *, worker_id, token):
        claim = super().begin(job, worker_id=worker_id, token=token)
        if worker_id == "w1" and not self.thawed:
            self.thawed = True
            self.store.delete("lease:w1")
            self.presence.beat("w2", "{}", [])
            assert super().begin(job, worker_id="w2", token="u").answer is Answer.RUN
            time.sleep(0.1)
        return claim


def test_a_worker_that_was_frozen_as_it_began_a_job_does_not_run_what_others_do(store_url, monkeypatch):
    monkeypatch.setattr("tasks.station.LEASE_S", 0.1)
    ledger = FrozenOnce(open_store(store_url, timeout_s=2))
    station, _ = start(ledger, Stuck(), open_it=False)
    job = enter(ledger, 60)

    assert station.execute(job) == "busy"
    station.close()


class BrokenBeat(Presence):
    """Whose answer to a beat cannot be read."""

    def beat(self, *args, **kwargs):
        raise ValueError("no such answer")


def test_a_worker_whose_beat_cannot_go_on_leaves(store_url):
    store = open_store(store_url, timeout_s=2)
    ledger = Ledger(store)
    ledger.presence = BrokenBeat(store)
    station, left = start(ledger, Stuck(), open_it=False)
    station.announce()

    until(lambda: left)

    assert left == [EXIT_BROKEN]


def test_a_job_of_a_type_without_an_engine_fails_and_says_so(ledger):
    station, _ = start(ledger, Stuck())
    job = Job(str(uuid.uuid4()), JobType.VISION, 1)
    ledger.put(job, queue="asia-east.vision", priority=0, params="{}", timeout_s=5)

    assert station.execute(job) == "failed"

    assert ledger.look(job.id).outcome.error.code == "no_engine"
    station.close()


def test_the_card_shows_what_runs_and_whether_it_drains(ledger):
    engine = Stuck()
    station, _ = start(ledger, engine)
    job = enter(ledger, 600)
    thread = threading.Thread(target=station.execute, args=[job])
    thread.start()

    until(lambda: station.card.busy == {JobType.LLM: 1})
    station.drain()
    until(lambda: Card.decode(ledger.presence.cards()[0]).state is WorkerState.DRAINING)
    assert Card.decode(ledger.presence.cards()[0]).busy == {JobType.LLM: 1}

    engine.close()
    thread.join()
    station.close()
    assert ledger.presence.cards() == []


def test_a_worker_shows_that_it_loads_and_takes_jobs_only_once_it_has(ledger):
    loading = Card("w1", "w1", "asia-east", "host", "cpu", {}, {JobType.LLM: 0}, time.time(), state=WorkerState.LOADING)
    station = Station(loading, {}, ledger)
    station.announce()
    until(lambda: ledger.presence.cards())
    shown = [Card.decode(text) for text in ledger.presence.cards()]
    assert (shown[0].state, load_of(shown, JobType.LLM).slots) == (WorkerState.LOADING, 0)

    station.equip({JobType.LLM: Stuck()}, {JobType.LLM: "m"}, Duty({JobType.LLM: 4}), {})
    station.open()
    until(lambda: Card.decode(ledger.presence.cards()[0]).state is WorkerState.READY)

    shown = [Card.decode(text) for text in ledger.presence.cards()]
    assert load_of(shown, JobType.LLM).slots == 4
    station.close()


def test_a_worker_that_loads_while_the_store_is_away_waits_for_nothing(store_url, valkey):
    valkey.stop()
    station = Station(
        Card("w1", "w1", "asia-east", "host", "cpu", {}, {}, time.time(), state=WorkerState.LOADING),
        {},
        Ledger(open_store(store_url, timeout_s=20)),
    )
    began = time.monotonic()

    station.announce()
    station.equip({JobType.LLM: Stuck()}, {JobType.LLM: "m"}, Duty({JobType.LLM: 4}), {})

    assert time.monotonic() - began < 2.5 + BUSY_S
    valkey.cont()
    station.close()


@pytest.mark.parametrize("when", ["while it loads", "while it serves"])
def test_an_order_to_drain_is_followed_at_once_and_taken_back_but_not_by_one_that_ends(ledger, when):
    # Nothing but the order itself makes it beat.
    station = Station(
        Card("w1", "gpu", "asia-east", "host", "cpu", {}, {}, time.time(), state=WorkerState.LOADING),
        {},
        ledger,
        beat_s=600,
    )
    duty = Duty({JobType.LLM: 4})

    def order(*, drain):
        ledger.presence.order("gpu", ["w1"], drain=drain)
        station.beat_now()  # as the channel does

    if when == "while it loads":
        order(drain=True)
        station.beat()
    station.equip({JobType.LLM: Stuck()}, {JobType.LLM: "m"}, duty, {})
    station.open()
    if when == "while it serves":
        assert duty.open_for(JobType.LLM)
        order(drain=True)
        until(lambda: not duty.open_for(JobType.LLM))
    assert not duty.open_for(JobType.LLM)
    until(lambda: Card.decode(ledger.presence.cards()[0]).state is WorkerState.DRAINING)

    order(drain=False)
    until(lambda: duty.open_for(JobType.LLM))
    station.drain()
    order(drain=True)
    order(drain=False)
    station.beat()

    assert not duty.open_for(JobType.LLM)
    station.close()
