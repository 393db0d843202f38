"""Large params and results: where they lie, and what becomes of a job when that store is away."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.blobs import INLINE_CHARS, Blobs
from tasks.job import Job

JOBS = "/api/v1/jobs"
LONG = "x" * (INLINE_CHARS + 1)


@pytest.fixture
def folder(settings: Any) -> Path:
    """Where the app keeps large texts."""
    return Path(settings.blobs_url)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def ask(content: str) -> dict[str, Any]:
    return {"type": "llm", "params": {"messages": [{"role": "user", "content": content}]}}


def test_a_text_comes_back_as_it_was_whether_it_stayed_or_not_and_goes_when_it_is_dropped(tmp_path):
    blobs = Blobs(str(tmp_path))
    short, long = blobs.keep("short"), blobs.keep("长" * (INLINE_CHARS + 1))

    assert short == "short"
    assert len(long) < 64
    assert (blobs.read(short), blobs.read(long)) == ("short", "长" * (INLINE_CHARS + 1))
    blobs.drop(long)
    assert files(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        blobs.read(long)


def test_other_file_systems_are_reached_by_their_url():
    blobs = Blobs("memory://jobs")

    assert blobs.read(blobs.keep(LONG)) == LONG


def test_large_params_reach_the_worker_and_a_large_result_the_client_and_neither_is_in_the_row(
    client, worker, folder, app
):
    job_id = client.post(JOBS, json=ask(LONG)).json["job_id"]
    params = worker.begin(job_id)
    result = {"response": LONG, "finish_reason": "stop", "model": "echo", "usage": {}}
    worker.ledger.finish(worker.envelope(job_id, result=result), queue="asia-east.llm")

    shown = client.get(f"{JOBS}/{job_id}").json

    assert params["messages"][0]["content"] == LONG
    assert shown["result"] == result
    row = app.extensions["dispatch"].rows.get(job_id)
    assert max(len(row.params), len(row.result)) < 64
    assert sorted(json.loads(path.read_text()).keys() == result.keys() for path in files(folder)) == [False, True]


def test_a_job_that_was_not_made_leaves_no_blob(client, folder):
    key = {"Idempotency-Key": "k"}
    assert client.post(JOBS, json=ask(LONG), headers=key).status_code == 202

    again = client.post(JOBS, json=ask(LONG), headers=key)
    conflict = client.post(JOBS, json=ask(LONG + "y"), headers=key)

    assert (again.headers["Idempotent-Replayed"], conflict.status_code) == ("true", 422)
    assert len(files(folder)) == 1


def test_a_store_that_takes_nothing_refuses_the_job_at_once(client, folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("no folder")

    refused = client.post(JOBS, json=ask(LONG))

    assert (refused.status_code, refused.json["code"]) == (503, "blobs_unavailable")
    assert client.post(JOBS, json=ask("short")).status_code == 202


def test_a_result_that_cannot_be_read_is_said_and_the_job_stays_completed(client, worker, folder):
    job_id = client.post(JOBS, json=ask("hi")).json["job_id"]
    worker.begin(job_id)
    result = {"response": LONG}
    worker.ledger.finish(worker.envelope(job_id, result=result), queue="asia-east.llm")
    assert client.get(f"{JOBS}/{job_id}").status_code == 200
    shutil.rmtree(folder)

    lost = client.get(f"{JOBS}/{job_id}")

    assert (lost.status_code, lost.json["code"]) == (503, "blobs_unavailable")
    assert client.get(JOBS).json["items"][0]["status"] == "completed"


def test_a_job_whose_params_are_gone_ends_instead_of_waiting_for_ever(client, folder, app, worker):
    job_id = client.post(JOBS, json=ask(LONG)).json["job_id"]
    shutil.rmtree(folder)
    dispatch = app.extensions["dispatch"]

    dispatch.send(dispatch.rows.get(job_id))

    shown = client.get(f"{JOBS}/{job_id}").json
    assert (shown["status"], shown["error"]["code"]) == ("failed", "params_lost")
    assert worker.ledger.begin(Job(job_id, "llm", 1), worker_id="w", token="t").answer != "RUN"
