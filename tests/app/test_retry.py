"""Running a job again that did not complete."""

import pytest

from app.dispatch import Dispatch
from tasks.job import JobError, JobState
from tests.app.conftest import CHAT, RESULT

JOBS = "/api/v1/jobs"
ASKED = {**CHAT, "priority": 7, "region": "asia-east", "allow_cross_region": False, "timeout_seconds": 33}


def ended(client, worker, outcome: JobState) -> str:
    """The id of a job with this outcome."""
    job_id: str = client.post(JOBS, json=ASKED).json["job_id"]
    if outcome is JobState.CANCELLED:
        client.delete(f"{JOBS}/{job_id}")
        return job_id
    worker.begin(job_id)
    worker.finish(job_id, outcome, None if outcome is JobState.COMPLETED else JobError("engine_error", "It broke."))
    return job_id


@pytest.mark.parametrize("outcome", [JobState.FAILED, JobState.CANCELLED, JobState.TIMEOUT], ids=str)
def test_a_job_that_did_not_complete_runs_again_as_a_new_one_with_the_same_request(client, worker, outcome):
    old = ended(client, worker, outcome)

    answer = client.post(f"{JOBS}/{old}/retry")

    new = answer.json["job_id"]
    assert (answer.status_code, answer.headers["Location"]) == (202, f"{JOBS}/{new}")
    assert worker.begin(new)["messages"] == CHAT["params"]["messages"]
    worker.finish(new)
    view = client.get(f"{JOBS}/{new}").json
    assert {name: view[name] for name in ("priority", "region", "timeout_seconds", "result", "retry_of")} == {
        "priority": 7, "region": "asia-east", "timeout_seconds": 33.0, "result": RESULT, "retry_of": old,
    }  # fmt: skip
    assert client.get(f"{JOBS}/{old}").json["status"] == outcome


def test_a_retry_is_safe_to_repeat_with_an_idempotency_key(client, worker):
    old, key = ended(client, worker, JobState.FAILED), {"Idempotency-Key": "again"}

    one, two = (client.post(f"{JOBS}/{old}/retry", headers=key) for _ in range(2))

    assert one.json["job_id"] == two.json["job_id"]
    assert two.headers["Idempotent-Replayed"] == "true"


def test_a_job_that_lives_or_completed_is_not_run_again(client, worker):
    queued = client.post(JOBS, json=CHAT).json["job_id"]
    completed = ended(client, worker, JobState.COMPLETED)

    for job_id, state in ((queued, "queued"), (completed, "completed")):
        answer = client.post(f"{JOBS}/{job_id}/retry")
        assert (answer.status_code, answer.json["code"]) == (409, "job_not_retryable")
        assert answer.json["job_status"] == state


def test_a_job_whose_input_is_no_longer_kept_is_not_run_again(app, client, worker):
    old = ended(client, worker, JobState.FAILED)
    client.get(f"{JOBS}/{old}")
    dispatch: Dispatch = app.extensions["dispatch"]
    dispatch.rows.remains.prune([old])

    answer = client.post(f"{JOBS}/{old}/retry")

    assert (answer.status_code, answer.json["code"]) == (409, "input_pruned")


def test_an_admin_runs_an_owners_job_again_for_that_owner(client, worker, make_key):
    owner, admin, other = make_key("infer"), make_key("admin"), make_key("infer")
    old = client.post(JOBS, json=CHAT, headers=owner).json["job_id"]
    client.delete(f"{JOBS}/{old}", headers=owner)

    assert client.post(f"{JOBS}/{old}/retry", headers=other).status_code == 404
    new = client.post(f"{JOBS}/{old}/retry", headers=admin).json["job_id"]

    assert client.get(f"{JOBS}/{new}", headers=owner).json["retry_of"] == old
