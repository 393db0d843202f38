"""`python -m local.demo`: start the platform, send one chat job and one asynchronous job through it, stop it.

Runs on data of its own that is thrown away by the next demo, and talks to no server but those it starts.
"""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from dotenv import find_dotenv, load_dotenv

from app.client import GPUInferenceClient
from local import platform
from local.platform import CannotStart
from local.ports import PortTaken
from local.processes import ProcessEnded, Processes
from local.settings import LOOPBACK, Settings, load
from tasks.job import LIVE
from tasks.settings import SettingsError

QUESTION = "What is the capital of France?"
TASK = "Write two sentences about the sea."
#: How long one job may take, in seconds.
JOB_LIMIT_S = 120
ASK_EVERY_S = 0.02

#: Settings that would lead the demo to servers and data that are not its own.
_ELSEWHERE = ("DATABASE_URL", "GPU_BROKER_URL", "GPU_STORE_URL", "REGIONS", "DEFAULT_REGION", "GPU_REGION")


class DemoFailed(Exception):
    """A job of the demo did not complete."""


def at_home(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what leads elsewhere; empty, so that .env does not fill it in again."""
    return {**environ, **dict.fromkeys(_ELSEWHERE, ""), "HOST": LOOPBACK}


def show(settings: Settings, processes: Processes) -> None:
    """Send both jobs and print what came of them. Raises DemoFailed, and ProcessEnded if a process ended under them."""
    client = GPUInferenceClient(settings.api_url)
    client.session.trust_env = False  # a proxy of the environment cannot reach our loopback
    for send in (chat, follow):
        print()
        try:
            send(client)
        except (OSError, DemoFailed) as error:  # requests' errors are OSErrors
            if ended := processes.ended():
                raise ProcessEnded(ended.obituary()) from error
            raise DemoFailed(f"The demo's job did not complete: {error}") from error


def chat(client: GPUInferenceClient) -> None:
    """One job that is waited for."""
    print("POST /api/v1/jobs/sync")
    print(f"  question  {QUESTION}")
    began = time.monotonic()
    job = client.chat([{"role": "user", "content": QUESTION}], max_tokens=32, temperature=0, timeout=JOB_LIMIT_S)
    _print_completed(job, time.monotonic() - began)


def follow(client: GPUInferenceClient) -> None:
    """One job that is sent, and asked after until it has ended."""
    print("POST /api/v1/jobs")
    print(f"  question  {TASK}")
    params = {"messages": [{"role": "user", "content": TASK}], "max_tokens": 64, "temperature": 0}
    began = time.monotonic()
    job = client.submit("llm", params)
    print(f"  job       {job['job_id']}")
    seen = None
    while True:
        stands = (job["status"], job.get("queue_position"))
        elapsed = time.monotonic() - began
        if stands != seen:
            place = f", position {stands[1]}" if stands[1] is not None else ""
            print(f"  {elapsed:7.2f} s {stands[0]}{place}", flush=True)
            seen = stands
        if job["status"] not in LIVE:
            break
        if elapsed > JOB_LIMIT_S:
            raise DemoFailed(f"it is still {job['status']} after {JOB_LIMIT_S} s")
        time.sleep(ASK_EVERY_S)
        job = client.get(job["job_id"])
    _print_completed(job, time.monotonic() - began)


def _print_completed(job: Mapping[str, Any], seconds: float) -> None:
    if job["status"] != "completed":
        raise DemoFailed(f"it is {job['status']}: {job.get('error')}")
    result = job["result"]
    print(f"  answer    {result['response']}")
    print(f"  tokens    {result['usage']['prompt_tokens']} in, {result['usage']['completion_tokens']} out")
    print(f"  seconds   {seconds:.2f}")
    print(f"  region    {job['region']}")
    print(f"  worker    {job['worker_id']}")


def main() -> None:
    """Exit code 0 only if both jobs were completed."""
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
                print(f"\nAPI     {settings.api_url}/api/v1/jobs")
                print(f"docs    {settings.api_url}/docs")
                print(f"Flower  {settings.flower_url}")
                show(settings, processes)
                print(flush=True)
        print("Both jobs were completed. `make up` starts the same and stays up.")
    except KeyboardInterrupt:
        sys.exit(130)
    except (SettingsError, PortTaken) as error:
        sys.exit(str(error))
    except (CannotStart, ProcessEnded, DemoFailed) as error:
        sys.exit(f"\n{error}\nThe processes' whole log is {log_file}")


if __name__ == "__main__":
    main()
