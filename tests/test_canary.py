"""What clients send and get, and the servers' passwords, are in no log, event, message, metric or webhook.

Nor are they on a page of Flower, and the text that a job writes goes through the store alone, never the broker.
"""

import base64
import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from app.examples import JOBS
from engines.catalogue import JobType
from tests.app.receiver import Receiver, receiving
from tests.conftest import Valkey
from tests.faults.record import ValkeyRecord
from tests.rig import ECHO, EVERY_TYPE, ROOT, free_port, until

CANARY, PASSWORD = "canary-in-the-coalmine", "password-of-the-mine"
UP_S = 90
_BODY = re.compile(rb'body\\": \\"([A-Za-z0-9+/=]+)\\"')


def marked(value: Any) -> Any:
    """An example with the canary in every free text."""
    match value:
        case dict():
            return {key: marked(inner) for key, inner in value.items()}
        case list():
            return [marked(inner) for inner in value]
        case str() if " " in value or not value.isascii():
            return f"{CANARY} {value}"
        case _:
            return value


def requests_of(job_type: JobType) -> dict[str, Any]:
    """A job of that type that says the canary wherever its client may say anything."""
    job = copy.deepcopy(JOBS[job_type]["value"])
    job.pop("model", None)
    if job_type is JobType.TRITON:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [CANARY]}
        return {"type": "triton", "params": {"model_name": "m", "inputs": [tensor]}}
    return {**job, "params": marked(job["params"])}


@pytest.fixture
def servers(valkey: Valkey, database_url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """API, control, a worker of every type and Flower as processes, whose output is in *.log; the environment."""
    valkey.client().execute_command("ACL", "SETUSER", "miner", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    at = f"redis://miner:{PASSWORD}@127.0.0.1:{valkey.port}"
    environ = {
        **os.environ,
        **ECHO,
        "GPU_BROKER_URL": f"{at}/0",
        "GPU_STORE_URL": f"{at}/1",
        "DATABASE_URL": database_url,
        "PORT": str(free_port()),
        "FLOWER_PORT": str(free_port()),
        "CONTROL_METRICS_PORT": str(free_port()),
        "WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "WEBHOOK_ALLOW_HTTP": "1",
        "API_THREADS": "40",
        "BLOBS_URL": str(tmp_path / "blobs"),
        "FLOWER_UNAUTHENTICATED_API": "1",
        "PYTHONUNBUFFERED": "1",
    }
    celery = ["-m", "celery", "-A", "tasks"]
    commands = {
        "api": ["-m", "app.serve"],
        "control": ["-m", "app.control"],
        "worker": [*celery, "worker", "--loglevel", "DEBUG", "-Q", EVERY_TYPE],
        "flower": [*celery, "flower", "--address=127.0.0.1", f"--port={environ['FLOWER_PORT']}", "--logging=debug"],
    }
    started = []
    for name, command in commands.items():
        with (tmp_path / f"{name}.log").open("wb") as out:
            command = [sys.executable, *command]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT))
    yield environ
    for process in started:
        process.kill()
        process.wait()
    valkey.client().execute_command("ACL", "DELUSER", "miner")


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Where webhooks come to."""
    with receiving() as made:
        yield made


def test_prompts_answers_and_passwords_are_only_where_they_belong(
    servers: dict[str, str], receiver: Receiver, valkey: Valkey, tmp_path: Path
):
    names = ("PORT", "FLOWER_PORT", "CONTROL_METRICS_PORT")
    api, flower, control = (f"http://127.0.0.1:{servers[name]}" for name in names)
    with ValkeyRecord(valkey) as record:
        until(lambda: answers(f"{api}/health") and answers(f"{flower}/healthcheck"), UP_S)
        until(lambda: " serves " in (tmp_path / "worker.log").read_text(), UP_S)
        hook = requests.post(f"{api}/api/v1/webhooks", json={"url": receiver.url}, timeout=10)
        assert hook.status_code == 201, hook.text
        ended = {}
        for job_type in JobType:
            answer = requests.post(f"{api}/api/v1/jobs/sync?timeout=60", json=requests_of(job_type), timeout=90)
            assert answer.ok, answer.text
            ended[job_type] = answer.json()
        chat = requests_of(JobType.LLM)
        openai = {"model": "echo", "stream": True, "messages": chat["params"]["messages"]}
        streams = {
            path: requests.post(f"{api}{path}", json=body, timeout=90).text
            for path, body in (("/api/v1/jobs/stream", chat), ("/v1/chat/completions", openai))
        }
        bad = {**JOBS["llm"]["value"], "params": {"messages": [{"role": CANARY, "content": CANARY}], CANARY: 1}}
        asked = requests.post(f"{api}/api/v1/jobs", json=bad, headers={"X-Client-Region": CANARY}, timeout=10)
        broken = requests.post(f"{api}/api/v1/jobs", data=f'{{"{CANARY}"', timeout=10)
        failing = {"type": "llm", "params": {"messages": [{"role": "user", "content": f"sleep {CANARY}"}]}}
        failed = requests.post(f"{api}/api/v1/jobs/sync?timeout=60", json=failing, timeout=90).json()
        job_id = ended[JobType.LLM]["job_id"]
        # The last job's events have come.
        until(lambda: answers(f"{flower}/api/task/info/{failed['job_id']}"), UP_S)
        paths = ("api/tasks", "api/workers", "tasks", "workers", "broker", f"task/{job_id}", f"task/{failed['job_id']}")
        pages = {path: requests.get(f"{flower}/{path}", timeout=30).content for path in paths}
        metrics = {url: requests.get(f"{url}/metrics", timeout=10).content for url in (api, control)}
        until(lambda: len(receiver.got) == len(ended) + len(streams) + 1)

    # An engine that fails quotes what it choked on.
    assert (asked.status_code, broken.status_code, failed["error"]["code"]) == (422, 400, "engine_error")
    heard = bytes(record._said)
    broker = b"\n".join(line for line in heard.split(b"\r\n") if b" [0 " in line[:40])
    messages = b"\n".join(base64.b64decode(body) for body in _BODY.findall(broker))
    outputs = {
        **{path.name: path.read_bytes() for path in tmp_path.glob("*.log")},
        **{f"Flower's /{path}": page for path, page in pages.items()},
        **{f"the metrics of {url}": page for url, page in metrics.items()},
        **{f"webhook {number}": body for number, (_, body) in enumerate(receiver.got)},
        "the broker's commands": broker,
        "the broker's messages": messages,
    }
    leaks = [(name, word) for name, said in outputs.items() for word in (CANARY, PASSWORD) if word.encode() in said]
    assert leaks == []
    # It was there to be found, and it was looked for in the right places.
    assert CANARY in record
    assert CANARY in json.dumps(ended[JobType.LLM]["result"])
    assert {path: CANARY in text and "delta" in text for path, text in streams.items()} == dict.fromkeys(streams, True)
    assert all(job_id.encode() in said for said in (outputs["worker.log"], broker, messages, pages["api/tasks"]))
    assert all(b"gpu_" in page for page in metrics.values())
    assert any(job_id.encode() in body for _, body in receiver.got)
