"""Keys are made, changed, replaced and closed over HTTP, by admins alone, and nobody is locked out unawares."""

from collections.abc import Callable

import pytest
from flask.testing import FlaskClient

KEYS = "/api/v1/keys"
ADMIN = {"name": "ops", "scopes": ["admin"]}


@pytest.fixture
def admin(client: FlaskClient) -> dict[str, str]:
    """The headers of the first key, made without one."""
    return {"X-API-Key": client.post(KEYS, json=ADMIN).json["key"]}


def test_a_local_program_makes_the_first_key_which_must_be_able_to_make_others(client):
    refused = client.post(KEYS, json={"name": "first", "scopes": ["infer"]})
    made = client.post(KEYS, json=ADMIN)

    assert (refused.status_code, refused.json["code"]) == (409, "no_admin_left")
    assert made.status_code == 201
    assert made.json["key"].startswith(f"gpi_{made.json['id']}_")
    assert client.post(KEYS, json=ADMIN).status_code == 401
    assert client.get(KEYS, headers={"X-API-Key": made.json["key"]}).status_code == 200


def test_a_key_is_shown_with_its_text_once_and_then_without(client, admin):
    wanted = {"name": "search", "scopes": ["infer"], "weight": 3, "quotas": {"jobs_per_day": 10}, "expires_days": 2}
    made = client.post(KEYS, json=wanted, headers=admin).json

    (_, shown) = client.get(KEYS, headers=admin).json["items"]
    text = made.pop("key")
    assert shown == made
    assert text not in client.get(KEYS, headers=admin).text
    assert (shown["weight"], shown["state"], shown["scopes"]) == (3, "open", ["infer"])
    assert shown["quotas"]["jobs_per_day"] == 10
    assert shown["quotas"]["tokens_per_month"] is None
    assert client.get("/api/v1/jobs", headers={"X-API-Key": text}).status_code == 200


def test_a_change_touches_only_what_it_names_and_null_lifts_a_quota(client, admin):
    quotas = {"jobs_per_day": 10, "tokens_per_month": 5}
    made = client.post(KEYS, json={**ADMIN, "quotas": quotas}, headers=admin).json

    changed = client.patch(f"{KEYS}/{made['id']}", json={"quotas": {"jobs_per_day": None}, "weight": 2}, headers=admin)

    assert changed.status_code == 200
    assert (changed.json["quotas"]["jobs_per_day"], changed.json["quotas"]["tokens_per_month"]) == (None, 5)
    assert (changed.json["weight"], changed.json["name"]) == (2, "ops")


def test_a_rotated_key_hands_on_its_jobs_weight_and_quotas_and_a_change_reaches_both(client, admin):
    old = client.post(KEYS, json={**ADMIN, "weight": 4}, headers=admin).json
    new = client.post(f"{KEYS}/{old['id']}/rotate", json={"overlap_hours": 1}, headers=admin).json

    assert (new["owner"], new["weight"]) == (old["owner"], 4)
    assert client.post(f"{KEYS}/{old['id']}/rotate", json={}, headers=admin).json["code"] == "key_not_rotated"
    client.patch(f"{KEYS}/{new['id']}", json={"weight": 5}, headers=admin)
    weights = {key["id"]: key["weight"] for key in client.get(KEYS, headers=admin).json["items"]}
    assert weights[old["id"]] == weights[new["id"]] == 5


def test_a_revoked_key_opens_nothing_and_the_last_admin_is_not_closed_unawares(client, admin):
    (first,) = client.get(KEYS, headers=admin).json["items"]
    second = client.post(KEYS, json=ADMIN, headers=admin).json

    closed = client.delete(f"{KEYS}/{second['id']}", headers=admin)
    refused = client.delete(f"{KEYS}/{first['id']}", headers=admin)

    assert (closed.status_code, closed.json["state"]) == (200, "revoked")
    assert client.get(KEYS, headers={"X-API-Key": second["key"]}).status_code == 401
    assert (refused.status_code, refused.json["code"]) == (409, "no_admin_left")
    assert client.delete(f"{KEYS}/{first['id']}?force=true", headers=admin).status_code == 200
    assert client.get(KEYS, headers=admin).status_code == 401


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "", "scopes": ["infer"]}, "name"),
        ({"name": "a\u0000b", "scopes": ["infer"]}, "name"),
        ({"name": "a", "scopes": []}, "scopes"),
        ({"name": "a", "scopes": ["root"]}, "scopes.0"),
        ({"name": "a", "scopes": ["infer"], "weight": 0}, "weight"),
        ({"name": "a", "scopes": ["infer"], "quotas": {"jobs_per_day": -1}}, "quotas.jobs_per_day"),
        ({"name": "a", "scopes": ["infer"], "quotas": {"jobs_per_hour": 1}}, "quotas.jobs_per_hour"),
        ({"name": "a", "scopes": ["infer"], "expires_days": 0}, "expires_days"),
    ],
)
def test_a_wrong_field_is_named(client, admin, body, field):
    answer = client.post(KEYS, json=body, headers=admin)

    assert answer.status_code == 422
    assert list(answer.json["errors"]) == [field]


def test_what_was_made_and_changed_is_in_the_audit_log_without_its_text(app, client, admin):
    made = client.post(KEYS, json=ADMIN, headers=admin).json
    client.patch(f"{KEYS}/{made['id']}", json={"weight": 2}, headers=admin)

    events = [(event.action, event.target) for event in app.extensions["audit"].newest()][-2:]
    assert events == [("keys.create", f"{KEYS} {made['id']}"), ("keys.change", f"{KEYS}/{made['id']}")]


def test_an_unknown_key_is_not_found(client, admin):
    calls: list[Callable[[], object]] = [
        lambda: client.patch(f"{KEYS}/none", json={}, headers=admin),
        lambda: client.post(f"{KEYS}/none/rotate", json={}, headers=admin),
        lambda: client.delete(f"{KEYS}/none", headers=admin),
    ]

    assert [call().json["code"] for call in calls] == ["key_not_found"] * 3
