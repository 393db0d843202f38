"""What every answer carries, and whom a browser lets read it."""

from dataclasses import replace

import pytest

from app.settings import Settings
from tasks.settings import SettingsError

JOBS = "/api/v1/jobs"
SITE = "https://app.example.com"
ANSWERS = [("GET", "/health"), ("GET", "/docs"), ("GET", "/none"), ("POST", JOBS), ("PUT", JOBS), ("OPTIONS", JOBS)]


@pytest.mark.parametrize(("method", "path"), ANSWERS)
def test_no_answer_is_taken_for_a_page_or_shown_within_one(client, method, path):
    headers = client.open(path, method=method).headers

    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "camera=()" in headers["Permissions-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Server" not in headers
    assert not any(name.startswith("Access-Control") for name in headers.keys())  # noqa: SIM118 - no mapping
    assert "Strict-Transport-Security" not in headers


def test_behind_tls_browsers_are_told_to_stay_there(make_app, settings):
    client = make_app(replace(settings, hsts_s=31_536_000)).test_client()

    assert client.get("/health").headers["Strict-Transport-Security"] == "max-age=31536000"


def test_pages_of_a_listed_origin_alone_may_ask_and_read(make_app, settings, make_key):
    client = make_app(replace(settings, cors_origins=[SITE])).test_client()
    key = make_key("infer")
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}

    # The browser's question has no key.
    asked = client.options(JOBS, headers={"Origin": SITE, **wish})
    read = client.get(JOBS, headers={"Origin": SITE, **key})
    refused = client.get(JOBS, headers={"Origin": SITE})

    assert (asked.status_code, asked.data) == (204, b"")
    assert "POST" in asked.headers["Access-Control-Allow-Methods"]
    assert "X-API-Key" in asked.headers["Access-Control-Allow-Headers"]
    assert (read.status_code, refused.status_code) == (200, 401)
    for answer in (asked, read, refused):
        assert answer.headers["Access-Control-Allow-Origin"] == SITE
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
    for origin in ("https://elsewhere.example", "null", f"{SITE}.elsewhere.example", f"{SITE}:8443", "*"):
        for answer in (
            client.options(JOBS, headers={"Origin": origin, **wish}),
            client.get(JOBS, headers={"Origin": origin, **key}),
        ):
            assert "Access-Control-Allow-Origin" not in answer.headers


def test_without_keys_not_even_a_listed_page_is_taken_for_a_program_on_the_server(make_app, settings):
    client = make_app(replace(settings, cors_origins=[SITE])).test_client()

    assert client.get(JOBS, headers={"Origin": SITE}).status_code == 401


@pytest.mark.parametrize("text", ["*", "app.example.com", f"{SITE}/", "https://App.example.com", f"{SITE}, null"])
def test_what_no_browser_sends_as_an_origin_is_refused_at_start(text):
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        Settings.from_environ({"CORS_ORIGINS": text})


def test_the_limits_of_a_key_and_the_origins_are_read_from_the_environment():
    told = {
        "RATE_SUBMIT": "5",
        "RATE_SYNC": "6",
        "RATE_READ": "7",
        "RATE_CANCEL": "0",
        "MAX_QUEUED_PER_KEY": "9",
        "CORS_ORIGINS": f"{SITE}, http://localhost:5173,http://[::1]:8080",
        "HSTS_SECONDS": "60",
    }

    found = Settings.from_environ(told)

    assert (found.rate_submit, found.rate_sync, found.rate_read, found.rate_cancel) == (5, 6, 7, 0)
    assert (found.max_queued_per_key, found.hsts_s) == (9, 60)
    assert found.cors_origins == [SITE, "http://localhost:5173", "http://[::1]:8080"]
