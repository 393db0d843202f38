"""Following a job: what its client hears while it waits and runs, and at its end, whatever happens between."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from app.limits import Kind, kind_of
from app.streams import PING_S, Event, Streams, encode, sse
from engines.catalogue import JobType
from engines.contract import Progress, Text
from tasks.fleet import Card
from tasks.job import Job
from tasks.records import Said
from tasks.station import Station
from tests.app.conftest import CHAT, REGION, listening
from tests.rig import free_port, until

JOBS = "/api/v1/jobs"


class Held:
    """An engine that says a word each time that a test lets it, and can be stopped meanwhile."""

    slots = 4

    def __init__(self, *words: str) -> None:
        self.words = words
        self.go = threading.Semaphore(0)

    def run(self, params, report):
        for number, word in enumerate(self.words):
            report(Text(word))
            report(Progress(number + 1, len(self.words), "token"))
            while not self.go.acquire(timeout=0.05):
                report(Progress(number + 1, len(self.words), "token"))
        return {"response": "".join(self.words)}

    def close(self):
        pass


@pytest.fixture
def app(make_app, settings):
    """The API on a port of its own, which looks at its streams all the time."""
    made = make_app(replace(settings, port=free_port()))
    made.extensions["streams"] = Streams(made.extensions["dispatch"], look_s=0.1)
    return made


@pytest.fixture
def url(app) -> Iterator[str]:
    """Where waitress serves it, as `python -m app.serve` does."""
    with listening(app) as url:
        yield f"{url}{JOBS}"


@pytest.fixture
def engine():
    return Held("one ", "two ", "three")


@pytest.fixture
def station(worker, engine):
    """A worker with that engine, which takes what a test gives it."""
    card = Card(worker.id, worker.id, REGION, "h", "cpu", {JobType.LLM: "m"}, {JobType.LLM: 4}, time.time())
    station = Station(card, {JobType.LLM: engine}, worker.ledger, leave=lambda code: None)
    station.open()
    yield station
    station.close()


def run(station, job_id):
    threading.Thread(target=station.execute, args=[Job(job_id, JobType.LLM, 1)], daemon=True).start()


def events_of(answer):
    """Id, name and data of each event, as they arrive."""
    found = {}
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        if not line and "data" in found:
            yield Event(found["id"], found["event"], json.loads(found["data"]))
            found = {}
        elif line and not line.startswith(":"):
            name, _, text = line.partition(": ")
            found[name] = text


def follow(url, job_id, after=None):
    answer = requests.get(
        f"{url}/{job_id}/events", headers={"Last-Event-ID": after} if after else {}, stream=True, timeout=8
    )
    assert answer.status_code == 200
    return answer, events_of(answer)


def words(events):
    return [event.data["delta"] for event in events if event.name == "token"]


def until_event(events, name):
    for event in events:
        if event.name == name:
            return event
    raise AssertionError(f"no {name}")


def test_the_first_word_arrives_while_the_next_is_not_yet_said(url, worker, station, engine):
    answer = requests.post(f"{url}/stream", json=CHAT, stream=True, timeout=15)
    events = events_of(answer)
    first = next(events)
    job_id = answer.headers["X-Job-Id"]
    run(station, worker.next_job())

    assert (first.name, first.data["status"], first.data["queue_position"]) == ("status", "queued", 1)
    assert until_event(events, "token").data == {"delta": "one ", "choice": 0, "attempt": 1}
    # The engine waits for the test: nothing that comes now can have been said before.
    for word in ("two ", "three"):
        engine.go.release()
        assert until_event(events, "token").data["delta"] == word
    engine.go.release()
    last = list(events)[-2:]

    assert [event.name for event in last] == ["status", "result"]
    assert last[0].data == {"status": "completed", "attempt": 1}
    shown = requests.get(f"{url}/{job_id}", timeout=5).json()
    assert last[1].id == "end"
    assert last[1].data == shown
    assert shown["result"] == {"response": "one two three"}
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert (answer.headers["X-Accel-Buffering"], answer.headers["Cache-Control"]) == ("no", "no-cache")


def test_whoever_comes_late_or_again_hears_every_word_once(url, client, worker, station, engine):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    run(station, worker.next_job())
    until(lambda: client.get(f"{JOBS}/{job_id}").json["progress"])
    answer, events = follow(url, job_id)
    heard = [until_event(events, "status"), until_event(events, "token")]
    answer.close()
    engine.go.release()
    answer, events = follow(url, job_id, heard[-1].id)
    heard.append(until_event(events, "token"))
    answer.close()
    engine.go.release()
    engine.go.release()
    until(lambda: client.get(f"{JOBS}/{job_id}").json["status"] == "completed")
    # What was said before the end is kept a little longer than the job runs.
    rest = list(follow(url, job_id, heard[-1].id)[1])

    assert words([*heard, *rest]) == ["one ", "two ", "three"]
    assert [event.data["status"] for event in [*heard, *rest] if event.name == "status"] == ["running", "completed"]
    assert rest[-1].name == "result"


def test_a_client_that_lacks_a_part_of_an_entry_gets_just_that(app, client, worker):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    worker.begin(worker.next_job())
    said = '{"text":[[0,"a"],[1,"b"],[2,"c"]],"progress":[3,9,"token"]}'
    worker.ledger.tell(worker.id, [Said(job_id, 1, None, 1, said), Said(job_id, 1, None, 2, '{"text":[[0,"d"]]}')])
    dispatch, streams = app.extensions["dispatch"], app.extensions["streams"]
    row = dispatch.look(job_id)

    def take(count, after=None):
        found = (event for event in streams.follow(row, after) if event is not None)
        return [next(found) for _ in range(count)]

    whole = take(6)
    assert [event.data.get("delta") for event in whole] == [None, "a", "b", "c", None, "d"]
    assert (whole[0].data["status"], whole[4].data["percent"]) == ("running", 33.3)
    for count in range(1, 6):
        assert take(6 - count, whole[count - 1].id) == whole[count:], count
    assert take(1, "of another server") == whole[:1]


def test_a_queued_job_tells_each_change_of_its_place_and_its_end(url, client, worker):
    worker.show()
    before, job_id = (client.post(JOBS, json=CHAT).json["job_id"] for _ in range(2))
    _, events = follow(url, job_id)
    assert until_event(events, "status").data["queue_position"] == 2

    client.delete(f"{JOBS}/{before}")
    assert until_event(events, "status").data["queue_position"] == 1
    client.delete(f"{JOBS}/{job_id}")
    status, error = events

    assert status.data == {"status": "cancelled", "attempt": 1}
    assert (error.name, error.data["job_id"], error.data["status"]) == ("error", job_id, "cancelled")


def test_a_running_job_that_is_cancelled_ends_its_stream(url, client, worker):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    worker.begin(worker.next_job())
    _, events = follow(url, job_id)
    # Nothing has been said of it yet: the row knows that it runs.
    assert next(events).data == {"status": "running", "attempt": 1}

    client.delete(f"{JOBS}/{job_id}")

    assert [event.name for event in events] == ["status", "error"]


def test_an_ended_job_is_told_at_once_and_nobody_is_told_twice(url, client, worker):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    worker.begin(worker.next_job())
    worker.finish(job_id)
    told = list(follow(url, job_id)[1])

    assert [(event.name, event.data["status"]) for event in told] == [("status", "completed"), ("result", "completed")]
    again = requests.get(f"{url}/{job_id}/events", headers={"Last-Event-ID": told[-1].id}, timeout=5)
    assert (again.status_code, again.content) == (204, b"")


def test_a_lost_worker_shows_as_a_higher_attempt_whose_words_begin_anew(app, url, client, worker):
    dispatch = app.extensions["dispatch"]
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    worker.begin(worker.next_job())
    worker.ledger.tell(worker.id, [Said(job_id, 1, None, 1, '{"text":[[0,"lost"]]}')])
    _, events = follow(url, job_id)
    assert until_event(events, "token").data["delta"] == "lost"
    row = dispatch.rows.next_attempt(job_id, attempt=1, lost=True)
    dispatch.send(row)
    assert next(events).data == {"status": "running", "attempt": 2}

    worker.ledger.begin(Job(job_id, JobType.LLM, 2), worker_id="worker-2", token="t")
    worker.ledger.tell("worker-2", [Said(job_id, 2, None, 1, '{"text":[[0,"found"]]}')])
    worker.ledger.tell(worker.id, [Said(job_id, 1, None, 2, '{"text":[[0,"zombie"]]}')])

    assert next(events).data == {"delta": "found", "choice": 0, "attempt": 2}
    # Whoever comes now hears nothing of the first.
    assert [event.data.get("delta") for _, event in zip(range(2), follow(url, job_id)[1], strict=False)] == [
        None,
        "found",
    ]


def test_a_store_that_is_away_hangs_no_stream(app, url, client, valkey):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    valkey.stop()
    _, events = follow(url, job_id)

    assert "cannot be reached" in next(events).data["queued_reason"]
    app.extensions["dispatch"].rows.cancel(job_id)
    assert [event.name for event in events] == ["status", "error"]


@pytest.mark.parametrize("cancels", [True, False])
def test_a_client_that_hangs_up_gives_its_turn_back_and_cancels_if_it_said_so(url, client, app, cancels):
    streams = [
        requests.post(f"{url}/stream?cancel_on_disconnect={str(cancels).lower()}", json=CHAT, stream=True, timeout=5)
        for _ in range(app.extensions["settings"].sync_waiters)
    ]
    refused = requests.post(f"{url}/stream", json=CHAT, timeout=5)
    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_waiting")

    for answer in streams:
        answer.close()
    turns = app.extensions["sync_turns"]
    until(lambda: turns._value == len(streams))

    status = "cancelled" if cancels else "queued"
    ids = [answer.headers["X-Job-Id"] for answer in streams]
    assert [client.get(f"{JOBS}/{job_id}").json["status"] for job_id in ids] == [status] * len(ids)


def test_the_same_idempotency_key_follows_the_same_job(client, worker):
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    first = client.post(f"{JOBS}/stream", json=CHAT, headers=headers)
    again = client.post(f"{JOBS}/stream", json=CHAT, headers=headers)
    job_id = first.headers["X-Job-Id"]
    worker.begin(worker.next_job())
    worker.finish(job_id)

    assert again.headers["X-Job-Id"] == job_id
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    # Neither has read anything until now.
    assert first.data.endswith(again.data[-100:])
    assert client.get(f"{JOBS}/stats/queue").json["total_queued"] == 0


def test_a_silent_stream_is_pinged_and_one_that_talks_is_not(app):
    event = Event("1", "status", {"status": "queued"})
    with app.test_request_context():
        silent = sse([None, event, None], ping_s=0).get_data(as_text=True)
        lively = sse([None, event, None, "[DONE]"], ping_s=PING_S).get_data(as_text=True)

    assert silent == f": ping\n\n{encode(event)}: ping\n\n"
    assert lively == 'id: 1\nevent: status\ndata: {"status":"queued"}\n\ndata: [DONE]\n\n'


def test_a_server_that_stops_ends_its_streams_with_a_word_when_to_come_again(database_url, valkey, tmp_path: Path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "app.serve"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DATABASE_URL": database_url,
            "PORT": str(port),
            "GPU_BROKER_URL": f"{valkey.url}/0",
            "GPU_STORE_URL": f"{valkey.url}/1",
            "API_THREADS": "20",
        },
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    url = f"http://127.0.0.1:{port}"

    def up():
        try:
            return requests.get(f"{url}/health", timeout=1).ok
        except requests.ConnectionError:
            return False

    try:
        until(up, 60)
        answer = requests.post(f"{url}{JOBS}/stream?cancel_on_disconnect=true", json=CHAT, stream=True, timeout=10)
        lines = answer.iter_lines(chunk_size=1, decode_unicode=True)
        assert next(lines).startswith("id: queued-1")
        process.send_signal(signal.SIGTERM)
        # To the end of the last chunk, or requests would say that it broke off.
        rest = list(lines)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.communicate()

    assert "retry: 1000" in rest
    assert not any(line.startswith("event: error") for line in rest)


def test_a_stream_is_counted_as_a_request_that_waits():
    assert kind_of("jobs.stream", "POST") is Kind.SYNC
    assert kind_of("jobs.events", "GET") is Kind.READ
