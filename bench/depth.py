"""Submit, get and statistics with 10 and with 100,000 queued jobs: what they cost must not grow.

python -m bench.depth [--deep 100000] [--calls 300]
"""

import argparse
import json
import time
import uuid
from collections.abc import Callable
from statistics import median

from sqlalchemy import insert

from app.tables import jobs, now, open_database
from bench.rig import Client, Rig, rig
from engines.catalogue import JobType
from tasks import routing
from tasks.job import Job, JobState
from tasks.ledger import Ledger
from tasks.store import open_store

REGION = "europe-west"
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}}
BODY = json.dumps({**CHAT, "region": REGION, "allow_cross_region": False}).encode()


def main() -> None:
    """Measure both depths in one run, and print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shallow", type=int, default=10)
    parser.add_argument("--deep", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=300)
    options = parser.parse_args()
    with rig() as made:
        made.start_platform(GPU_LLM_MODEL="echo")
        fill(made, options.shallow)
        measure(made, options.calls)
        few = measure(made, options.calls)
        fill(made, options.deep)
        many = measure(made, options.calls)
    print(f"{'':12}{options.shallow:>10} queued{options.deep:>14} queued    ratio (p50 of {options.calls} calls)")
    for name in few:
        print(f"{name:12}{few[name]:14.2f} ms{many[name]:18.2f} ms {many[name] / few[name]:8.2f}")


def fill(made: Rig, count: int) -> None:
    """Queue so many jobs, as the API does, only many at a time."""
    ids = [str(uuid.uuid4()) for _ in range(count)]
    params = json.dumps(CHAT["params"])
    ledger = Ledger(open_store(made.environ["GPU_STORE_URL"], timeout_s=30))
    epoch = ledger.epoch()
    values = {
        "owner": "local",
        "type": str(JobType.LLM),
        "params": params,
        "priority": 0,
        "region": REGION,
        "allow_cross_region": False,
        "timeout_seconds": 300,
        "status": str(JobState.QUEUED),
        "attempt": 1,
        "version": 1,
        "sends": 1,
        "store_epoch": epoch,
        "withdrawn": False,
    }
    statement = insert(jobs).values(created_at=now(), sent_at=now())
    engine = open_database(made.environ["DATABASE_URL"], durable=False)
    with engine.connect() as connection:
        for start in range(0, count, 5000):
            rows = [{"id": job_id, **values} for job_id in ids[start : start + 5000]]
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.execute(statement, rows)
            connection.exec_driver_sql("COMMIT")
    queue = routing.queue_name(REGION, JobType.LLM)
    for job_id in ids:
        ledger.put(Job(job_id, JobType.LLM, 1), queue=queue, priority=0, params=params, timeout_s=300)


def measure(made: Rig, calls: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    client = Client(made.port)
    sent: list[str] = []

    def submit() -> None:
        status, answer = client.request("POST", "/api/v1/jobs", BODY)
        assert status == 202, answer
        sent.append(json.loads(answer)["job_id"])

    def get() -> None:
        assert client.request("GET", f"/api/v1/jobs/{sent[0]}")[0] == 200

    def count() -> None:
        assert client.request("GET", "/api/v1/jobs/stats/queue")[0] == 200

    def page() -> None:
        assert client.request("GET", "/api/v1/jobs?limit=50")[0] == 200

    return {
        name: timed(call, calls)
        for name, call in (("submit", submit), ("get", get), ("statistics", count), ("list", page))
    }


def timed(call: Callable[[], None], calls: int) -> float:
    """Median milliseconds."""
    waits = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        waits.append(time.perf_counter() - began)
    return median(waits) * 1000


if __name__ == "__main__":
    main()
