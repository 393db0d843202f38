"""What the console asks beside the API: its files, who asks, what is now, what was the last hour."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import update

from app.console.feed import Feed
from app.console.history import MINUTE_S, SAMPLE, History
from app.job_table import JobRow
from app.tables import jobs, now
from tests.app.conftest import CHAT

JOBS = "/api/v1/jobs"
CONSOLE = "/api/v1/console"


def first(client: FlaskClient, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The feed's snapshot."""
    answer = client.get(f"{CONSOLE}/events", headers=headers)
    event = next(iter(answer.response))
    answer.close()
    text = event.decode() if isinstance(event, bytes) else event
    assert "event: snapshot" in text
    return json.loads(re.search("^data: (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]


def test_the_page_allows_nothing_inline_and_nothing_from_elsewhere(client):
    page = client.get("/console")

    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert not re.search(r"<script(?![^>]*src=)|style=| on\w+=|https?://", page.text)
    assert client.get("/console/").location == "/console"


def test_a_file_is_packed_and_sent_again_only_when_it_changed(client):
    packed = client.get("/console/main.js", headers={"Accept-Encoding": "gzip"})
    plain = client.get("/console/main.js")

    assert (packed.headers["Content-Encoding"], plain.headers.get("Content-Encoding")) == ("gzip", None)
    assert len(packed.data) < len(plain.data) / 2
    assert plain.mimetype == "text/javascript"
    again = client.get("/console/main.js", headers={"Accept-Encoding": "gzip", "If-None-Match": packed.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "../feed.py", "..%2ffeed.py", "words", "%00"])
def test_nothing_but_the_consoles_files_is_served(client, name):
    assert client.get(f"/console/{name}").status_code == 404


def test_the_feed_shows_queues_and_workers_and_workers_themselves_to_admins_alone(client, worker, make_key):
    worker.show()
    client.post(JOBS, json=CHAT)
    admin, reader = make_key("admin"), make_key("read")

    shown, hidden = first(client, admin), first(client, reader)

    assert shown["totals"] | {"oldest_at": 0} == {
        "queued": 1, "running": 0, "workers": 1, "slots": 2, "used": 0, "oldest_at": 0,
    }  # fmt: skip
    (queue,) = shown["queues"]
    assert (queue["region"], queue["type"], queue["queued"]) == ("asia-east", "llm", 1)
    assert queue["oldest_at"] == pytest.approx(shown["at"], abs=10)
    assert [item["name"] for item in shown["workers"]["items"]] == [worker.id]
    assert (hidden["workers"]["by_state"], hidden["workers"]["items"]) == ({"ready": 1}, None)
    assert hidden["totals"] == shown["totals"]


def test_listeners_share_one_picture_a_second_and_are_sent_what_changed(app, client, monkeypatch):
    feed: Feed = app.extensions["console_feed"]
    drawn: list[int] = []
    draw = feed._draw
    monkeypatch.setattr(feed, "_draw", lambda: drawn.append(1) or draw())
    stopping = threading.Event()
    listeners = [feed.follow(stopping, everything=True) for _ in range(20)]

    snapshots = [next(listener) for listener in listeners]
    client.post(JOBS, json=CHAT)
    change = next(event for event in listeners[0] if event is not None)

    assert {event.name for event in snapshots if event} == {"snapshot"}
    assert change.name == "change"
    assert {"totals", "regions", "queues", "pulse"} <= change.data.keys()
    assert "workers" not in change.data
    assert len(drawn) < 5
    stopping.set()
    assert list(listeners[0]) == []


@pytest.fixture
def ended(app, client, worker) -> Callable[..., JobRow]:
    """Makes a job that was accepted so many seconds ago, begun after 1 s, and completed after 3."""

    def end(ago_s: float, headers: dict[str, str] | None = None) -> None:
        job_id = client.post(JOBS, json=CHAT, headers=headers).json["job_id"]
        worker.begin(job_id)
        worker.finish(job_id)
        client.get(f"{JOBS}/{job_id}", headers=headers)
        times = {"created_at": now() - ago_s, "started_at": now() - ago_s + 1, "completed_at": now() - ago_s + 3}
        with app.extensions["database"].connect() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**times))

    return end


def test_the_last_hour_is_told_by_minute_and_others_jobs_to_admins_alone(client, ended, make_key):
    admin, one, other = make_key("admin"), make_key("infer"), make_key("infer")
    for ago_s in (130, 130, 7200):
        ended(ago_s, one)
    ended(600, other)

    everybody = client.get(f"{CONSOLE}/history", headers=admin).json
    own = client.get(f"{CONSOLE}/history", headers=one).json

    assert (everybody["own"], own["own"]) == (False, True)
    assert (len(everybody["minutes"]), len(own["minutes"])) == (60, 60)
    busy = [minute for minute in everybody["minutes"] if minute["ended"]]
    assert [minute["completed"] for minute in busy] == [1, 2]
    assert [busy[1][f"{what}_{rank}_s"] for what in ("whole", "queue") for rank in ("p50", "p95")] == pytest.approx(
        [3, 3, 1, 1], abs=0.1
    )
    assert [minute for minute in own["minutes"] if minute["ended"]] == [busy[1]]


def test_a_minute_of_many_jobs_is_counted_whole_and_read_in_part(app, ended):
    ended(100)
    copies = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {most}) "
    columns = [column.name for column in jobs.c if column.name != "id"]
    text = (
        f"INSERT INTO jobs (id, {', '.join(columns)}) {copies} SELECT 'copy-' || i, {', '.join(columns)} FROM jobs, n"
    )
    with app.extensions["database"].connect() as connection:
        connection.exec_driver_sql(text.format(most=2 * SAMPLE))
    history: History = app.extensions["console_history"]

    (minute,) = [minute for minute in history.everybody() if minute["ended"]]

    assert minute["ended"] == 2 * SAMPLE + 1
    assert minute["completed"] == SAMPLE
    assert minute["at"] % MINUTE_S == 0
    assert minute in history.everybody()


def test_the_session_says_what_the_caller_may_do(client, make_key):
    assert client.get(f"{CONSOLE}/session").json["scopes"] == ["admin", "infer", "read", "worker"]
    key = make_key("read")
    told = client.get(f"{CONSOLE}/session", headers=key).json
    assert (told["key"], told["scopes"], told["hosts"]) == (key["X-API-Key"][4:12], ["read"], False)
