"""How much one key may ask: requests in ten seconds, and jobs that wait."""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.keys import Keys, Scope
from app.limits import STORE_TIMEOUT_S
from app.settings import Settings
from tests.app.conftest import CHAT

JOBS = "/api/v1/jobs"
LOW = {"rate_submit": 3, "rate_sync": 2, "rate_read": 4, "rate_cancel": 1}


@pytest.fixture
def make_client(
    make_app: Callable[[Settings], Flask], settings: Settings
) -> Callable[..., tuple[FlaskClient, dict[str, str]]]:
    """Makes clients of an app with a key; changes of its settings as keyword arguments."""

    def make(**changes: int) -> tuple[FlaskClient, dict[str, str]]:
        app = make_app(replace(settings, **changes))
        keys: Keys = app.extensions["keys"]
        return app.test_client(), {"X-API-Key": keys.create("test", [Scope.INFER])}

    return make


def codes(client: FlaskClient, headers: dict[str, str], times: int, method: str = "GET", path: str = JOBS) -> list[int]:
    """Statuses of the same request, over and over."""
    body = CHAT if method == "POST" else None
    return [client.open(path, method=method, json=body, headers=headers).status_code for _ in range(times)]


def test_each_kind_of_request_has_a_count_of_its_own(make_client):
    client, headers = make_client(**LOW)

    # A window may end within the test, but not twice.
    for method, path, most in (("POST", JOBS, 3), ("GET", JOBS, 4), ("DELETE", f"{JOBS}/none", 1)):
        answers = codes(client, headers, 2 * most + 1, method, path)
        assert answers[:most].count(429) == 0
        assert 1 <= answers.count(429) <= most + 1
    assert codes(client, headers, 5, "POST", f"{JOBS}/sync?timeout=0.01&wait_for_worker=false").count(429) >= 1


def test_a_refusal_says_which_limit_and_when_to_come_again(make_client):
    client, headers = make_client(**LOW)
    codes(client, headers, 8)

    answer = client.get(JOBS, headers=headers)

    assert (answer.status_code, answer.json["code"]) == (429, "rate_limited")
    assert "4 requests of this kind (read) in 10 s" in answer.json["detail"]
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    assert answer.headers["X-RateLimit-Limit"] == "4"


def test_other_owners_have_counts_of_their_own_and_rotated_keys_share_one(make_client):
    client, headers = make_client(**LOW)
    keys: Keys = client.application.extensions["keys"]
    other = {"X-API-Key": keys.create("other", [Scope.READ])}
    codes(client, headers, 8)
    second = {"X-API-Key": keys.rotate(headers["X-API-Key"][4:12], overlap_s=60)}

    assert codes(client, other, 1) == [200]
    assert codes(client, second, 1) == [429]


def test_processes_count_together_in_the_store(make_client, make_app, settings):
    client, headers = make_client(**LOW)
    second = make_app(replace(settings, **LOW)).test_client()

    codes(client, headers, 8)

    assert codes(second, headers, 1) == [429]


def test_programs_on_the_server_without_a_key_and_what_is_public_are_not_limited(make_app, settings):
    client = make_app(replace(settings, **LOW, max_queued_per_key=1)).test_client()

    assert codes(client, {}, 5, "POST") == [202] * 5
    assert codes(client, {}, 9) == [200] * 9
    assert codes(client, {}, 9, path="/health") == [200] * 9


def test_without_keys_others_are_counted_by_address(make_app, settings):
    client = make_app(replace(settings, **LOW, allow_anonymous=True)).test_client()

    def ask(address: str) -> int:
        return client.get(JOBS, environ_base={"REMOTE_ADDR": address}).status_code

    assert [ask("192.0.2.1") for _ in range(9)].count(429) >= 1
    assert ask("192.0.2.2") == 200


def test_0_is_no_limit(make_client):
    client, headers = make_client(**dict.fromkeys(LOW, 0), max_queued_per_key=0)

    assert codes(client, headers, 30, "DELETE", f"{JOBS}/none") == [404] * 30
    assert codes(client, headers, 5, "POST") == [202] * 5


@pytest.mark.parametrize("how", ["frozen", "gone"])
def test_without_its_store_each_process_counts_by_itself_and_waits_for_nothing(make_client, valkey, how):
    client, headers = make_client(**LOW)
    assert codes(client, headers, 1) == [200]

    valkey.stop() if how == "frozen" else valkey.kill()
    begun = time.monotonic()
    answers = codes(client, headers, 12)

    # One question and one look whether it is back, then again each few seconds; with room for a busy machine.
    assert time.monotonic() - begun < 4 * STORE_TIMEOUT_S + 5
    assert set(answers) == {200, 429}
    assert answers[0] == 200


def test_an_owner_may_have_so_many_jobs_queued_and_more_as_they_begin(make_client, worker):
    client, headers = make_client(max_queued_per_key=3)
    keys: Keys = client.application.extensions["keys"]
    other = {"X-API-Key": keys.create("other", [Scope.INFER])}
    ids = [client.post(JOBS, json=CHAT, headers=headers).json["job_id"] for _ in range(3)]

    answer = client.post(JOBS, json=CHAT, headers=headers)

    assert (answer.status_code, answer.json["code"]) == (429, "too_many_queued")
    assert "3 jobs queued" in answer.json["detail"]
    assert int(answer.headers["Retry-After"]) >= 1
    assert codes(client, headers, 1, "POST", f"{JOBS}/sync?timeout=0.01") == [429]
    assert codes(client, headers, 1, "POST", f"{JOBS}?dry_run=true") == [200]
    assert codes(client, other, 1, "POST") == [202]
    client.delete(f"{JOBS}/{ids[0]}", headers=headers)
    assert codes(client, headers, 2, "POST") == [202, 429]
