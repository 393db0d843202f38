"""Jobs that name a model, jobs of every type, and what a client sees of them while they run: with real workers."""

import base64
import io
import json

import pytest
from PIL import Image

from app.request import Request
from engines.catalogue import JobType
from engines.schemas import RESULTS, load_params
from tasks.job import JobState
from tests.rig import ECHO, EVERY_TYPE


def picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PARAMS = {
    JobType.LLM: {"messages": [{"role": "user", "content": "sleep 1.5"}]},
    JobType.IMAGE_GEN: {"prompt": "a cat"},
    JobType.VISION: {"image_base64": picture(), "question": "what is it"},
    JobType.WHISPER: {"audio_base64": base64.b64encode(b"RIFF....WAVE").decode()},
    JobType.EMBEDDING: {"input": "a text"},
    JobType.COMFYUI: {"workflow": {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}},
    JobType.TRITON: {
        "model_name": "MAM",
        "inputs": [{"name": "INPUT0", "shape": [2, 1], "datatype": "FP32", "data": [[1.5], [2]]}],
    },
}


def submit(platform, job_type):
    params = load_params(job_type, PARAMS[job_type])
    return platform.dispatch.submit("tester", Request(job_type, None, None, params, 0, None, True, 60, None)).row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model that no catalogue knows."""
    # Not at the top: it loads torch, which no other test of these rooms needs.
    from tests.engines.conftest import build

    return build("qwen2", tmp_path_factory.mktemp("models") / "our-own")


def test_one_worker_serves_every_type_and_shows_how_far_a_job_is(platform):
    platform.start_worker(queues=EVERY_TYPE, **ECHO)
    rows = {job_type: submit(platform, job_type) for job_type in JobType}

    platform.until(lambda: platform.dispatch.progress(platform.row(rows[JobType.LLM])) is not None)
    ended = {job_type: platform.ended(row, 15) for job_type, row in rows.items()}

    assert {row.status for row in ended.values()} == {JobState.COMPLETED}
    for job_type, row in ended.items():
        assert RESULTS[job_type].validate(json.loads(row.result)) == {}


def test_a_job_that_names_a_model_waits_for_its_worker_and_stands_in_nobodys_way(platform, folder):
    platform.start_worker()
    named = platform.submit("hello", model="our-own")
    behind = platform.submit("hello")
    same = platform.submit("hello", model="echo")

    assert {platform.ended(row, 30).status for row in (behind, same)} == {JobState.COMPLETED}
    assert platform.status(named) is JobState.QUEUED
    assert platform.dispatch.placement.place(platform.row(named)).reason == (
        "No live worker serves llm with our-own in asia-east, nor in any other region."
    )

    platform.start_worker(GPU_LLM_MODEL=str(folder))
    # Its first forward pass is the slowest.
    ended = platform.ended(named, 60)

    assert ended.status is JobState.COMPLETED
    assert json.loads(ended.result)["model"] == "our-own"


def test_a_named_job_whose_message_was_lost_is_sent_again_to_its_own_queue(platform):
    row = platform.submit("hello", model="echo")
    broker = platform.dispatch.links["asia-east"].broker.publisher
    name = "asia-east.llm@echo"
    platform.until(lambda: broker.depths([name]) == {name: 1})
    with broker._app.connection_for_write() as connection:
        connection.default_channel.queue_purge(name)

    platform.until(lambda: broker.depths([name]) == {name: 1}, 30)
    platform.start_worker()

    assert platform.ended(row, 15).status is JobState.COMPLETED


@pytest.mark.parametrize(("flood", "single"), [(None, "echo"), ("echo", None)])
def test_neither_named_jobs_nor_the_others_starve_under_a_flood_of_the_other_kind(platform, flood, single):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    first = platform.submit("sleep 1")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)
    many = [platform.submit("sleep 0.1", model=flood) for _ in range(20)]
    one = platform.submit("hello", model=single)

    assert platform.ended(one, 15).status is JobState.COMPLETED

    assert sum(platform.status(row) is JobState.QUEUED for row in many) > 10
    assert platform.ended(many[-1]).worker_id == worker.id
