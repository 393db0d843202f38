"""The API on a real database and store, and a worker that a test moves by hand."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from waitress import wasyncore

from app import create_app, serve
from app.keys import Keys, Scope
from app.settings import Settings
from engines.catalogue import JobType
from tasks.fleet import Card
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import Ledger
from tasks.settings import load_regions
from tasks.store import open_store
from tests.rig import Platform, free_port

CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "你好"}]}}
RESULT = {
    "response": "你好！有什么我可以帮助你的吗？",
    "finish_reason": "stop",
    "model": "echo",
    "usage": {"prompt_tokens": 10, "completion_tokens": 15, "total_tokens": 25},
}
REGION = "asia-east"
QUEUE = f"{REGION}.llm"


class HandWorker:
    """A worker without an engine: it begins and finishes what a test says, through the real ledger."""

    id = "worker-123"

    def __init__(self, store_url: str) -> None:
        self.store = open_store(store_url, timeout_s=2)
        self.ledger = Ledger(self.store)
        self._tickets: dict[str, str] = {}

    def show(self, model: str = "echo") -> None:
        """Be alive for one lease, as a worker of that language model."""
        card = Card(self.id, self.id, REGION, "host", "cpu", {JobType.LLM: model}, {JobType.LLM: 2}, time.time())
        self.ledger.presence.beat(self.id, card.encode(), [])

    def begin(self, job_id: str) -> Mapping[str, Any]:
        """Begin the job's first attempt; its params."""
        claim = self.ledger.begin(Job(job_id, JobType.LLM, 1), worker_id=self.id, token=job_id)
        self._tickets[job_id] = claim.ticket
        return claim.params

    def finish(self, job_id: str, outcome: JobState = JobState.COMPLETED, error: JobError | None = None) -> bool:
        """Hand in an outcome for the job."""
        result = RESULT if outcome is JobState.COMPLETED else None
        return self.ledger.finish(self.envelope(job_id, outcome, result, error), queue=QUEUE)

    def envelope(
        self,
        job_id: str,
        outcome: JobState = JobState.COMPLETED,
        result: Mapping[str, Any] | None = None,
        error: JobError | None = None,
    ) -> Envelope:
        """An outcome of a job that it has begun."""
        ticket = self._tickets.get(job_id, "")
        return Envelope(job_id, 1, self.id, REGION, outcome, run_s=0.5, result=result, error=error, ticket=ticket)

    def waiting(self) -> list[str]:
        """Ids of the queued jobs, next first."""
        return list(self.store.zrange(f"wait:{QUEUE}", 0, -1))  # type: ignore[arg-type]

    def next_job(self, timeout_s: float = 5) -> str:
        """The id of the next queued job, waited for."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if ids := self.waiting():
                return ids[0]
            time.sleep(0.005)
        raise TimeoutError("no job was queued")

    def answer_next(self, outcome: JobState = JobState.COMPLETED, error: JobError | None = None) -> threading.Thread:
        """Begin and finish the next queued job, from a thread."""

        def work() -> None:
            job_id = self.next_job()
            self.begin(job_id)
            self.finish(job_id, outcome, error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread


@contextmanager
def listening(app: Flask) -> Iterator[str]:
    """Where waitress serves the app meanwhile, at the port of its settings, as `python -m app.serve` does: its URL."""
    settings: Settings = app.extensions["settings"]
    server = serve._open(app, settings)
    closed = threading.Event()

    def loop() -> None:
        while not closed.is_set():
            wasyncore.loop(timeout=0.1, map=server._map, use_poll=True, count=1)
        server.task_dispatcher.shutdown(timeout=2)
        wasyncore.close_all(server._map)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{settings.port}"
    finally:
        app.extensions["streams"].stopping.set()
        closed.set()
        thread.join()


@contextmanager
def api_of(platform: Platform) -> Iterator[str]:
    """An API of the platform's, in this process: its URL."""
    url, regions = platform.database_url, load_regions(platform.environ)
    app = create_app(Settings(url, str(platform.folder / "blobs"), regions, "asia-east", port=free_port(), threads=8))
    try:
        with listening(app) as url:
            yield url
    finally:
        app.extensions["dispatch"].close()


@pytest.fixture
def settings(database_url: str, valkey: Any, store_url: str, tmp_path: Path) -> Settings:
    """The seed's four regions on the test's store, with few threads."""
    regions = load_regions({"GPU_STORE_URL": store_url, "GPU_BROKER_URL": f"{valkey.url}/0"})
    return Settings(database_url, str(tmp_path / "blobs"), regions, REGION, threads=8)


@pytest.fixture
def make_app() -> Iterator[Callable[[Settings], Flask]]:
    """Makes apps that are closed after the test."""
    made: list[Flask] = []

    def make(settings: Settings) -> Flask:
        app = create_app(settings)
        made.append(app)
        return app

    yield make
    for app in made:
        app.extensions["dispatch"].close()
        app.extensions["database"].dispose()


@pytest.fixture
def app(make_app: Callable[[Settings], Flask], settings: Settings) -> Flask:
    """The API."""
    return make_app(settings)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """A client on the API's own host."""
    return app.test_client()


@pytest.fixture
def worker(store_url: str) -> HandWorker:
    """A worker that the test moves."""
    return HandWorker(store_url)


@pytest.fixture
def make_key(app: Flask) -> Callable[..., dict[str, str]]:
    """Makes keys; the headers to send one."""
    keys: Keys = app.extensions["keys"]

    def make(*scopes: str, **kwargs: Any) -> dict[str, str]:
        return {"X-API-Key": keys.create("test", map(Scope, scopes), **kwargs)}

    return make
