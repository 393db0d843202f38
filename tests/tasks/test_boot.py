"""A worker that cannot serve as it was told stops at once and says why; one that can shows up in Flower."""

import os
import subprocess
import sys

import pytest
import requests

from tasks.settings import ROOT
from tests.rig import free_port


def start(valkey, queues, **environ):
    """What a worker that stops by itself said, and its exit code."""
    worker = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queues],
        cwd=ROOT,
        env={
            **os.environ,
            "GPU_BROKER_URL": f"{valkey.url}/0",
            "GPU_STORE_URL": f"{valkey.url}/1",
            "GPU_LLM_MODEL": "echo",
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return worker.returncode, worker.stdout + worker.stderr


@pytest.mark.parametrize(
    ("queues", "environ", "said"),
    [
        ("asia-east.llm", {"GPU_LLM_MODEL": "Qwen/Qwen2.5-7B-Instrct"}, "Qwen/Qwen2.5-7B-Instruct"),
        ("asia-east.llm", {"GPU_MAX_CONCURRENT_JOBS": "0"}, "GPU_MAX_CONCURRENT_JOBS must be at least 1"),
        ("asia-east.chat", {}, "such as asia-east.llm"),
        ("mars.llm", {}, "'mars' is not configured"),
        ("asia-east.llm", {"REGIONS": "{"}, "REGIONS must be a JSON object"),
        ("asia-east.llm", {"CELERY_BROKER_URL": "redis://127.0.0.1:9/0"}, "set GPU_BROKER_URL"),
        ("asia-east.llm,europe-west.llm", {}, "one region"),
    ],
)
def test_a_worker_that_cannot_serve_as_told_says_why(valkey, queues, environ, said):
    code, output = start(valkey, queues, **environ)

    assert code == 78
    assert said in output
    assert "Traceback" not in output


def test_a_worker_without_a_store_says_so(valkey):
    code, output = start(valkey, "asia-east.llm", GPU_STORE_URL="redis://127.0.0.1:9/0")

    assert code == 1
    assert "the store of asia-east cannot be reached" in output


def test_flower_shows_readable_names_and_nothing_of_a_job(platform, tmp_path):
    port = free_port()
    platform.start_worker()
    flower = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}", "--address=127.0.0.1"],
        cwd=ROOT,
        env={**platform.environ, "FLOWER_UNAUTHENTICATED_API": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"

        def api(path: str) -> dict:
            try:
                return requests.get(f"{url}/api/{path}", timeout=5).json()
            except requests.RequestException:
                return {}

        # It hears events from the moment it knows the worker.
        platform.until(lambda: api("workers"), 40)
        secret = "canary-7f3a"
        row = platform.ended(platform.submit(f"tell nobody {secret}"))
        platform.until(lambda: api("tasks").get(row.id, {}).get("state") == "SUCCESS")
        pages = [requests.get(f"{url}{path}", timeout=5).text for path in ("/tasks", f"/task/{row.id}", "/workers")]
        shown = api("tasks")[row.id]
    finally:
        flower.terminate()
        flower.wait(10)

    assert shown["name"] == "tasks.llm"
    assert secret in row.result
    assert all(secret not in text for text in [*pages, str(shown)])
    assert secret not in platform.workers[0].log.read_text()
