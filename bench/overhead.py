"""What the platform adds to a bare Celery round trip: an engine that does nothing, on the same broker, in the same run.

    python -m bench.overhead [--seconds 6] [--rounds 3]

Each figure is measured on both sides in turn, round after round; the machine's speed drifts, so read the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import median

from bench.rig import Client, rig

CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 100}}
#: A region without workers: what is enqueued there only waits.
IDLE = {**CHAT, "region": "europe-west", "allow_cross_region": False}


def main() -> None:
    """Measure and print; with --side, be the client process of one side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(closed_loop(SIDES[options.side](options.port), options.clients, options.seconds), sys.stdout)
        return
    with rig() as made:
        made.start_platform(GPU_LLM_MODEL="echo")
        bare = [sys.executable, "-m", "celery", "-A", "bench.bare", "worker", "-l", "INFO", "-n", "bare@%h"]
        made.start("bare", *bare, ready=r"ready\.")

        def measure(side: str, clients: int, seconds: float) -> list[float]:
            command = [sys.executable, "-m", "bench.overhead", "--side", side, "--port", str(made.port)]
            command += ["--clients", str(clients), "--seconds", str(seconds)]
            ran = subprocess.run(command, env=made.environ, capture_output=True, check=True)
            waits: list[float] = json.loads(ran.stdout)
            return waits

        for side in SIDES:
            measure(side, 4, 1)
        print(f"{'':24}{'bare Celery':>30}{'platform':>30}   platform - bare, or platform / bare")
        for clients in (1, 16, 64):
            compare(f"sync, {clients} clients", measure, ("bare-sync", "sync"), clients, options)
        for clients in (1, 16):
            compare(f"enqueue, {clients} clients", measure, ("bare-enqueue", "enqueue"), clients, options)


def compare(
    name: str,
    measure: Callable[[str, int, float], list[float]],
    sides: tuple[str, str],
    clients: int,
    options: argparse.Namespace,
) -> None:
    """One row: both sides in turn, the median over the rounds of each round's figures."""
    figures: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            waits = sorted(measure(side, clients, options.seconds))
            p50, p99 = waits[len(waits) // 2] * 1000, waits[int(len(waits) * 0.99)] * 1000
            figures[side].append((p50, p99, len(waits) / options.seconds))
    bare, ours = (tuple(median(column) for column in zip(*figures[side], strict=True)) for side in sides)
    shown = "".join(f"{p50:8.2f} {p99:8.2f} ms {rate:7.0f}/s " for p50, p99, rate in (bare, ours))
    print(
        f"{name:24}{shown}  p50 {ours[0] - bare[0]:+.2f} ms, p99 {ours[1] - bare[1]:+.2f} ms, {ours[2] / bare[2]:.2f} x"
    )


def closed_loop(connect: Callable[[], Callable[[], object]], clients: int, seconds: float) -> list[float]:
    """The seconds of every call that `clients` threads made one after the other."""
    waits: list[float] = []
    end = time.perf_counter() + seconds

    def work() -> None:
        call = connect()
        while (began := time.perf_counter()) < end:
            call()
            waits.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waits


def bare_sync(_: int) -> Callable[[], Callable[[], object]]:
    """delay().get()."""
    from bench.bare import nothing

    return lambda: lambda: nothing.delay(CHAT["params"]).get(timeout=60)


def bare_enqueue(_: int) -> Callable[[], Callable[[], object]]:
    """delay() into a queue that nobody consumes, its result ignored."""
    from bench.bare import nothing

    return lambda: lambda: nothing.apply_async((CHAT["params"],), queue="bare-idle", ignore_result=True)


def http(path: str, body: object) -> Callable[[int], Callable[[], Callable[[], object]]]:
    """POST the body, one kept connection per client."""

    def side(port: int) -> Callable[[], Callable[[], object]]:
        def connect() -> Callable[[], object]:
            client = Client(port)
            return lambda: client.post(path, body)

        return connect

    return side


SIDES = {
    "bare-sync": bare_sync,
    "sync": http("/api/v1/jobs/sync?timeout=60", CHAT),
    "bare-enqueue": bare_enqueue,
    "enqueue": http("/api/v1/jobs", IDLE),
}

if __name__ == "__main__":
    main()
    # The threads of Celery's result consumer would keep a client process for seconds.
    sys.stdout.flush()
    os._exit(0)
