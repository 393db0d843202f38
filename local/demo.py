"""`python -m local.demo`: start the platform, send a job of each type and an asynchronous one through it, stop it.

Runs on data of its own that is thrown away by the next demo, and talks to no server but those it starts.
"""

import base64
import operator
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv

from app.client import GPUInferenceClient, Job
from local import platform
from local.platform import CannotStart
from local.ports import PortTaken
from local.processes import ProcessEnded, Processes
from local.settings import LOOPBACK, Settings, load
from tasks.job import LIVE
from tasks.settings import SettingsError

QUESTION = "What is the capital of France?"
TASK = "Write two sentences about the sea."
PROMPT = "a red circle on a blue background"
ABOUT_PICTURE = ("What shape is it?", "图片里有什么？")
SPEECH = Path(__file__).parent / "speech.ogg"
SENTENCES = ("A cat sleeps on the sofa.", "A kitten naps on the couch.", "Stock prices fell on Monday.")
#: How long one job may take, in seconds.
JOB_LIMIT_S = 120
ASK_EVERY_S = 0.02

#: Settings that would lead the demo to servers and data that are not its own.
_ELSEWHERE = ("DATABASE_URL", "GPU_BROKER_URL", "GPU_STORE_URL", "REGIONS", "DEFAULT_REGION", "GPU_REGION")


class DemoFailed(Exception):
    """A job of the demo did not complete."""


