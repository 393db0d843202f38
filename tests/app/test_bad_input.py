"""What clients send wrongly: refused with field and rule, as a problem, and nothing is made of it."""

import json
import time
from dataclasses import replace

import pytest
from flask.testing import FlaskClient

JOBS = "/api/v1/jobs"
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**changes: object) -> dict:
    """A valid body with changes in its params."""
    return {"type": "llm", "params": {"messages": MESSAGES, **changes}}


def post(client: FlaskClient, body: bytes, **headers: str):
    return client.post(JOBS, data=body, headers={"Content-Type": "application/json", **headers})


@pytest.fixture(autouse=True)
def nothing_is_made(client):
    yield
    assert client.get(JOBS).json["items"] == []


VALID = json.dumps(chat()).encode()

MALFORMED = {
    "nothing": b"",
    "no JSON": b"type=llm",
    "cut off": VALID[:-1],
    "two values": VALID + VALID,
    "NaN": VALID.replace(b'"hi"', b"NaN"),
    "Infinity": b'{"priority": Infinity}',
    "minus Infinity": b'{"priority": -Infinity}',
    "a megabyte of nesting": b"[" * 1_000_000,
    "a megabyte of nested objects": b'{"a":' * 190_000,
    "33 lists within one another": b'{"type":"llm","params":' + b"[" * 32 + b"]" * 32 + b"}",
    "nesting inside params": b'{"type":"llm","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a million digits": b'{"priority": 1' + b"0" * 900_000 + b"}",
    "not UTF-8": VALID.replace(b"hi", b"\xff\xfe"),
    "UTF-16": json.dumps(chat()).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + VALID,
    "a list": b"[]",
    "null": b"null",
    "a string": b'"llm"',
    "a control character": b'{"type": "l\x00m"}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_body_that_is_no_json_object_is_malformed(client, name):
    began = time.monotonic()
    answer = post(client, MALFORMED[name])

    assert time.monotonic() - began < 5
    assert (answer.status_code, answer.json["code"]) == (400, "malformed_body")
    assert len(answer.data) < 1000


INVALID = {
    "no type": ({"params": {"messages": MESSAGES}}, "type"),
    "unknown type": ({**chat(), "type": "llmm"}, "type"),
    "a type that cannot be asked for yet": ({**chat(), "type": "teleport"}, "type"),
    "a type of the wrong type": ({**chat(), "type": ["llm"]}, "type"),
    "null type": ({**chat(), "type": None}, "type"),
    "no params": ({"type": "llm"}, "params"),
    "params of the wrong type": ({"type": "llm", "params": "hi"}, "params"),
    "params null": ({"type": "llm", "params": None}, "params"),
    "params a list": ({"type": "llm", "params": [1]}, "params"),
    "empty params": ({"type": "llm", "params": {}}, "params.messages"),
    "unknown field": ({**chat(), "prioritty": 1}, "prioritty"),
    "unknown param": (chat(max_tokenz=5), "params.max_tokenz"),
    "a field of the row": ({**chat(), "owner": "admin"}, "owner"),
    "empty messages": (chat(messages=[]), "params.messages"),
    "messages no list": (chat(messages="hi"), "params.messages"),
    "a message no object": (chat(messages=["hi"]), "params.messages.0"),
    "wrong role": (chat(messages=[{"role": "robot", "content": "hi"}]), "params.messages.0.role"),
    "role of the wrong type": (chat(messages=[{"role": 1, "content": "hi"}]), "params.messages.0.role"),
    "no content": (chat(messages=[*MESSAGES, {"role": "user"}]), "params.messages.1.content"),
    "empty content": (chat(messages=[{"role": "user", "content": ""}]), "params.messages.0.content"),
    "unknown field of a message": (
        chat(messages=[{"role": "user", "content": "hi", "nam": 1}]),
        "params.messages.0.nam",
    ),
    "lone surrogate": (chat(messages=[{"role": "user", "content": "\ud800"}]), "params.messages.0.content"),
    "max_tokens zero": (chat(max_tokens=0), "params.max_tokens"),
    "max_tokens a string": (chat(max_tokens="5"), "params.max_tokens"),
    "max_tokens a fraction": (chat(max_tokens=1.5), "params.max_tokens"),
    "max_tokens true": (chat(max_tokens=True), "params.max_tokens"),
    "max_tokens huge": (chat(max_tokens=10**4000), "params.max_tokens"),
    "temperature above": (chat(temperature=2.1), "params.temperature"),
    "temperature below": (chat(temperature=-0.1), "params.temperature"),
    "temperature a string": (chat(temperature="0.7"), "params.temperature"),
    "temperature null": (chat(temperature=None), "params.temperature"),
    "top_p zero": (chat(top_p=0), "params.top_p"),
    "seed negative": (chat(seed=-1), "params.seed"),
    "stop of numbers": (chat(stop=[1]), "params.stop"),
    "stop too many": (chat(stop=list("abcde")), "params.stop"),
    "priority above": ({**chat(), "priority": 10}, "priority"),
    "priority below": ({**chat(), "priority": -1}, "priority"),
    "priority a string": ({**chat(), "priority": "high"}, "priority"),
    "priority a fraction": ({**chat(), "priority": 1.5}, "priority"),
    "priority true": ({**chat(), "priority": True}, "priority"),
    "unknown region": ({**chat(), "region": "asia-eats"}, "region"),
    "region of the wrong type": ({**chat(), "region": {"name": "asia-east"}}, "region"),
    "empty region": ({**chat(), "region": ""}, "region"),
    "allow_cross_region a string": ({**chat(), "allow_cross_region": "yes"}, "allow_cross_region"),
    "allow_cross_region a number": ({**chat(), "allow_cross_region": 1}, "allow_cross_region"),
    "timeout zero": ({**chat(), "timeout_seconds": 0}, "timeout_seconds"),
    "timeout negative": ({**chat(), "timeout_seconds": -5}, "timeout_seconds"),
    "timeout above a day": ({**chat(), "timeout_seconds": 86_401}, "timeout_seconds"),
    "timeout huge": ({**chat(), "timeout_seconds": 10**4000}, "timeout_seconds"),
    "timeout null": ({**chat(), "timeout_seconds": None}, "timeout_seconds"),
    "queue timeout zero": ({**chat(), "queue_timeout_seconds": 0}, "queue_timeout_seconds"),
}


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/sync"])
@pytest.mark.parametrize("name", INVALID)
def test_a_field_that_breaks_a_rule_is_refused_by_name(client, path, name):
    body, field = INVALID[name]
    answer = client.post(path, data=json.dumps(body), content_type="application/json")

    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")
    assert list(answer.json["errors"]) == [field]
    assert answer.json["detail"].startswith(f"{field}: ")


@pytest.mark.parametrize("number", [b"1e999", b"-1e999"])
def test_a_number_beyond_floats_is_refused(client, number):
    answer = post(client, VALID.replace(b'"params"', b'"timeout_seconds": ' + number + b', "params"'))

    assert (answer.status_code, list(answer.json["errors"])) == (422, ["timeout_seconds"])


def test_every_wrong_field_is_named_at_once(client):
    answer = client.post(JOBS, json={**chat(max_tokens=0, temperature=3), "priority": 10, "nope": 1})

    assert set(answer.json["errors"]) == {"params.max_tokens", "params.temperature", "priority", "nope"}
    assert "(3 more)" in answer.json["detail"]


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({**chat(), "prioritty": 1}, "Near: priority."),
        (chat(max_token=1), "Near: max_tokens."),
        (chat(messages=[{"role": "user", "content": "hi", "rolle": 1}]), "Near: role."),
        ({**chat(), "type": "lllm"}, "Near: llm."),
        ({**chat(), "region": "europe"}, "Near: europe-west."),
        (
            chat(zzz=1),
            "Known: messages, max_tokens, temperature, top_p, seed, stop, n, response_format, logprobs, top_logprobs.",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_near_ones(client, body, hint):
    assert hint in client.post(JOBS, json=body).json["detail"]


def test_much_junk_gets_a_short_answer_soon(client):
    junk = {f"field{number}": 1 for number in range(30_000)}
    began = time.monotonic()
    answer = client.post(JOBS, json={**chat(), **junk, "x" * 100_000: 1})

    assert time.monotonic() - began < 5
    assert answer.status_code == 422
    assert len(answer.data) < 10_000


def test_a_surrogate_in_a_fields_name_is_refused_like_any_other(client):
    answer = post(client, b'{"\\ud800": 1}')

    assert answer.status_code == 422
    assert "\ud800" in answer.json["errors"]


def test_a_body_above_the_limit_is_refused_with_the_limit(make_app, settings):
    client = make_app(replace(settings, max_body_bytes=1024 * 1024)).test_client()

    answer = client.post(JOBS, json=chat(messages=[{"role": "user", "content": "x" * 1024 * 1024}]))

    assert (answer.status_code, answer.json["code"]) == (413, "body_too_large")
    assert "1048576" in answer.json["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_of_another_type_is_refused(client, kind):
    answer = client.post(JOBS, data=VALID, content_type=kind)

    assert (answer.status_code, answer.json["code"]) == (415, "not_json")


def test_unknown_paths_and_methods_are_problems_too(client):
    missing = client.get("/api/v1/job")
    wrong = client.put(JOBS)

    assert (missing.status_code, missing.json["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["Allow"]
