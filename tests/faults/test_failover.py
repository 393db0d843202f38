"""A region that cannot serve its queue: what may leave it completes elsewhere, what may not waits and says so."""

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from app import reroute
from engines.catalogue import JobType
from tasks.job import JobState
from tests.conftest import Valkey
from tests.rig import Platform, free_port

FAR = {"queues": "europe-west.llm", "GPU_REGION": "europe-west"}
HOME = {"queues": "asia-east.llm", "GPU_REGION": "asia-east"}


@pytest.fixture
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The server of europe-west."""
    server = Valkey(free_port(), tmp_path_factory.mktemp("far"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def both(valkey: Valkey, far: Valkey, make_platform: Callable[..., Platform]) -> Platform:
    """A platform of two regions, each with a broker and a store of its own."""
    urls = {"asia-east": valkey.url, "europe-west": far.url}
    regions = {name: {"broker": f"{url}/0", "store": f"{url}/1"} for name, url in urls.items()}
    return make_platform(REGIONS=json.dumps(regions))


@pytest.fixture
def shared(make_platform: Callable[..., Platform]) -> Platform:
    """A platform whose regions share one server."""
    return make_platform()


def test_a_region_that_loses_its_workers_loses_its_queue_to_the_nearest_and_keeps_what_is_pinned(both):
    platform: Platform = both
    home = platform.start_worker(**HOME, GPU_MAX_CONCURRENT_JOBS="4", wait=False)
    platform.start_worker(**FAR)
    platform.until(lambda: home.id, 40)
    running = [platform.submit("sleep 2", region="asia-east") for _ in range(4)]
    platform.until(lambda: all(platform.status(row) is JobState.RUNNING for row in running))
    # It must not get any further while the others are sent.
    home.signal(signal.SIGSTOP)
    queued = [platform.submit(f"job {n}", region="asia-east", priority=n % 3) for n in range(200)]
    pinned = [platform.submit(f"pinned {n}", region="asia-east", allow_cross_region=False) for n in range(5)]

    home.signal(signal.SIGKILL)
    ended = [platform.ended(row, 40) for row in (*queued, *running)]

    assert {(row.status, row.region) for row in ended} == {(JobState.COMPLETED, "europe-west")}
    # A move is no lost worker: only those that ran have lost one.
    assert {row.losses for row in ended[:200]} == {0}
    assert {row.losses for row in ended[200:]} == {1}
    logs = "".join(worker.log.read_text() for worker in platform.workers)
    assert Counter(logs.count(f"{row.id} attempt {row.attempt}: completed") for row in ended) == {1: 204}
    assert all(logs.count(f"{row.id} attempt") == 1 for row in ended)
    waits = [platform.row(row) for row in pinned]
    assert {(row.status, row.region, row.attempt) for row in waits} == {(JobState.QUEUED, "asia-east", 1)}
    assert platform.dispatch.placement.place(waits[0]).reason == (
        "No live worker serves llm in asia-east, and it may not leave the region."
    )

    back = platform.start_worker(**HOME)
    again = [platform.ended(row, 20) for row in pinned]
    again.append(platform.ended(platform.submit("new", region="asia-east"), 20))

    assert {(row.status, row.region, row.worker_id) for row in again} == {(JobState.COMPLETED, "asia-east", back.id)}


def test_a_region_whose_store_freezes_is_left_and_what_it_still_holds_does_no_harm(both, far, monkeypatch):
    monkeypatch.setattr(reroute, "UNREACHABLE_S", 1.5)
    monkeypatch.setattr(reroute, "UNREACHABLE_RUNNING_S", 2.5)
    here = both.start_worker(**HOME, wait=False)
    both.start_worker(**FAR, GPU_MAX_CONCURRENT_JOBS="1")
    both.until(lambda: here.id, 40)
    running = both.submit("sleep 4", region="europe-west")
    both.until(lambda: both.status(running) is JobState.RUNNING)
    queued = [both.submit(f"job {n}", region="europe-west") for n in range(20)]
    pinned = both.submit("pinned", region="europe-west", allow_cross_region=False)

    far.stop()
    ended = [both.ended(row, 20) for row in (*queued, running)]

    assert {(row.status, row.region, row.worker_id) for row in ended} == {(JobState.COMPLETED, "asia-east", here.id)}
    assert "may not leave it" in str(both.dispatch.placement.place(both.row(pinned)).reason)
    held = both.dispatch.statistics(None).by_region["europe-west"]
    assert (held.reachable, held.queued) == (False, 1)

    far.cont()
    assert both.ended(pinned, 30).region == "europe-west"
    both.until(lambda: far.client().zcard("wait:europe-west.llm") == 0)
    both.until(lambda: far.client().zcard("begun:europe-west.llm") == 0)
    assert [both.row(row) for row in (*queued, running)] == ended


def test_a_job_parked_where_nobody_is_goes_to_the_first_worker_that_appears_anywhere(shared):
    parked = shared.submit("anyone", region="asia-east")
    named = shared.submit("anyone with it", region="asia-east", model="our-own")
    pinned = shared.submit("here", region="asia-south", allow_cross_region=False)
    assert shared.dispatch.placement.place(parked).reason == (
        "No live worker serves llm in asia-east, nor in any other region."
    )

    shared.start_worker(**FAR)
    assert shared.ended(parked, 20).region == "europe-west"
    assert shared.status(named) is JobState.QUEUED
    assert shared.status(pinned) is JobState.QUEUED


def test_who_waits_for_a_job_follows_it_to_another_region(both, monkeypatch):
    monkeypatch.setattr(reroute, "GRACE_S", 0.5)
    row = both.submit("follow me", region="asia-east")
    both.start_worker(**FAR, wait=False)

    row = both.dispatch.wait(row, 40)

    assert (row.status, row.region, row.attempt, row.losses) == (JobState.COMPLETED, "europe-west", 2, 0)
    assert both.dispatch.statistics(None).by_type[JobType.LLM] == 0
