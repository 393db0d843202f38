"""A store that is restarted with its files, but without the last of what was written."""

import pytest

from app.control import Reconciler
from tests.app.conftest import CHAT
from tests.rig import until

JOBS = "/api/v1/jobs"


@pytest.mark.parametrize("begun", [False, True], ids=["queued", "running"])
def test_jobs_that_a_restarted_store_has_lost_are_sent_again(client, app, valkey, worker, begun):
    kept, lost = (client.post(JOBS, json=CHAT).json["job_id"] for _ in range(2))
    reconciler = Reconciler(app.extensions["dispatch"])
    reconciler.tick()
    if begun:
        worker.begin(lost)
        reconciler.tick()
    epoch, record = worker.ledger.epoch(), worker.store.hgetall(f"job:{kept}")

    valkey.kill()
    valkey.start()
    worker.store.mset({"epoch": epoch})
    worker.store.hset(f"job:{kept}", mapping=record)

    def waits() -> bool:
        reconciler.tick()
        return worker.waiting() == [lost]

    until(waits)
    shown = client.get(f"{JOBS}/{lost}").json
    assert (shown["status"], shown["attempt"]) == (("running", 2) if begun else ("queued", 1))
    assert client.get(f"{JOBS}/{kept}").json["attempt"] == 1
