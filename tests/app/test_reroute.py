"""When queued jobs leave a region, and when they stay; workers are cards, and channels that somebody listens to."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import text

from app import links, reroute
from app.control import Reconciler
from app.dispatch import Dispatch, open_dispatch
from app.job_table import JobRow
from app.request import Request
from app.reroute import Reroute
from app.tables import open_database
from engines.catalogue import JobType
from tasks.fleet import Card, WorkerState
from tasks.job import Envelope, Job, JobState
from tasks.ledger import Ledger
from tasks.records import Answer
from tasks.settings import load_regions
from tasks.store import open_store

HERE, THERE = "asia-east", "europe-west"


class Place:
    """Two regions, asia-east on database 1 and europe-west on database 2 of one server."""

    def __init__(self, url: str, database_url: str, blobs: str) -> None:
        self.stores = {HERE: f"{url}/1", THERE: f"{url}/2"}
        regions = load_regions({"GPU_BROKER_URL": f"{url}/0", "GPU_STORE_URL": f"{url}/1"})
        two = {name: dataclasses.replace(regions[name], store=store) for name, store in self.stores.items()}
        self.engine = open_database(database_url)
        self.dispatch: Dispatch = open_dispatch(self.engine, two, HERE, blobs)
        self._listening: list[Any] = []

    def ledger(self, region: str) -> Ledger:
        """The region's own, as its workers have it."""
        return Ledger(open_store(self.stores[region], timeout_s=2))

    def work(self, region: str, *, state: WorkerState = WorkerState.READY, listens: bool = True) -> Any:
        """A worker of that region; its control channel."""
        name = f"w-{region}"
        card = Card(name, name, region, "host", "cpu", {JobType.LLM: "m"}, {JobType.LLM: 1}, time.time(), state)
        ledger = self.ledger(region)
        ledger.presence.beat(name, card.encode(), [])
        channel = ledger.store.pubsub()
        if listens:
            channel.subscribe(f"ctl:{name}")
            channel.get_message(timeout=2)
        # With the ledger, whose connections end when nobody holds it any more.
        self._listening.append((channel, ledger))
        return channel

    def submit(self, region: str = HERE, **changes: Any) -> JobRow:
        """A job that is queued in the region."""
        wanted: dict[str, Any] = {"allow_cross_region": True, "model": None, **changes}
        request = Request(
            type=JobType.LLM,
            requested_model=wanted["model"],
            params={"messages": []},
            priority=0,
            region=region,
            timeout_seconds=60,
            queue_timeout_seconds=None,
            **wanted,
        )
        row = self.dispatch.submit("tester", request).row
        self.dispatch.flush()
        return row

    def region_of(self, row: JobRow) -> str:
        """Where the job is now."""
        found = self.dispatch.rows.get(row.id)
        assert found is not None
        return found.region

    def close(self) -> None:
        """Drop every connection."""
        for channel, _ in self._listening:
            channel.close()
        self.dispatch.close()
        self.engine.dispose()


