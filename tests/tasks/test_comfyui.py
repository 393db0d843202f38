"""Workflow jobs the whole way: the API's side, a real worker of asia-east.comfyui, a ComfyUI."""

import json
import os
import subprocess
import sys

import pytest

from app.request import Request
from engines.catalogue import JobType
from engines.schemas import RESULTS, load_params
from tasks.job import JobState
from tasks.settings import ROOT
from tests.gpu_admin.comfyui_server import ComfyUi, blurred
from tests.rig import free_port

QUEUE = "asia-east.comfyui"


@pytest.fixture
def comfyui(tmp_path):
    """A ComfyUI; those that a test starts in its place are ended, too."""
    servers = [ComfyUi(tmp_path / "comfyui")]
    yield servers
    for server in servers:
        server.kill()


def submit(platform, workflow):
    params = load_params(JobType.COMFYUI, {"workflow": workflow})
    request = Request(JobType.COMFYUI, None, None, params, 0, None, True, 60, None)
    return platform.dispatch.submit("tester", request).row


def test_a_workflow_goes_the_whole_way_its_cancel_reaches_comfyui_and_it_outlives_comfyui(platform, comfyui):
    worker = platform.start_worker(queues=QUEUE, GPU_COMFYUI_URL=comfyui[0].url)
    row = submit(platform, blurred(20, 1))
    platform.until(lambda: (told := platform.dispatch.progress(platform.row(row))) and told.done)
    row = platform.ended(row)

    assert (row.status, row.worker_id) == (JobState.COMPLETED, worker.id)
    result = json.loads(row.result)
    assert RESULTS[JobType.COMFYUI].validate(result) == {}
    assert [image["node"] for image in result["images"]] == ["save"]

    row = submit(platform, blurred(100, 2))
    platform.until(comfyui[0].running)
    prompt = comfyui[0].running()[0]
    platform.dispatch.cancel(row)
    platform.until(lambda: "execution_interrupted" in comfyui[0].statuses().get(prompt, []))
    assert platform.status(row) is JobState.CANCELLED

    # The slot is free again.
    row = submit(platform, blurred(30, 3))
    platform.until(comfyui[0].running)
    comfyui[0].kill()
    assert worker.process.wait(20) == 70
    comfyui.append(ComfyUi(comfyui[0].folder, port=comfyui[0].port))
    second = platform.start_worker(queues=QUEUE, GPU_COMFYUI_URL=comfyui[0].url)
    row = platform.ended(row, 30)

    assert (row.status, row.worker_id, row.attempt) == (JobState.COMPLETED, second.id, 2)


def test_a_worker_whose_comfyui_is_away_ends_so_that_it_is_started_again(valkey):
    url = f"http://127.0.0.1:{free_port()}"
    # As `celery`, but less patient.
    program = "from engines.comfyui import engine; engine.PATIENCE_S = 0.5; from celery.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "-A", "tasks", "worker", "-Q", QUEUE],
        cwd=ROOT,
        env={
            **os.environ,
            "GPU_BROKER_URL": f"{valkey.url}/0",
            "GPU_STORE_URL": f"{valkey.url}/1",
            "GPU_COMFYUI_URL": url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert f"No ComfyUI answers at {url}" in done.stdout + done.stderr
