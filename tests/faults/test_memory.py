"""A store whose memory is full: what was accepted is held, and nothing is evicted or lost."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import redis

from app.dispatch import Unavailable
from tasks.job import JobState
from tests.rig import BUSY_S

#: Beyond what the server takes by itself, which is more after other tests.
ROOM = 3 * 1024**2
#: Enough jobs of this size to fill it twice.
WORDS = "word " * 10_000
JOBS = 100


@pytest.fixture
def small(valkey):
    """The server with little memory, until the test ends."""
    limit = valkey.client().info("memory")["used_memory"] + ROOM
    valkey.client().config_set("maxmemory", limit, "maxmemory-policy", "noeviction")
    yield valkey
    valkey.client().config_set("maxmemory", 0)


def test_jobs_that_do_not_fit_are_held_and_all_run_as_room_appears(platform, small):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    first = platform.submit("sleep 60")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)

    rows = [platform.submit(f"{number} {WORDS}") for number in range(JOBS)]
    assert platform.dispatch.links["asia-east"].away() == "The memory of the store of asia-east is full."
    with pytest.raises(Unavailable, match="is full"):
        platform.submit("now or never", must_send=True)

    platform.dispatch.cancel(first)
    ended = [platform.ended(row, 60) for row in rows]
    assert {(row.status, row.attempt) for row in ended} == {(JobState.COMPLETED, 1)}
    assert small.client().info("stats")["evicted_keys"] == 0
    assert worker.process.poll() is None


def test_a_server_that_others_filled_to_the_brim_costs_no_job(platform, small):
    worker = platform.start_worker()
    platform.ended(platform.submit("warm"))
    filler = small.client(5)
    with suppress(redis.OutOfMemoryError):
        while filler.append("filler", "x" * 4096):
            pass

    rows = [platform.submit(f"number {number}") for number in range(20)]
    with pytest.raises(Unavailable):
        platform.submit("now or never", must_send=True)
    assert {platform.status(row) for row in rows} == {JobState.QUEUED}

    filler.delete("filler")
    ended = [platform.ended(row, 30) for row in rows]
    assert {row.status for row in ended} == {JobState.COMPLETED}
    assert worker.process.poll() is None


def test_every_submit_to_a_frozen_store_is_answered_in_time_and_what_is_held_comes_out(platform, valkey):
    valkey.stop()

    def submit(number: int):
        began = time.monotonic()
        row = platform.submit(f"number {number}")
        return row, time.monotonic() - began

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(submit, range(40)))
    assert max(took for _, took in answers) < 2 + BUSY_S

    valkey.cont()
    platform.start_worker()
    ended = [platform.ended(row, 30) for row, _ in answers]
    assert {(row.status, row.attempt) for row in ended} == {(JobState.COMPLETED, 1)}
