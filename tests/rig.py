"""The platform as real processes: workers with the echo engine, the reconciler, and the API's side in this one."""

import itertools
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from app import control
from app.dispatch import Dispatch, open_dispatch
from app.job_table import JobRow
from app.keys import Keys
from app.request import Request
from app.tables import open_database
from app.turns import Turns
from engines.catalogue import JobType
from engines.schemas import load_params
from tasks import settings
from tasks.job import JobState
from tests.forking import Fork

#: Below those that the system gives to connections, one of which might take a port before its server does; each test
#: process in an order of its own. tests/gpu_admin/server_case.py has those from 20,000.
_PORTS = itertools.cycle(random.SystemRandom().sample(range(10_000, 20_000), 10_000))
#: Settings of a worker that serves every type without weights, and its queues.
ECHO = dict.fromkeys(settings.MODEL_VARIABLES, "echo")
EVERY_TYPE = ",".join(f"asia-east.{job_type}" for job_type in JobType)
ROOT = Path(__file__).resolve().parent.parent
READY_S = 60
#: Far longer than what tests wait for takes on a busy machine; those that promise a time say it themselves.
PATIENCE_S = 45.0
#: What a busy machine may add to a time that is promised.
BUSY_S = 3.0


def free_port() -> int:
    """A port that nobody listens on now."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(look: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait for something to become true; fails if it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class Worker:
    """A real `celery -A tasks worker`."""

    def __init__(self, environ: dict[str, str], log: Path, queues: str, inside: Sequence[str] = ()) -> None:
        """inside: what to put before its command, so that it runs elsewhere, such as in a network namespace."""
        self.log = log
        self.process: Fork | subprocess.Popen[bytes]
        # Mingling is a second's wait for the answers of other workers about revoked tasks, of which there are none.
        arguments = ["-A", "tasks", "worker", "--loglevel", "INFO", "--without-mingle"]
        arguments += ["-Q", queues, "-n", f"{log.stem}@%h"]
        if not inside:
            self.process = Fork("celery", arguments, folder=ROOT, environ=environ, log=log)
            return
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*inside, sys.executable, "-m", "celery", *arguments],
                cwd=ROOT,
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def id(self) -> str | None:
        """Its worker id, once it serves."""
        found = re.search(r"worker (\S+) serves", self.log.read_text())
        return found.group(1) if found else None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """SIGKILL, whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


class Platform:
    """Everything of one test, on its own Valkey and database."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        self.environ = environ
        self.folder = folder
        self.workers: list[Worker] = []
        regions = settings.load_regions(environ)
        self.database_url = environ["DATABASE_URL"]
        #: As FAIR_WINDOW; none unless a test asks for it.
        self.fair_window = int(environ.get("FAIR_WINDOW", "0"))
        self.dispatch: Dispatch = open_dispatch(
            open_database(self.database_url),
            regions,
            "asia-east",
            str(folder / "blobs"),
            fair_window=self.fair_window,
        )
        self._stopped = threading.Event()
        self._control: threading.Thread | None = None

    def start_control(self) -> None:
        """The reconciler, as `python -m app.control` runs it."""
        self._stopped.clear()
        turns = Turns(self.dispatch, Keys(open_database(self.database_url)), self.fair_window)
        self._control = threading.Thread(
            target=control.run, args=(self.dispatch, self._stopped), kwargs={"chores": [turns]}, daemon=True
        )
        self._control.start()

    def stop_control(self) -> None:
        """No reconciler any more."""
        self._stopped.set()
        if self._control is not None:
            self._control.join()

    def start_worker(
        self, *, queues: str = "asia-east.llm", wait: bool = True, inside: Sequence[str] = (), **environ: str
    ) -> Worker:
        """A worker, serving when this returns."""
        log = self.folder / f"worker{len(self.workers)}.log"
        worker = Worker({**self.environ, **environ}, log, queues, inside)
        self.workers.append(worker)
        if wait:
            self.until(lambda: worker.id is not None or worker.process.poll() is not None, READY_S)
            assert worker.id is not None, log.read_text()
        return worker

    def submit(
        self,
        text: str,
        *,
        job_type: JobType = JobType.LLM,
        priority: int = 0,
        timeout_seconds: float = 60,
        queue_timeout_seconds: float | None = None,
        must_send: bool = False,
        region: str | None = None,
        allow_cross_region: bool = True,
        model: str | None = None,
        owner: str = "tester",
    ) -> JobRow:
        """A job that asks `text`, by default a chat; see engines/echo.py for what it can order."""
        asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 100}
        params = load_params(job_type, {"input": [text]} if job_type is JobType.EMBEDDING else asked)
        request = Request(
            job_type,
            model,
            model,
            params,
            priority,
            region,
            allow_cross_region,
            timeout_seconds,
            queue_timeout_seconds,
        )
        return self.dispatch.submit(owner, request, must_send=must_send).row

    def status(self, row: JobRow) -> JobState:
        """What a client that asks now is told."""
        return self.row(row).status

    def row(self, row: JobRow) -> JobRow:
        """The job as a client that asks now sees it."""
        found = self.dispatch.look(row.id)
        assert found is not None
        return found

    def ended(self, row: JobRow, seconds: float = PATIENCE_S) -> JobRow:
        """The job once it has ended, within so many seconds."""
        last = self.dispatch.wait(row, seconds)
        assert last.ended, f"{last.status} after {seconds} s"
        return last

    def until(self, look: Callable[[], object], seconds: float = PATIENCE_S) -> None:
        """Wait for something to become true; fails if it does not within so many seconds."""
        until(look, seconds)

    def close(self) -> None:
        """End everything that was started."""
        self.stop_control()
        for worker in self.workers:
            worker.end()
        self.dispatch.close()
