"""The fleet as an admin sees it while workers die, freeze, are cut off, are stopped and are told to drain."""

import signal

import pytest

from app import create_app
from app.settings import Settings
from tasks.job import JobState
from tests.faults.proxy import Proxy
from tests.rig import READY_S


@pytest.fixture
def api(platform):
    """Asks the API about its workers."""
    app = create_app(Settings.from_environ(platform.environ))
    client = app.test_client()

    def ask(path="", method="GET"):
        answer = client.open(f"/api/v1/workers{path}", method=method)
        assert answer.status_code in (200, 202), answer.text
        return answer.json

    yield ask
    app.extensions["dispatch"].close()
    app.extensions["database"].dispose()


@pytest.fixture
def states(api):
    """The state of each worker, by name."""
    return lambda: {item["name"]: item["state"] for item in api()["items"]}


def test_a_worker_that_dies_freezes_or_is_cut_off_is_lost_and_comes_back_and_one_that_is_stopped_vanishes(
    platform, valkey, api, states
):
    with Proxy("127.0.0.1", valkey.port) as proxy:
        store = {"GPU_STORE_URL": f"redis://127.0.0.1:{proxy.port}/1"}
        names = ("killed", "frozen", "cut", "stopped")
        workers = {
            name: platform.start_worker(wait=False, GPU_NAME=name, **(store if name == "cut" else {})) for name in names
        }
        platform.until(lambda: states() == dict.fromkeys(names, "ready"), 2 * READY_S)

        workers["killed"].signal(signal.SIGKILL)
        workers["frozen"].signal(signal.SIGSTOP)
        proxy.black_hole()
        workers["stopped"].signal(signal.SIGTERM)
        lost = dict.fromkeys(("killed", "frozen", "cut"), "lost")
        platform.until(lambda: states() == lost, 20)
        platform.until(lambda: all(item["reliability_score"] < 0.8 for item in api()["items"]))

        workers["frozen"].signal(signal.SIGCONT)
        proxy.heal()
        again = platform.start_worker(GPU_NAME="killed")
        platform.until(lambda: states() == dict.fromkeys(lost, "ready"), 20)

        assert api("/killed")["worker_id"] == again.id
        assert all(item["reliability_score"] == round(9.5 / 12, 4) for item in api()["items"])
        assert platform.ended(platform.submit("as before")).status is JobState.COMPLETED


def test_a_drained_worker_takes_nothing_until_it_is_told_to_resume_and_not_after_a_restart_either(
    platform, api, states
):
    drained, other = (platform.start_worker(wait=False, GPU_NAME=name) for name in ("drained", "other"))
    platform.until(lambda: states() == {"drained": "ready", "other": "ready"}, 2 * READY_S)
    running = [platform.submit("sleep 4") for _ in range(8)]
    platform.until(lambda: all(platform.status(row) is JobState.RUNNING for row in running))
    mine = [row for row in running if platform.row(row).worker_id == drained.id]
    assert mine

    api("/drained/drain", "POST")
    platform.until(lambda: states()["drained"] == "draining")
    taken = {platform.ended(platform.submit("now")).worker_id for _ in range(20)}

    assert taken == {other.id}
    assert {platform.ended(row, 15).status for row in mine} == {JobState.COMPLETED}
    assert {platform.row(row).worker_id for row in mine} == {drained.id}

    for worker in (drained, other):
        worker.signal(signal.SIGTERM)
        worker.process.wait(15)
    waiting = platform.submit("who takes this")
    again = platform.start_worker(GPU_NAME="drained")
    platform.until(lambda: states() == {"drained": "draining"})
    assert platform.status(waiting) is JobState.QUEUED

    api("/drained/resume", "POST")

    assert platform.ended(waiting).worker_id == again.id
    assert states() == {"drained": "ready"}
