"""Two regions, each with a broker and a store of its own."""

import json
import signal
from collections.abc import Iterator

import pytest

from tasks.job import JobState
from tests.conftest import Valkey
from tests.rig import Platform, free_port


@pytest.fixture
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The other region's server."""
    server = Valkey(free_port(), tmp_path_factory.mktemp("far"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def both(valkey: Valkey, far: Valkey, make_platform) -> Platform:
    """A platform of two regions, asia-east at home and europe-west far away."""
    urls = {"asia-east": valkey.url, "europe-west": far.url}
    regions = {name: {"broker": f"{url}/0", "store": f"{url}/1"} for name, url in urls.items()}
    return make_platform(REGIONS=json.dumps(regions))


def test_a_job_that_may_not_leave_its_region_leaves_no_trace_in_another(both: Platform, valkey: Valkey):
    worker = both.start_worker(queues="europe-west.llm", GPU_REGION="europe-west")

    row = both.ended(both.submit("stay here", region="europe-west", allow_cross_region=False), 15)

    assert (row.status, row.worker_id, row.region) == (JobState.COMPLETED, worker.id, "europe-west")
    for database in (0, 1):
        assert not [key for key in valkey.client(database).scan_iter() if row.id in key or "europe" in key]


def test_a_job_whose_region_has_no_worker_goes_to_the_nearest_that_has(both: Platform):
    worker = both.start_worker(queues="europe-west.llm", GPU_REGION="europe-west")
    both.until(lambda: both.dispatch.links["europe-west"].cards(), 5)

    row = both.ended(both.submit("anywhere", region="asia-east"), 15)

    assert (row.worker_id, row.region) == (worker.id, "europe-west")


def test_a_region_that_is_away_hinders_no_other(both: Platform, far: Valkey):
    worker = both.start_worker(queues="asia-east.llm", GPU_REGION="asia-east")
    far.stop()

    held = both.submit("held", region="europe-west", allow_cross_region=False)
    row = both.ended(both.submit("here"), 15)
    far.process.send_signal(signal.SIGCONT)
    both.until(lambda: both.dispatch.place(both.row(held)).position == 1, 15)

    assert row.worker_id == worker.id
    assert both.status(held) is JobState.QUEUED
