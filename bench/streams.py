"""What token streams cost: an engine's thread and the processors per token, and how soon the first one arrives.

    python -m bench.streams [--streams 16] [--rate 30] [--seconds 5] [--calls 50]

The worker's side runs in this process, on a store of its own; the first token travels through the whole platform, whose
echo engine answers at once, so what is left is the way.
"""

import argparse
import json
import threading
import time
import uuid
from http.client import HTTPConnection
from statistics import median
from typing import cast

from bench.rig import Client, Rig, rig
from engines.catalogue import JobType
from engines.contract import Text
from tasks.job import Job
from tasks.ledger import Ledger
from tasks.store import open_store
from tasks.stream import Feed, Teller

WORKER = "bench"
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens per second of each stream")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--calls", type=int, default=50)
    options = parser.parse_args()
    with rig() as made:
        made.start_platform(GPU_LLM_MODEL="echo")
        ledger = Ledger(open_store(made.environ["GPU_STORE_URL"], timeout_s=5))
        tokens = int(options.streams * options.rate * options.seconds)
        bare = talk(ledger, options, written=False)
        written = talk(ledger, options, written=True)
        print(
            f"{options.streams} streams of {options.rate:g} tokens/s for {options.seconds:g} s, microseconds per token"
        )
        print(f"{'':24}{'not written':>14}{'written':>14}")
        for name in bare:
            print(f"{name:24}{1e6 * bare[name] / tokens:14.1f}{1e6 * written[name] / tokens:14.1f}")
        travel(made, 10)
        first, whole, sync = travel(made, options.calls)
        print(
            f"through the platform, p50 of {options.calls}: first token {first:.1f} ms, whole stream {whole:.1f} ms, "
        )
        print(f"the same job by /jobs/sync {sync:.1f} ms")


def talk(ledger: Ledger, options: argparse.Namespace, *, written: bool) -> dict[str, float]:
    """Seconds in say(), of this process's processors and of the store's, while all streams talk."""
    teller = Teller(ledger, WORKER)
    feeds = []
    for _ in range(options.streams):
        job = Job(str(uuid.uuid4()), JobType.LLM, 1)
        ledger.put(job, queue="europe-west.llm", priority=0, params="{}", timeout_s=600)
        ledger.begin(job, worker_id=WORKER, token=job.id)
        feeds.append(Feed(teller, job))
        if written:
            teller.open(feeds[-1])
    teller.start()
    said_s = 0.0
    # As an engine does it: one step gives a token to each stream.
    steps, pause = int(options.rate * options.seconds), threading.Event()
    own, store = time.process_time(), _store_cpu_s(ledger)
    for _ in range(steps):
        began = time.perf_counter()
        for feed in feeds:
            feed.say(Text(" token"))
        said_s += time.perf_counter() - began
        pause.wait(1 / options.rate)
    found = {
        "in the engine's thread": said_s,
        "worker's processor": time.process_time() - own,
        "store's processor": _store_cpu_s(ledger) - store,
    }
    teller.stop()
    return found


def travel(made: Rig, calls: int) -> tuple[float, float, float]:
    """Milliseconds, medians: to the first token of POST /jobs/stream, to its end, and of POST /jobs/sync."""
    firsts, wholes, syncs = [], [], []
    client = Client(made.port)
    body = json.dumps(CHAT).encode()
    for _ in range(calls):
        began = time.perf_counter()
        connection = HTTPConnection("127.0.0.1", made.port, timeout=60)
        connection.request("POST", "/api/v1/jobs/stream", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while b"event: token" not in answer.readline():
            pass
        firsts.append(time.perf_counter() - began)
        answer.read()
        wholes.append(time.perf_counter() - began)
        connection.close()
        began = time.perf_counter()
        client.post("/api/v1/jobs/sync", CHAT)
        syncs.append(time.perf_counter() - began)
    return 1e3 * median(firsts), 1e3 * median(wholes), 1e3 * median(syncs)


def _store_cpu_s(ledger: Ledger) -> float:
    used = cast(dict[str, float], ledger.store.info("cpu"))
    return used["used_cpu_user"] + used["used_cpu_sys"]


if __name__ == "__main__":
    main()