def at_home(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what leads elsewhere; empty, so that .env does not fill it in again."""
    return {
        **environ,
        **dict.fromkeys(_ELSEWHERE, ""),
        # This host's model servers are left alone; the admin API shows its GPUs.
        **dict.fromkeys((name for name in environ if name.startswith("GPU_ADMIN_") and name != "GPU_ADMIN_PORT"), ""),
        "GPU_CONFIG": os.devnull,
        "GPU_ADMIN_CONFIG": os.devnull,
        "GPU_ADMIN_HOST": LOOPBACK,
        "HOST": LOOPBACK,
    }


def show(settings: Settings, processes: Processes, picture: Path) -> None:
    """Send the jobs and print what came of them. Raises DemoFailed, and ProcessEnded if a process ended under them."""
    client = GPUInferenceClient(settings.api_url)
    client.session.trust_env = False  # a proxy of the environment cannot reach our loopback
    for send in (chat, follow, partial(draw, picture=picture), partial(look, picture=picture), listen, compare):
        print()
        try:
            send(client)
        except (OSError, DemoFailed) as error:  # requests' errors are OSErrors
            if ended := processes.ended():
                raise ProcessEnded(ended.obituary()) from error
            raise DemoFailed(f"The demo's job did not complete: {error}") from error


def chat(client: GPUInferenceClient) -> None:
    """One job that is waited for."""
    print("llm: POST /api/v1/jobs/sync")
    job = _ask(client, "llm", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 0})
    _print_answer(QUESTION, job)


def follow(client: GPUInferenceClient) -> None:
    """One job that is sent, and asked after until it has ended."""
    print("llm: POST /api/v1/jobs, then GET until it has ended")
    print(f"  question  {TASK}")
    params = {"messages": [{"role": "user", "content": TASK}], "max_tokens": 64, "temperature": 0}
    began = time.monotonic()
    job = client.submit("llm", params)
    print(f"  job       {job['job_id']}")
    seen = None
    while True:
        stands = (job["status"], job.get("queue_position"), (job.get("progress") or {}).get("done"))
        elapsed = time.monotonic() - began
        if stands != seen:
            place = f", position {stands[1]}" if stands[1] is not None else ""
            tokens = f", {stands[2]} tokens" if stands[2] else ""
            print(f"  {elapsed:7.2f} s {stands[0]}{place}{tokens}", flush=True)
            seen = stands
        if job["status"] not in LIVE:
            break
        if elapsed > JOB_LIMIT_S:
            raise DemoFailed(f"it is still {job['status']} after {JOB_LIMIT_S} s")
        time.sleep(ASK_EVERY_S)
        job = client.get(job["job_id"])
    _print_answer(None, _completed(job))


def draw(client: GPUInferenceClient, picture: Path) -> None:
    """A picture from a text, written to a file."""
    print("image_gen: a small model of our own, which knows one coloured shape on a plain ground (shapes/)")
    print(f"  prompt    {PROMPT}")
    params = {"prompt": PROMPT, "width": 256, "height": 256, "seed": 1}
    result = _ask(client, "image_gen", params)["result"]
    picture.write_bytes(base64.b64decode(result["image_base64"]))
    print(f"  picture   {result['width']} x {result['height']}, {result['steps']} steps, seed {result['seed']}")
    print(f"  file      {picture}")


def look(client: GPUInferenceClient, picture: Path) -> None:
    """What that picture shows, asked in two languages."""
    print("vision: the same picture, and a second small model of our own")
    image = base64.b64encode(picture.read_bytes()).decode()
    for question in ABOUT_PICTURE:
        _print_answer(
            question, _ask(client, "vision", {"image_base64": image, "task": "image_qa", "question": question})
        )


def listen(client: GPUInferenceClient) -> None:
    """What is said in a clip."""
    print(f"whisper: {SPEECH.name}, read by a speech synthesiser")
    result = _ask(client, "whisper", {"audio_base64": base64.b64encode(SPEECH.read_bytes()).decode()})["result"]
    print(f"  heard     {result['text'].strip()}")
    print(f"  language  {result['language']}, {result['duration']:.1f} s of sound")


def compare(client: GPUInferenceClient) -> None:
    """How near sentences are to the first one: the cosine of their vectors, which have length 1."""
    print("embedding: how near each sentence is to the first")
    result = _ask(client, "embedding", {"input": list(SENTENCES)})["result"]
    first = result["embeddings"][0]
    for sentence, vector in zip(SENTENCES, result["embeddings"], strict=True):
        print(f"  {sum(map(operator.mul, first, vector)):7.2f}   {sentence}")


def _ask(client: GPUInferenceClient, job_type: str, params: Mapping[str, Any]) -> Job:
    began = time.monotonic()
    job = _completed(client.run(job_type, params, timeout=JOB_LIMIT_S))
    print(f"  model     {job['result']['model']} on {job['worker_id']}, {time.monotonic() - began:.2f} s")
    return job


def _completed(job: Job) -> Job:
    if job["status"] != "completed":
        raise DemoFailed(f"it is {job['status']}: {job.get('error')}")
    return job


def _print_answer(question: str | None, job: Job) -> None:
    result = job["result"]
    if question is not None:
        print(f"  question  {question}")
    print(f"  answer    {result['response']}")
    print(f"  tokens    {result['usage']['prompt_tokens']} in, {result['usage']['completion_tokens']} out")


def main() -> None:
    """Exit code 0 only if every job was completed."""
    load_dotenv(find_dotenv(usecwd=True))
    platform.interrupt_on_signals()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {line}", flush=True)

    try:
        environ = at_home(os.environ)
        usual = load(environ)
        environ["GPU_DATA_DIR"] = str(usual.data_dir / "demo")
        settings = load(environ)
        usual.log_dir.mkdir(parents=True, exist_ok=True)
        log_file = usual.log_dir / "demo.log"
        with log_file.open("w") as log:

            def hear(name: str, line: str) -> None:
                print(f"{name:8} | {line}", file=log, flush=True)

            with platform.running(settings, environ, say, hear, fresh=True) as processes:
                print(f"\nAPI        {settings.api_url}/api/v1/jobs")
                print(f"console    {settings.api_url}/console")
                print(f"docs       {settings.api_url}/docs")
                print(f"Flower     {settings.flower_url}")
                print(f"gpu_admin  {settings.gpu_admin_url}/docs")
                show(settings, processes, usual.data_dir / "demo.png")
                print(flush=True)
        print("All jobs were completed. `make up` starts the same and stays up.")
    except KeyboardInterrupt:
        sys.exit(130)
    except (SettingsError, PortTaken) as error:
        sys.exit(str(error))
    except (CannotStart, ProcessEnded, DemoFailed) as error:
        sys.exit(f"\n{error}\nThe processes' whole log is {log_file}")


if __name__ == "__main__":
    main()