@pytest.fixture
def place(valkey: Any, database_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The two regions, with every patience but that for loading workers cut to nothing."""
    for name in ("EVERY_S", "GRACE_S", "UNREACHABLE_S", "UNREACHABLE_RUNNING_S", "UNKNOWN_EVERY_S"):
        monkeypatch.setattr(reroute, name, 0.0)
    monkeypatch.setattr(reroute, "UNREACHABLE_S", 0.01)
    monkeypatch.setattr(links, "FRESH_S", 0.0)
    made = Place(valkey.url, database_url, str(tmp_path / "blobs"))
    yield made
    made.close()


def test_jobs_leave_for_a_region_with_a_worker_and_pinned_ones_stay(place):
    may, may_not = place.submit(), place.submit(allow_cross_region=False)
    named = place.submit(model="m")
    elsewhere = place.submit(model="nobody's")
    place.work(THERE)

    Reconciler(place.dispatch).tick()

    assert [place.region_of(row) for row in (may, may_not, named, elsewhere)] == [THERE, HERE, THERE, HERE]
    # Sent there, and gone from here.
    assert place.ledger(THERE).position(may.id, f"{THERE}.llm") == 1
    assert place.ledger(HERE).position(may.id, f"{HERE}.llm") is None
    assert place.ledger(HERE).begin(Job(may.id, JobType.LLM, 1), worker_id="w", token="t").answer is Answer.STALE
    assert place.ledger(THERE).look(may_not.id) is None


def test_jobs_stay_with_a_worker_that_listens_and_leave_one_whose_connection_has_ended(place):
    here = place.work(HERE)
    row = place.submit()
    place.work(THERE)
    moving = Reroute(place.dispatch)

    moving.look()
    assert place.region_of(row) == HERE
    # As when its process was killed: its lease is still alive.
    here.close()
    moving.look()
    assert place.region_of(row) == THERE


def test_jobs_stay_for_a_while_where_a_worker_loads_and_leave_one_that_drains(place):
    place.work(HERE, state=WorkerState.LOADING)
    row = place.submit(allow_cross_region=True)
    assert place.region_of(row) == HERE
    place.work(THERE)
    moving = Reroute(place.dispatch)

    moving.look()
    assert place.region_of(row) == HERE
    place.work(HERE, state=WorkerState.DRAINING)
    moving.look()
    assert place.region_of(row) == THERE


def test_jobs_of_a_region_that_left_the_settings_move_and_pinned_ones_do_no_harm(place):
    row, pinned = place.submit(), place.submit(allow_cross_region=False)
    place.work(THERE)
    with place.engine.connect() as connection:
        connection.execute(text("UPDATE jobs SET region = 'mars', due_at = 0"))

    Reconciler(place.dispatch).tick()

    assert [place.region_of(job) for job in (row, pinned)] == [THERE, "mars"]
    assert "mars cannot be reached" in place.dispatch.placement.place(place.dispatch.rows.get(pinned.id)).reason
    assert place.dispatch.cancel(pinned).status is JobState.CANCELLED


def test_what_a_move_left_behind_is_dropped_when_somebody_leads_again(place):
    row = place.submit()
    # The mover died between the move and the rest of it.
    assert place.dispatch.rows.move(HERE, JobType.LLM, None, to=THERE, limit=10)

    Reroute(place.dispatch).look()

    assert place.ledger(HERE).position(row.id, f"{HERE}.llm") is None
    assert place.ledger(HERE).begin(Job(row.id, JobType.LLM, 1), worker_id="w", token="t").answer is Answer.STALE


def test_an_outcome_from_the_region_that_a_job_left_counts_and_nobody_runs_it_again(place):
    row = place.submit()
    ledger = place.ledger(HERE)
    claim = ledger.begin(Job(row.id, JobType.LLM, 1), worker_id="w", token="t")
    assert place.dispatch.rows.move(HERE, JobType.LLM, None, to=THERE, limit=10)
    reconciler = Reconciler(place.dispatch)
    reconciler.send_due()
    assert place.ledger(THERE).position(row.id, f"{THERE}.llm") == 1
    said = Envelope(row.id, 1, "w", HERE, JobState.COMPLETED, 1.0, {"response": "hi"}, ticket=claim.ticket)
    ledger.finish(said, queue=f"{HERE}.llm")

    reconciler.tick()

    ended = place.dispatch.rows.get(row.id)
    assert (ended.status, ended.worker_id, ended.region) == (JobState.COMPLETED, "w", HERE)
    there = place.ledger(THERE)
    assert there.position(row.id, f"{THERE}.llm") is None
    assert there.begin(Job(row.id, JobType.LLM, 2), worker_id="x", token="t").answer is Answer.CANCELLED


def test_what_lies_in_a_region_that_a_job_left_does_not_touch_the_job(place):
    row = place.submit()
    ledger = place.ledger(HERE)
    job = Job(row.id, JobType.LLM, 1)
    ledger.begin(job, worker_id="w", token="t")
    assert place.dispatch.rows.move(HERE, JobType.LLM, None, to=THERE, limit=10)
    moved = place.dispatch.rows.get(row.id)
    reconciler = Reconciler(place.dispatch)

    # Running, an orphan, given back, and delivered too often.
    mailbox = place.dispatch.links[HERE].mailbox
    reconciler.fold_news(mailbox)
    ledger.store.zadd("workers", {"w": 0})
    reconciler.retry_lost(mailbox)
    ledger.release(job, worker_id="w")
    reconciler.fold_news(mailbox)
    for n in range(4):
        ledger.begin(job, worker_id=f"other{n}", token="t")
    reconciler.fold_news(mailbox)

    assert place.dispatch.rows.get(row.id) == moved


def test_two_readers_of_one_outcome_call_nothing_late(place, caplog):
    row = place.submit()
    ledger = place.ledger(HERE)
    claim = ledger.begin(Job(row.id, JobType.LLM, 1), worker_id="w", token="t")
    said = Envelope(row.id, 1, "w", HERE, JobState.COMPLETED, 1.0, result={}, ticket=claim.ticket)
    ledger.finish(said, queue=f"{HERE}.llm")
    record = ledger.look(row.id)
    caplog.set_level("INFO")

    folded = [place.dispatch.fold(row, record) for _ in range(2)]

    assert folded[0] == folded[1]
    assert "too late" not in caplog.text


def test_the_control_channel_tells_who_listens(place):
    channel = place.work(HERE)
    ledger = place.ledger(HERE)

    assert ledger.presence.anyone_listens([f"w-{HERE}", "nobody"])
    assert not ledger.presence.anyone_listens(["nobody"])
    channel.close()
    assert not ledger.presence.anyone_listens([f"w-{HERE}"])
    assert isinstance(ledger.store, redis.Redis)
