"""A worker inside this process: it begins whatever waits in a store, and the echo engine answers it."""

import random
import threading
import time

from engines import echo
from engines.catalogue import JobType, find
from engines.contract import Device
from tasks import routing
from tasks.fleet import Card
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import Ledger
from tasks.presence import BEAT_S
from tasks.records import Answer
from tasks.store import open_store

ID = "fuzz-worker"
REGION = "asia-east"
#: How often it looks for new jobs.
LOOK_S = 0.005
#: One job of so many fails, so that this is shown too.
FAILS_EVERY = 16


class EchoWorker:
    """Runs the jobs of every region, type and model, one at a time, in a thread."""

    def __init__(self, store_url: str, seed: int) -> None:
        """seed: chooses the jobs that fail."""
        self._ledger = Ledger(open_store(store_url, timeout_s=5))
        self._engines = {job_type: echo.Engine(find(job_type, "echo"), Device("cpu")) for job_type in JobType}
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._beat()
        self._thread.start()

    def close(self) -> None:
        """Take no more jobs."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        beaten = time.monotonic()
        while not self._stop.wait(LOOK_S):
            if time.monotonic() - beaten > BEAT_S:
                self._beat()
                beaten = time.monotonic()
            for queue, queued in self._ledger.queues().items():
                if queued.depth:
                    for job_id in self._ledger.store.zrange(f"wait:{queue}", 0, -1):
                        self._run(job_id, queue)

    def _run(self, job_id: str, queue: str) -> None:
        region, job_type = routing.split_queue(queue)
        record = self._ledger.look(job_id)
        if record is None:
            return
        claim = self._ledger.begin(Job(job_id, job_type, record.attempt), worker_id=ID, token=job_id)
        if claim.answer is not Answer.RUN:
            return
        result, error = None, None
        if self._random.randrange(FAILS_EVERY):
            result = self._engines[job_type].run(claim.params, lambda event: None)
        else:
            error = JobError("engine_error", "It was to fail.")
        state = JobState.FAILED if error else JobState.COMPLETED
        said = Envelope(job_id, record.attempt, ID, region, state, 0.001, result, error, ticket=claim.ticket)
        self._ledger.finish(said, queue=queue)

    def _beat(self) -> None:
        models = dict.fromkeys(JobType, "echo")
        slots = dict.fromkeys(JobType, 4)
        card = Card(ID, ID, REGION, "host", "cpu", models, slots, time.time(), direct_url="http://127.0.0.1:9")
        self._ledger.presence.beat(ID, card.encode(), [])
