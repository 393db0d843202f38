"""Load: deep queues, blocked and slow clients, a large table. What must hold is checked, and a failure is exit code 1.

    python -m bench.load [--parts queue,sync,slow,rows] [--queued 10000] [--cancels 500] [--waiters 1000] [--slow 300]
                         [--rows 100000] [--threads 1100]

queue  jobs of mixed priorities, some cancelled, are drained by one echo worker in order, none twice
sync   clients blocked in POST /jobs/sync, while others ask for /health and for a job
slow   clients that send their headers, or their body, byte by byte, while others ask
rows   lists, filters, pages and statistics with 100 and with many rows
"""

import argparse
import itertools
import json
import random
import re
import resource
import selectors
import socket
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from sqlalchemy import Double, bindparam, insert

from app.serve import CHANNEL_TIMEOUT_S, CONNECTION_LIMIT
from app.settings import THREADS
from app.tables import jobs, now, open_database
from bench.depth import timed
from bench.rig import Client, Rig, rig
from engines.catalogue import JobType
from tasks.job import JobState

#: Of no worker until one is started.
IDLE = "europe-west"
SEED = 6
CLIENTS = 8
PROBE_EVERY_S = 0.02
#: For so long others ask while clients are blocked or slow.
PROBED_S = 10.0
#: What /health and GET must keep to.
ANSWER_P99_S = 1.0

_DONE = re.compile(r"job (\S+) attempt \d+: completed after")

failures: list[str] = []


def main() -> None:
    """Run the parts and print their figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="queue,sync,slow,rows")
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--cancels", type=int, default=500)
    parser.add_argument("--waiters", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=300)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(
        f"waitress: {options.threads} threads, {CONNECTION_LIMIT} connections, "
        f"silent ones closed after {CHANNEL_TIMEOUT_S} s; SQLite; one Valkey"
    )
    for part in options.parts.split(","):
        with rig() as made:
            made.environ["API_THREADS"] = str(options.threads)
            made.start_platform(GPU_LLM_MODEL="echo")
            PARTS[part](made, options)
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(bool(failures))


def check(holds: bool, what: str) -> None:
    """Note what does not hold."""
    if not holds:
        failures.append(what)


def chat(text: str, priority: int = 0) -> dict[str, object]:
    """A job that waits in the idle region."""
    params = {"messages": [{"role": "user", "content": text}], "max_tokens": 10}
    return {"type": "llm", "params": params, "priority": priority, "region": IDLE, "allow_cross_region": False}


def start_worker(made: Rig) -> None:
    """One that serves the idle region, a job at a time so that its log tells the order."""
    celery = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", f"{IDLE}.llm", "-n", "idle@%h"]
    celery += ["--loglevel", "INFO"]
    made.start("idle", *celery, ready="serves", GPU_LLM_MODEL="echo", GPU_MAX_CONCURRENT_JOBS="1")


# Deep queues


def queue(made: Rig, options: argparse.Namespace) -> None:
    """Submit from several clients, cancel some, start a worker, and look at what it ran."""
    sent: list[list[tuple[str, int]]] = [[] for _ in range(CLIENTS)]

    def submit(number: int) -> None:
        client, chance = Client(made.port), random.Random(SEED + number)
        for index in range(options.queued // CLIENTS):
            priority = chance.randint(0, 9)
            answer = client.post("/api/v1/jobs", chat(f"{number} {index}", priority))
            sent[number].append((str(answer["job_id"]), priority))

    began = time.monotonic()
    in_threads(submit, CLIENTS)
    took_s = time.monotonic() - began
    everything = [job for of_client in sent for job in of_client]
    print(f"{'submitted':28}{len(everything):7} jobs, {len(everything) / took_s:.0f}/s, {CLIENTS} clients")

    client = Client(made.port)
    cancelled = {job_id for job_id, _ in random.Random(SEED).sample(everything, options.cancels)}
    began = time.monotonic()
    for job_id in cancelled:
        check(client.request("DELETE", f"/api/v1/jobs/{job_id}")[0] == 200, f"cancel of {job_id}")
    print(f"{'cancelled':28}{len(cancelled):7} jobs, {len(cancelled) / (time.monotonic() - began):.0f}/s, 1 client")
    left = [(job_id, priority) for job_id, priority in everything if job_id not in cancelled]
    check_positions(client, left)

    began = time.monotonic()
    start_worker(made)
    log = made.folder / "idle.log"
    while len(_DONE.findall(log.read_text())) < len(left) and time.monotonic() - began < 60 + len(left) / 20:
        time.sleep(0.5)
    took_s = time.monotonic() - began
    # A job that is run twice is so late.
    time.sleep(2)
    ran = _DONE.findall(log.read_text())
    times = Counter(ran)
    print(f"{'drained, worker start too':28}{len(times):7} jobs, {len(times) / took_s:.0f}/s, one at a time")
    doubled = [job_id for job_id, count in times.items() if count > 1]
    check(times.keys() == {job_id for job_id, _ in left}, "other jobs ran than were left")
    check(not doubled, f"{len(doubled)} jobs ran twice")
    urgency = dict(left)
    order = [urgency[job_id] for job_id in dict.fromkeys(ran) if job_id in urgency]
    inverted = sum(later > earlier for earlier, later in itertools.pairwise(order))
    place = {job_id: index for index, job_id in enumerate(dict.fromkeys(ran))}
    overtaken = 0
    for of_client in sent:
        by_priority: dict[int, list[int]] = defaultdict(list)
        for job_id, priority in of_client:
            if job_id in place:
                by_priority[priority].append(place[job_id])
        overtaken += sum(a > b for places in by_priority.values() for a, b in itertools.pairwise(places))
    print(f"{'order':28}{inverted:7} before a more urgent one, {overtaken} before an earlier equal, 0 wanted")
    check(not inverted and not overtaken, "the order of the queue")
    print(f"{'run twice':28}{len(doubled):7}")


def check_positions(client: Client, left: Sequence[tuple[str, int]]) -> None:
    """A job's position lies between the jobs of higher priority and those of at least its own."""
    counts = Counter(priority for _, priority in left)
    for job_id, priority in random.Random(SEED).sample(left, min(len(left), 50)):
        position = json.loads(client.request("GET", f"/api/v1/jobs/{job_id}")[1])["queue_position"]
        above = sum(count for other, count in counts.items() if other > priority)
        check(above < position <= above + counts[priority], f"position {position} of a job of priority {priority}")


