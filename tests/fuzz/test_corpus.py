"""Every file, body, path and credential of the corpus is refused with 4xx, and soon."""

import base64
import re
import time

import pytest

from engines.contract import InvalidInput
from engines.vision import picture
from engines.whisper import sound
from tasks.tokens import TokenRefused, verify
from tests.fuzz import corpus

JOBS = "/api/v1/jobs"
#: Generous: what it forbids takes minutes.
SOON_S = 5
SECRET, WORKER, ADDRESS = "s" * 64, "worker-1", "192.0.2.1"


def assert_refused(answer, name, began):
    assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.data[:300])
    # Under /v1, as OpenAI writes it.
    assert answer.json["error"]["message"] if "error" in answer.json else answer.json["detail"], name
    assert len(answer.data) < 2000, name
    assert time.monotonic() - began < SOON_S, name


def refusal(read, data):
    """Why the engine does not open the file; nothing if it does."""
    try:
        read(data)
    except InvalidInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("files", "job_type", "field", "read"),
    [
        (corpus.PICTURES, "vision", "image_base64", picture.read),
        (corpus.SOUNDS, "whisper", "audio_base64", sound.decode),
    ],
    ids=["pictures", "sounds"],
)
def test_a_broken_file_is_refused_by_the_api_or_when_it_is_opened(api, files, job_type, field, read):
    """The API looks at the first bytes; what begins well is opened by the engine alone, which fails that job."""
    client = api.app.test_client()
    for name, data in files.items():
        began = time.monotonic()
        params = {field: base64.b64encode(data).decode(), **({"question": "?"} if job_type == "vision" else {})}
        answer = client.post(JOBS, json={"type": job_type, "params": params}, headers=api.headers)

        if answer.status_code != 202:
            assert_refused(answer, name, began)
            assert list(answer.json["errors"]) == [f"params.{field}"], name
            continue
        assert field in refusal(read, data), name
        assert time.monotonic() - began < SOON_S, name


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/sync"])
def test_json_that_is_none_or_breaks_a_rule_is_refused(api, path):
    client = api.app.test_client()
    for name, body in corpus.JSONS.items():
        began = time.monotonic()
        answer = client.post(path, data=body, content_type="application/json", headers=api.headers)

        assert_refused(answer, name, began)


def test_no_string_in_a_path_leads_anywhere(service):
    client = service.app.test_client()
    document = client.get("/openapi.json").json
    places = [
        (method, path)
        for path, item in document["paths"].items()
        if "{" in path
        for method in item
        if method in ("get", "post", "delete")
    ]
    assert len(places) >= 3

    for method, path in places:
        for name, text in corpus.PATHS.items():
            began = time.monotonic()
            url = re.sub(r"\{\w+\}", lambda _, text=text: text, path)
            answer = client.open(url, method=method.upper(), headers=service.headers)

            assert_refused(answer, f"{method} {path} {name}", began)


def test_no_credential_but_the_key_itself_opens_anything(service):
    client = service.app.test_client()
    forgeries = corpus.keys(service.headers["X-API-Key"])
    inside = f"{JOBS}/stats/queue" if service.name == "api" else "/api/v1/gpus"

    assert client.get(inside, headers=service.headers).status_code == 200
    for name, headers in forgeries.items():
        began = time.monotonic()
        answer = client.get(inside, headers=headers)

        assert_refused(answer, name, began)
        assert answer.status_code == 401, name


@pytest.mark.parametrize("name", corpus.tokens(SECRET, WORKER, ADDRESS))
def test_no_forged_token_lets_anybody_in(name):
    with pytest.raises(TokenRefused):
        verify(corpus.tokens(SECRET, WORKER, ADDRESS)[name], SECRET, worker_id=WORKER, address=ADDRESS)


def test_the_corpus_is_as_large_as_the_specification_asks():
    real = "gpi_00000000_" + "a" * 43

    assert (len(corpus.PICTURES), len(corpus.SOUNDS), len(corpus.JSONS), len(corpus.PATHS)) == (40, 30, 30, 25)
    assert len(corpus.keys(real)) + len(corpus.tokens(SECRET, WORKER, ADDRESS)) == 20
