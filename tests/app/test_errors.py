"""Every refusal has one shape, and says nothing of the server's inside."""

import logging

import pytest

from app.auth import public

CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "canary-prompt"}]}}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/nowhere", None),
        ("PUT", "/api/v1/jobs", None),
        ("POST", "/api/v1/jobs", {}),
        ("GET", "/api/v1/jobs/none", None),
        ("POST", "/api/v1/jobs/sync?wait_for_worker=false", CHAT),
    ],
)
def test_a_refusal_is_a_problem_with_all_its_members(client, method, path, body):
    answer = client.open(path, method=method, json=body)

    assert answer.content_type == "application/problem+json"
    assert {"type", "title", "status", "detail", "code", "request_id"} <= set(answer.json)
    assert answer.json["status"] == answer.status_code
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_clients_own_request_id_comes_back(client):
    answer = client.get("/nowhere", headers={"X-Request-ID": "trace-1/a:b"})

    assert answer.headers["X-Request-ID"] == answer.json["request_id"] == "trace-1/a:b"


@pytest.mark.parametrize("given", ["x" * 129, "a b", "<script>", "", "é"])
def test_a_request_id_that_is_not_sane_is_replaced(client, given):
    made = client.get("/health", headers={"X-Request-ID": given}).headers["X-Request-ID"]

    assert made != given
    assert len(made) == 32


def test_two_requests_have_two_ids(client):
    assert client.get("/health").headers["X-Request-ID"] != client.get("/health").headers["X-Request-ID"]


def test_an_unexpected_error_is_logged_without_its_words_and_told_briefly(app, caplog):
    secret = "what a client sent"

    @app.get("/breaks")
    @public
    def breaks() -> str:
        raise RuntimeError(secret)

    with caplog.at_level(logging.ERROR):
        answer = app.test_client().get("/breaks")

    assert (answer.status_code, answer.json["code"]) == (500, "internal_error")
    assert answer.content_type == "application/problem+json"
    assert secret not in answer.text
    assert "RuntimeError" in caplog.text
    assert "in breaks" in caplog.text
    assert secret not in caplog.text
    assert answer.json["request_id"] in caplog.text


def test_no_prompt_is_logged(client, app, caplog):
    with caplog.at_level(logging.DEBUG):
        client.post("/api/v1/jobs", json=CHAT)
        client.post("/api/v1/jobs", json={**CHAT, "priority": 99})
        with app.extensions["database"].connect() as connection:
            connection.exec_driver_sql("DROP TABLE jobs")
        assert client.post("/api/v1/jobs", json=CHAT).status_code == 503

    assert "canary" not in caplog.text