# Blocked and slow clients


def sync(made: Rig, options: argparse.Namespace) -> None:
    """Block clients, ask beside them, then let a worker answer them all."""
    body = json.dumps(chat("blocked")).encode()
    request = _head("POST", "/api/v1/jobs/sync?timeout=300", len(body)) + body
    with opened(made.port, options.waiters) as sockets:
        began = time.monotonic()
        for one in sockets:
            one.sendall(request)
        client = Client(made.port)
        waiting = 0
        while waiting < options.waiters and time.monotonic() - began < 60:
            waiting = json.loads(client.request("GET", "/api/v1/jobs/stats/queue")[1])["total_queued"]
        print(f"{'blocked in sync':28}{waiting:7} clients after {time.monotonic() - began:.1f} s")
        check(waiting == options.waiters, f"{waiting} of {options.waiters} clients are waited for")
        probe(made, "beside them")
        began = time.monotonic()
        start_worker(made)
        codes = Counter(statuses(sockets, 120))
        others = {code: count for code, count in codes.items() if code != 200}
        print(f"{'answered':28}{codes[200]:7} with 200 after {time.monotonic() - began:.1f} s; others: {others}")
        check(codes[200] == options.waiters, f"sync answers: {dict(codes)}")


def slow(made: Rig, options: argparse.Namespace) -> None:
    """Headers and bodies that come byte by byte, and others who ask meanwhile."""
    stop = threading.Event()
    with opened(made.port, options.slow) as headers, opened(made.port, options.slow) as bodies:
        for one in headers:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ")
        for one in bodies:
            one.sendall(_head("POST", "/api/v1/jobs", 100_000))

        def trickle(_: int) -> None:
            while not stop.wait(1.0):
                for one in (*headers, *bodies):
                    try:
                        one.send(b"a")
                    except OSError:
                        continue

        thread = threading.Thread(target=trickle, args=(0,))
        thread.start()
        print(f"{'slow clients':28}{len(headers):7} in their headers, {len(bodies)} in their body")
        probe(made, "beside them")
        stop.set()
        thread.join()


def probe(made: Rig, name: str) -> None:
    """Ask for /health, a job, the list, and submit, for a while; the 50th and 99th percentile of each."""
    client = Client(made.port)
    job = client.post("/api/v1/jobs", {**chat("probe"), "priority": 0})["job_id"]
    waits: dict[str, list[float]] = defaultdict(list)
    lock = threading.Lock()
    end = time.monotonic() + PROBED_S

    def ask(number: int) -> None:
        what, path = (("/health", "/health"), ("GET job", f"/api/v1/jobs/{job}"))[number]
        own = Client(made.port)
        while time.monotonic() < end:
            began = time.perf_counter()
            status, _ = own.request("GET", path)
            took = time.perf_counter() - began
            check(status == 200, f"{path}: {status}")
            with lock:
                waits[what].append(took)
            time.sleep(PROBE_EVERY_S)

    in_threads(ask, 2)
    client.request("DELETE", f"/api/v1/jobs/{job}")
    for what, seconds in waits.items():
        ordered = sorted(seconds)
        p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
        label = f"{what}, {name}"
        print(f"{label:28}{p50 * 1000:10.1f} ms p50 {p99 * 1000:8.1f} ms p99 {ordered[-1] * 1000:8.1f} ms max")
        check(p99 < ANSWER_P99_S, f"{what} {name}: p99 {p99:.2f} s")


