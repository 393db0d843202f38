"""One platform to be broken: two control processes, an API, workers with the echo engine, and their servers."""

import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.chaos.clients import Clients, Wish
from tests.chaos.parts import Database, Part, Run, Store, Supervisor, read_runs
from tests.faults.proxy import Proxy
from tests.rig import free_port, until
from tests.servers import Postgres, RabbitMq

REGION = "asia-east"
BACKENDS = ("embedded", "postgres", "rabbitmq")
#: On a machine that is busy with other things, too.
READY_S = 180
#: Jobs that a worker runs at once.
SLOTS = 4


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that was made, by the monotonic clock."""

    kind: str
    began: float
    #: When the broken part was whole again, or, if it is made up for by others, when it broke.
    over: float
    #: The worker process that was hit, if one was.
    pid: int | None = None
    #: Every run at that time may have to be repeated.
    spoils_runs: bool = False
    #: A job that was submitted as it began, and others whose end tells that it is over.
    probes: tuple[Wish, ...] = ()


@dataclass
class Scene:
    """Everything of one run."""

    backend: str
    folder: Path
    random: random.Random
    supervisor: Supervisor
    store: Store
    database: Database
    rabbitmq: RabbitMq | None
    #: From the API and control to the store, and from the workers to store and RabbitMQ.
    wires: list[Proxy]
    clients: Clients
    url: str
    strikes: list[Strike] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def runs(self) -> list[Run]:
        """Every run that any worker began until now."""
        return read_runs(self.folder)

    def one(self, prefix: str) -> Part:
        """Any part of a kind."""
        return self.random.choice(self.supervisor.named(prefix))

    def struck(self, strike: Strike) -> None:
        """Remember a fault."""
        with self._lock:
            self.strikes.append(strike)

    def caught(self, seconds: float) -> tuple[Part | None, Wish]:
        """A worker that runs a job of so many seconds now, and the job; None if nobody began it in time."""
        wish = self.clients.wish(Wish(f"sleep {seconds:g}", priority=9))
        end = time.monotonic() + 5
        while time.monotonic() < end:
            pids = [run.pid for run in self.runs() if run.job == wish.id and run.end is None]
            for part in self.supervisor.named("worker"):
                if part.pid in pids:
                    return part, wish
            time.sleep(0.05)
        return None, wish

    def answers(self) -> bool:
        """Whether the API does."""
        try:
            return requests.get(f"{self.url}/health", timeout=2).ok
        except requests.RequestException:
            return False


@contextmanager
def opened(backend: str, *, workers: int, seed: int, without: str | None = None) -> Iterator[Scene]:
    """A platform that serves. without: the guard to take out of it (guards.py).

    Skips, as pytest does, where PostgreSQL or RabbitMQ is not installed.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="gpu-chaos-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store = Store(folder / "store", redis_server=backend != "embedded")
        stack.callback(store.kill)
        store.start()
        database, rabbitmq = _database(backend, folder, stack), None
        near, far = (stack.enter_context(Proxy("127.0.0.1", store.port)) for _ in range(2))
        wires = [near, far]
        at_home = {"broker": f"redis://127.0.0.1:{near.port}/0", "store": f"redis://127.0.0.1:{near.port}/1"}
        at_worker = {"broker": f"redis://127.0.0.1:{far.port}/0", "store": f"redis://127.0.0.1:{far.port}/1"}
        if backend == "rabbitmq":
            rabbitmq = RabbitMq()
            stack.callback(rabbitmq.stop)
            rabbitmq.start()
            wires.append(stack.enter_context(Proxy("127.0.0.1", rabbitmq.port)))
            at_home["broker"] = rabbitmq.url
            at_worker["broker"] = f"amqp://guest:guest@127.0.0.1:{wires[-1].port}//"
        port = free_port()
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GPU_")},
            "GPU_CONFIG": os.devnull,
            "GPU_ADMIN_CONFIG": os.devnull,
            "CONTROL_METRICS_PORT": "0",
            "GPU_DATA_DIR": str(folder),
            "GPU_LLM_MODEL": "echo",
            "GPU_MAX_CONCURRENT_JOBS": str(SLOTS),
            "DATABASE_URL": database.url,
            "PORT": str(port),
            "API_THREADS": "48",
            "REGIONS": json.dumps({REGION: at_home}),
            "CHAOS_FOLDER": str(folder),
            "CHAOS_WITHOUT": without or "",
        }
        worker_environ = {**environ, "REGIONS": json.dumps({REGION: at_worker})}
        supervisor = Supervisor()
        stack.callback(supervisor.close)

        def add(name: str, command: list[str], given: dict[str, str]) -> None:
            supervisor.parts.append(Part(name, command, given, folder / f"{name}.log"))

        add("api", ["app.serve"], environ)
        for number in range(2):
            add(f"control{number}", ["app.control"], environ)
        for number in range(workers):
            celery = ["celery.__main__", "-A", "tasks", "worker", "--loglevel", "INFO", "-Q", f"{REGION}.llm"]
            add(f"worker{number}", [*celery, "-n", f"worker{number}@%h"], worker_environ)
        clients = Clients(url := f"http://127.0.0.1:{port}")
        stack.callback(clients.close)
        scene = Scene(backend, folder, random.Random(seed), supervisor, store, database, rabbitmq, wires, clients, url)
        try:
            until(scene.answers, READY_S)
            until(lambda: all(part.says("serves") for part in supervisor.named("worker")), READY_S)
        except AssertionError:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise AssertionError(f"the platform did not start:\n{logs}") from None
        supervisor.start()
        yield scene


def _database(backend: str, folder: Path, stack: ExitStack) -> Database:
    server = None
    url = f"sqlite:///{folder / 'jobs.db'}"
    if backend != "embedded":
        server = Postgres()
        stack.callback(server.stop)
        server.start()
        url = server.create("chaos")
    database = Database(url, server)
    stack.callback(database.close)
    return database
