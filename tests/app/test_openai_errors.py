"""OpenAI's routes where things go wrong: every refusal in OpenAI's shape, and a stream whose job begins anew."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask

from app.auth import public
from app.openai import answers
from app.openai.audio import srt, vtt
from app.openai.chunks import Said
from app.request import Request
from app.streams import Event
from engines.catalogue import JobType
from engines.schemas import load_params
from tasks.fleet import Card, WorkerState
from tasks.job import JobError, JobState
from tests.app.conftest import REGION, HandWorker
from tests.rig import until

CHAT = "/v1/chat/completions"
HELLO = {"model": "llm", "messages": [{"role": "user", "content": "hi"}]}


def refused(answer: Any, status: int, code: str, param: str | None = None) -> str:
    """The message of a refusal that is what it should be."""
    assert (answer.status_code, answer.content_type) == (status, "application/json"), answer.text
    error = answer.json["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["X-Request-ID"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
        ("frequency_penalty", 0.5, "frequency_penalty"),
        ("temperature", "hot", "temperature"),
        ("n", 0, "n"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("messages", [], "messages"),
        ("messages", [{"role": "tool", "content": "x"}], "messages.0.role"),
        ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0.content"),
        ("messages", [{"role": "user", "content": "\ud800"}], "messages.0.content"),
        ("mesages", [], "mesages"),
        ("\ud800", 1, "\ud800"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(client, field, value, param):
    # ASCII: the field or the value may be what UTF-8 cannot carry.
    body = json.dumps({**HELLO, field: value})

    refused(client.post(CHAT, data=body, content_type="application/json"), 400, "validation_failed", param)


def test_what_is_harmless_is_ignored(client, worker):
    worker.show()
    worker.answer_next()
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": True, "tools": [], "presence_penalty": 0, "stop": None}

    assert client.post(CHAT, json={**HELLO, **harmless}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a", "echo": True}, "echo"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": ["a", "b"], "stream": True}, "prompt"),
        ("completions", {"prompt": [1, 2]}, "prompt"),
        ("embeddings", {"input": [[1, 2]]}, "input"),
        ("embeddings", {"input": "a", "dimensions": 8}, "dimensions"),
        ("images/generations", {"prompt": "a", "response_format": "url"}, "response_format"),
        ("images/generations", {"prompt": "a", "size": "63x63"}, "size"),
        ("audio/transcriptions", {}, "file"),
    ],
)
def test_the_other_routes_name_the_field_too(client, path, body, param):
    asked = {"data": {"model": "echo"}} if path.startswith("audio") else {"json": {"model": "echo", **body}}

    refused(client.post(f"/v1/{path}", **asked), 400, "validation_failed", param)


def test_a_body_or_a_header_that_cannot_be_read(client):
    refused(client.post(CHAT, data="{", content_type="application/json"), 400, "malformed_body")
    refused(client.post(CHAT, json=HELLO, headers={"X-Priority": "10"}), 400, "validation_failed", "X-Priority")
    refused(client.post(CHAT, json=HELLO, headers={"X-Region": "moon"}), 400, "validation_failed", "X-Region")
    refused(client.get("/v1/nowhere"), 404, "not_found")
    refused(client.get(CHAT), 405, "method_not_allowed")


def test_a_key_that_is_missing_wrong_or_not_for_this(client, make_key):
    make_key("infer")

    assert "Bearer" in refused(client.post(CHAT, json=HELLO), 401, "invalid_api_key")
    refused(client.post(CHAT, json=HELLO, headers={"Authorization": "Bearer no"}), 401, "invalid_api_key")
    refused(client.post(CHAT, json=HELLO, headers=make_key("read")), 403, "scope_missing")


def test_limits_and_sizes(make_app, settings, worker):
    def key_of(app: Flask) -> dict[str, str]:
        from app.keys import Scope

        return {"Authorization": f"Bearer {app.extensions['keys'].create('test', [Scope.INFER])}"}

    worker.show()
    few = make_app(replace(settings, rate_sync=1, max_body_bytes=2000))
    headers = key_of(few)
    answers_ = [few.test_client().post(CHAT, json={}, headers=headers) for _ in range(3)]
    assert refused(answers_[-1], 429, "rate_limit_exceeded")
    assert int(answers_[-1].headers["Retry-After"]) >= 1
    assert answers_[-1].headers["x-ratelimit-remaining-requests"] == "0"

    full = make_app(replace(settings, max_queued_per_key=1, max_body_bytes=2000))
    headers = key_of(full)
    asked = full.test_client()
    job = {"type": "llm", "params": {"messages": HELLO["messages"]}}
    assert asked.post("/api/v1/jobs", json=job, headers=headers).status_code == 202
    refused(asked.post(CHAT, json=HELLO, headers=headers), 429, "rate_limit_exceeded")
    refused(asked.post(CHAT, json={**HELLO, "user": "x" * 3000}, headers=headers), 413, "body_too_large")


def test_a_model_that_nobody_knows_serves_or_has_loaded_yet(client, worker, monkeypatch):
    refused(client.post(CHAT, json={**HELLO, "model": "gpt-4o"}), 404, "model_not_found", "model")
    nobody = client.post(CHAT, json=HELLO)
    refused(nobody, 503, "no_worker")
    assert int(nobody.headers["Retry-After"]) >= 1

    # So long would a client wait for a model; the worker does not get ready within the test.
    monkeypatch.setattr("app.openai.calls.LOADING_S", 0.0)
    card = Card(worker.id, "gpu-7", REGION, "host", "cpu", {JobType.LLM: "echo"}, {JobType.LLM: 2}, 1.0)
    worker.ledger.presence.beat(worker.id, replace(card, state=WorkerState.LOADING).encode(), [])
    asked = {**HELLO, "model": "echo"}
    # What the API knows of workers is up to a second old.
    until(lambda: client.post(CHAT, json=asked).json["error"]["code"] != "no_worker")
    loading = client.post(CHAT, json=asked)

    refused(loading, 503, "model_loading")
    assert loading.json["loading"] == {"model": "echo", "state": "loading", "node": "gpu-7"}
    assert int(loading.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("outcome", "error", "status", "code"),
    [
        (JobState.FAILED, JobError("engine_error", "It broke."), 500, "engine_error"),
        (JobState.FAILED, JobError("invalid_input", "Too long for the model."), 400, "invalid_input"),
        (JobState.TIMEOUT, JobError("run_timeout", "Too slow."), 504, "run_timeout"),
    ],
    ids=["failed", "invalid", "timeout"],
)
def test_a_job_that_ends_badly_is_told_once_and_not_sent_again(client, worker, outcome, error, status, code):
    worker.show()
    worker.answer_next(outcome, error)

    answer = client.post(CHAT, json=HELLO)

    assert refused(answer, status, code) == error.message
    assert answer.headers["x-should-retry"] == "false"
    assert client.get(f"/api/v1/jobs/{answer.headers['X-Job-Id']}").json["status"] == outcome


def test_a_server_that_breaks_answers_in_openais_shape(app, client):
    @app.get("/v1/breaks")
    @public
    def breaks() -> str:
        raise RuntimeError("inner secret")

    assert "secret" not in refused(client.get("/v1/breaks"), 500, "internal_error")
    with app.extensions["database"].connect() as connection:
        connection.exec_driver_sql("DROP TABLE api_keys")
    refused(client.get("/v1/models"), 503, "database_unavailable")


def test_an_idempotency_key_gives_the_same_job_again(client, worker):
    worker.show()
    worker.answer_next()
    headers = {"Idempotency-Key": "one"}

    first, second = (client.post(CHAT, json=HELLO, headers=headers) for _ in range(2))

    assert first.headers["X-Job-Id"] == second.headers["X-Job-Id"]
    assert first.json == second.json
    other = {**HELLO, "messages": [{"role": "user", "content": "other"}]}
    refused(client.post(CHAT, json=other, headers=headers), 400, "idempotency_key_reused")


@pytest.fixture
def follow(app: Flask, worker: HandWorker) -> Callable[..., list[Any]]:
    """Makes the chunks that a client is sent of a job that says so; tokens as (attempt, delta)."""
    worker.show()
    params = load_params(JobType.LLM, {"messages": HELLO["messages"]})
    wanted = Request(JobType.LLM, None, None, params, 0, None, True, 60, None)

    def chunks(tokens: list[tuple[int, str]], response: str) -> list[Any]:
        events = [Event("", "token", {"delta": delta, "choice": 0, "attempt": attempt}) for attempt, delta in tokens]
        result = {"response": response, "finish_reason": "stop", "usage": {}, "model": "echo"}
        events.append(Event("", "result", {"attempt": tokens[-1][0], "result": result}))
        with app.test_request_context():
            row = app.extensions["dispatch"].submit("local", wanted).row
            said = Said(row, answers.chat_chunks("llm"), 60, include_usage=False)
            return [text if text == "[DONE]" else json.loads(text) for text in said.follow(iter(events)) if text]

    return chunks


def deltas(chunks: list[Any]) -> str:
    """The text of all chunks."""
    choices = [chunk["choices"][0] for chunk in chunks if "choices" in chunk]
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.parametrize("second", [["one ", "two three"], ["one two three"], ["on", "e two", " three"]])
def test_a_stream_goes_on_where_a_lost_worker_left_it(follow, second):
    told = follow([(1, "one"), (1, " two"), *((2, delta) for delta in second)], "one two three")

    assert deltas(told) == "one two three"
    assert told[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("second", "response"), [(["one four"], "one four"), (["one"], "one")], ids=["other text", "less text"]
)
def test_a_stream_whose_next_worker_says_something_else_ends_with_an_error(follow, second, response):
    told = follow([(1, "one"), (1, " two"), *((2, delta) for delta in second)], response)

    assert deltas(told) == "one two"
    assert told[-1]["error"]["code"] == "worker_lost"


def test_subtitles_have_the_times_of_their_segments():
    segments = [{"start": 0.0, "end": 61.5, "text": " One --> two"}, {"start": 3599.9996, "end": 3661, "text": "x"}]

    assert srt(segments).startswith("1\n00:00:00,000 --> 00:01:01,500\nOne --> two\n\n2\n01:00:00,000 --> 01:01:01,000")
    assert vtt(segments).startswith("WEBVTT\n\n00:00:00.000 --> 00:01:01.500\nOne -> two\n\n01:00:00.000")
