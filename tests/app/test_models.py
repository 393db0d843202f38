"""Models: the resource that lists them, jobs that name one, and what the client is told of aliases."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient

from engines.catalogue import JobType
from tasks.routing import queue_name

JOBS = "/api/v1/jobs"
MODELS = "/api/v1/models"
QWEN = "Qwen/Qwen2.5-7B-Instruct"
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}


@pytest.fixture
def listed(client: FlaskClient) -> Callable[..., dict[tuple[str, str], dict[str, Any]]]:
    """The list, by type and id."""

    def get(query: str = "") -> dict[tuple[str, str], dict[str, Any]]:
        return {(item["type"], item["id"]): item for item in client.get(MODELS + query).json["items"]}

    return get


def test_every_model_of_the_seed_is_listed_by_its_id_or_as_an_alias_with_the_reason(listed):
    seed = {
        "llm": "Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-14B-Instruct Qwen/Qwen2.5-72B-Instruct "
        "meta-llama/Llama-3.1-8B-Instruct meta-llama/Llama-3.1-70B-Instruct 01-ai/Yi-34B-Chat "
        "deepseek-ai/DeepSeek-V2-Lite THUDM/glm-4-9b-chat",
        "image_gen": "Zhihu-ai/Z-Image-Turbo black-forest-labs/FLUX.1-schnell black-forest-labs/FLUX.1-dev "
        "stabilityai/stable-diffusion-xl-base-1.0 stabilityai/stable-diffusion-3-medium",
        "vision": "THUDM/glm-4v-9b Qwen/Qwen2-VL-7B-Instruct OpenGVLab/InternVL2-8B liuhaotian/llava-v1.6-34b",
        "whisper": "openai/whisper-large-v3 openai/whisper-medium openai/whisper-small",
        "embedding": "BAAI/bge-large-zh-v1.5 BAAI/bge-m3 intfloat/e5-large-v2",
    }
    found = listed()

    for job_type, ids in seed.items():
        for model_id in ids.split():
            aliases = [item["aliases"].get(model_id) for (kind, _), item in found.items() if kind == job_type]
            assert (job_type, model_id) in found or any(aliases), model_id
    assert all(item["memory_gib"] > 0 for item in found.values())


def test_the_list_says_where_a_model_is_live_and_holds_what_workers_loaded_beside_the_catalogue(client, listed, worker):
    worker.show(QWEN)
    worker.id = "another"
    worker.show("my-folder")
    time.sleep(0.6)  # cards are read anew after half a second

    assert listed()["llm", QWEN]["live"] == [{"region": "asia-east", "workers": 1, "slots": 2, "free": 2}]
    assert set(listed("?live=true")) == {("llm", QWEN), ("llm", "my-folder")}
    assert listed()["llm", "meta-llama/Llama-3.1-8B-Instruct"]["live"] == []
    assert {kind for kind, _ in listed("?type=whisper")} == {"whisper"}
    assert client.post(JOBS, json={**CHAT, "model": "my-folder"}).status_code == 202


def test_an_unknown_model_is_refused_with_near_ones(client):
    answer = client.post(JOBS, json={**CHAT, "model": "Qwen/Qwen2.5-7B-Instrct"})

    assert (answer.status_code, list(answer.json["errors"])) == (422, ["model"])
    assert QWEN in answer.json["errors"]["model"][0]
    assert client.post(JOBS, json={**CHAT, "model": "BAAI/bge-m3"}).status_code == 422  # of another type


def test_a_job_that_names_a_model_waits_in_that_models_queue_and_says_what_for(client, worker):
    worker.show()  # an echo worker, which holds another model
    time.sleep(0.6)

    job = client.post(JOBS, json={**CHAT, "model": QWEN.upper()}).json
    shown = client.get(f"{JOBS}/{job['job_id']}").json

    assert worker.ledger.position(job["job_id"], queue_name("asia-east", JobType.LLM, QWEN)) == 1
    assert worker.ledger.position(job["job_id"], queue_name("asia-east", JobType.LLM)) is None
    assert (shown["model"], shown["requested_model"]) == (QWEN, QWEN.upper())
    assert shown["queued_reason"] == f"No live worker serves llm with {QWEN} in asia-east, nor in any other region."
    assert client.get(f"{JOBS}/stats/queue").json["by_type"]["llm"] == 1


def test_a_sync_job_for_a_model_that_nobody_has_is_refused_at_once_if_asked_so(client, worker):
    worker.show()
    time.sleep(0.6)

    refused = client.post(f"{JOBS}/sync?wait_for_worker=false", json={**CHAT, "model": QWEN})

    assert (refused.status_code, refused.json["code"]) == (503, "no_worker")


def test_an_alias_is_answered_by_the_model_that_it_means_and_the_job_says_so(client):
    params = {"prompt": "a cat"}
    job = client.post(JOBS, json={"type": "image_gen", "params": params, "model": "Zhihu-ai/Z-Image-Turbo"}).json
    shown = client.get(f"{JOBS}/{job['job_id']}").json

    assert shown["model"] == "Tongyi-MAI/Z-Image-Turbo"
    assert shown["warnings"] == [
        "Zhihu-ai/Z-Image-Turbo is answered by Tongyi-MAI/Z-Image-Turbo: there is no such repository; Tongyi-MAI "
        "publishes it."
    ]