@contextmanager
def opened(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many connections to the API."""
    sockets = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(count)]
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


def statuses(sockets: Sequence[socket.socket], seconds: float) -> list[int]:
    """The status of each answer; 0 for none in time."""
    found = dict.fromkeys(sockets, 0)
    selector = selectors.DefaultSelector()
    for one in sockets:
        selector.register(one, selectors.EVENT_READ)
    end = time.monotonic() + seconds
    while selector.get_map() and time.monotonic() < end:
        for key, _ in selector.select(1.0):
            one = key.fileobj
            assert isinstance(one, socket.socket)
            words = one.recv(65536).split(b" ", 2)
            found[one] = int(words[1]) if len(words) > 1 else 0
            selector.unregister(one)
    return list(found.values())


def _head(method: str, path: str, length: int) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


# A large table


def rows(made: Rig, options: argparse.Namespace) -> None:
    """The same calls with few and with many rows, one client."""
    insert_rows(made, 100)
    measure(made)
    few = measure(made)
    insert_rows(made, options.rows)
    many = measure(made)
    print(f"{'':28}{'100 rows':>14}{f'{options.rows} rows':>18}    ratio (p50 of 100 calls)")
    for name in few:
        print(f"{name:28}{few[name]:11.2f} ms{many[name]:15.2f} ms {many[name] / few[name]:8.2f}")
        check(many[name] < max(10 * few[name], 50), f"{name} with {options.rows} rows: {many[name]:.0f} ms")


def insert_rows(made: Rig, count: int) -> None:
    """Ended jobs of one owner over 30 days: nearly all completed, some failed, few cancelled; all in two regions."""
    chance = random.Random(SEED + count)
    common = [JobState.COMPLETED] * 97 + [JobState.FAILED] * 3
    values = [
        {
            "id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            "owner": "local",
            "type": str(chance.choice((JobType.LLM, JobType.EMBEDDING, JobType.VISION))),
            "params": json.dumps({"messages": [{"role": "user", "content": "x" * 500}]}),
            "result": json.dumps({"response": "y" * 500}),
            "priority": chance.randint(0, 9),
            "region": chance.choice(("asia-east", "asia-south")),
            "allow_cross_region": True,
            "timeout_seconds": 300,
            # The few are the oldest, where a list has to look last.
            "status": str(JobState.CANCELLED if index < 10 else chance.choice(common)),
            "attempt": 1,
            "version": 3,
            "sends": 1,
            "withdrawn": False,
            "age": 30 * 86400 * (1 - index / count),
        }
        for index in range(count)
    ]
    made_at = now() - bindparam("age", type_=Double)
    statement = insert(jobs).values(created_at=made_at, started_at=made_at, completed_at=made_at)
    engine = open_database(made.environ["DATABASE_URL"], durable=False)
    with engine.connect() as connection:
        for start in range(0, count, 5000):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.execute(statement, values[start : start + 5000])
            connection.exec_driver_sql("COMMIT")
    engine.dispose()


def measure(made: Rig) -> dict[str, float]:
    """Median milliseconds of each call."""
    client = Client(made.port)

    def get(path: str) -> Callable[[], None]:
        def call() -> None:
            status, answer = client.request("GET", f"/api/v1/jobs{path}")
            assert status == 200, answer

        return call

    def deep_cursor() -> str:
        cursor, pages = "", 0
        while pages < 50:
            answer = json.loads(client.request("GET", f"/api/v1/jobs?limit=100{cursor}")[1])
            if not answer["next_cursor"]:
                break
            cursor, pages = f"&cursor={quote(answer['next_cursor'])}", pages + 1
        return cursor

    calls = {
        "list": "",
        "list, status completed": "?status=completed",
        "list, status failed": "?status=failed",
        "list, status cancelled": "?status=cancelled",
        "list, status queued": "?status=queued",
        "list, type image_gen": "?type=image_gen",
        "list, region, type": "?region=asia-south&type=vision",
        "list, region without jobs": "?region=america-north",
        "list, created after": f"?created_after={quote('2020-01-01T00:00:00Z')}",
        "list, page 50": f"?limit=50{deep_cursor()}",
        "statistics": "/stats/queue",
    }
    return {name: timed(get(path), 100) for name, path in calls.items()}


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run work(0), work(1), ... at the same time, to the end."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


PARTS: dict[str, Callable[[Rig, argparse.Namespace], None]] = {"queue": queue, "sync": sync, "slow": slow, "rows": rows}

if __name__ == "__main__":
    main()
