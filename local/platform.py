"""The whole platform: what it needs before it starts, when each part is ready, and how it ends."""

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import redis
import requests
from honcho.environ import parse_procfile
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.tables import leadership, now, open_database
from engines import packaged
from engines.catalogue import UnknownModel, find
from local import pidfiles, ports, store
from local.processes import Hear, ProcessEnded, Processes
from local.settings import LOOPBACK, Settings, for_processes
from tasks import settings as task_settings
from tasks.fleet import Card, WorkerState
from tasks.ledger import Ledger
from tasks.store import open_store

#: Called with one line of progress.
Say = Callable[[str], None]

#: How long store, API, control, Flower and the admin API may take; a worker may have to fetch its model first.
START_LIMIT_S = 90.0
WORKER_LIMIT_S = 3600.0
#: How long one question whether a part is ready may take.
ANSWER_S = 5.0
#: While a step is waited for in vain, the progress says so at this interval.
PATIENCE_S = 15.0
#: What stopping may take beyond the worker's own grace for its running jobs.
STOP_MARGIN_S = 10.0
#: A second signal ends everything at once, unless it is an echo of the first (make passes its own on).
ECHO_S = 1.0


class CannotStart(Exception):
    """The platform cannot start; the message says why and what to do."""


def procfile() -> dict[str, str]:
    """The commands of the Procfile, by name."""
    return dict(parse_procfile((task_settings.ROOT / "Procfile").read_text()).processes)


@contextmanager
def running(
    settings: Settings, environ: Mapping[str, str], say: Say, hear: Hear, *, fresh: bool = False
) -> Iterator[Processes]:
    """The platform, ready; ended in order when the block is left, however that happens.

    fresh: throw away what an earlier run wrote.
    Raises CannotStart or ports.PortTaken before anything runs, ProcessEnded if a part ends while it starts.
    """
    environ = for_processes(settings, environ)
    grace_s = task_settings.load_worker(environ).drain_grace_s + STOP_MARGIN_S
    with _only_one(settings.run_dir / "lock"):
        for note in sorted(settings.run_dir.glob("*.pid")):
            if pid := pidfiles.end_orphan(note):
                say(f"ended a {note.stem} process that an earlier run left behind (pid {pid})")
        ports.check(settings)
        free = (settings.port, settings.flower_port, settings.gpu_admin_port)
        say(f"ports {', '.join(map(str, free))} and {settings.store_port} are free")
        if fresh:
            _empty(settings.data_dir, keep=settings.run_dir)
        processes = Processes(settings.run_dir, environ, hear)
        try:
            _prepare(processes, environ, say)
            parts = _parts(settings, environ)
            for name, command in procfile().items():
                processes.start(name, command)
            for name, ready, limit_s in parts:
                _wait_for(name, ready, limit_s, processes, say)
            yield processes
        finally:
            try:
                say("stopping; jobs that run may end first")
            finally:
                processes.stop(last=store.NAME, grace_s=grace_s)
            say("everything is stopped")


def interrupt_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread."""
    last = float("-inf")

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > ECHO_S:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Ignored means that somebody wanted it so: nohup, or a shell's background job.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _prepare(processes: Processes, environ: Mapping[str, str], say: Say) -> None:
    """Fetch the small models that the worker will want; bring the database up to date."""
    missing = [name for name in _packaged_models(environ) if packaged.prepared(name) is None]
    if missing:
        size = sum(packaged.PACKAGES[name].megabytes for name in missing)
        say(f"preparing {', '.join(missing)}: {size} MB to download, then about a minute of conversion, once")
        processes.run("models", f"python -m engines.packaged {' '.join(missing)}")
        say("the models are prepared")
    processes.run("migrate", "flask --app wsgi db upgrade")
    say("database is migrated")


def _packaged_models(environ: Mapping[str, str]) -> list[str]:
    """The packaged weights that the worker's models are made of, those that are."""
    found = []
    for variable, job_type in task_settings.MODEL_VARIABLES.items():
        # A folder is no row of the catalogue, nor is a mistake, which the worker will name.
        with contextlib.suppress(UnknownModel):
            found.append(find(job_type, environ[variable]).packaged)
    return list(filter(None, found))


def models_loaded(cards: Iterable[Card], *, since: float) -> list[str]:
    """The models of workers that were started since then, in unix seconds, and have loaded them."""
    # The card of a worker that an earlier run left without goodbye stays for a lease.
    loaded = [card for card in cards if card.started_at >= since and card.state is not WorkerState.LOADING]
    return [model for card in loaded for model in card.models.values()]


#: Answers with what is ready, in words, once it is; raises or answers None until then.
Ready = Callable[[], str | None]


def _parts(settings: Settings, environ: Mapping[str, str]) -> list[tuple[str, Ready, float]]:
    """What has to become ready: name, how to tell, within how many seconds."""
    began = time.time()
    http = requests.Session()
    http.trust_env = False  # a proxy of the environment cannot reach our loopback
    regions = task_settings.load_regions(environ).values()
    database = open_database(settings.database_url)
    ledgers = [Ledger(open_store(url, timeout_s=ANSWER_S)) for url in {region.store for region in regions}]

    def fetch(url: str) -> requests.Response:
        answer = http.get(url, timeout=ANSWER_S)
        answer.raise_for_status()
        return answer

    def store() -> str:
        redis.Redis(LOOPBACK, settings.store_port, socket_timeout=ANSWER_S).ping()
        return f"store answers on port {settings.store_port}"

    def api() -> str:
        fetch(f"{settings.api_url}/ready")
        return f"API is ready on port {settings.port}"

    def control() -> str | None:
        with database.connect() as connection:
            leads = connection.execute(select(leadership.c.holder).where(leadership.c.until > now())).first()
        return "control leads" if leads else None

    def worker() -> str | None:
        models = models_loaded(
            (Card.decode(text) for ledger in ledgers for text in ledger.presence.cards()), since=began
        )
        return f"worker has loaded {', '.join(models)}" if models else None

    def flower() -> str:
        fetch(f"{settings.flower_url}/healthcheck")
        return f"Flower answers on port {settings.flower_port}"

    def gpu_admin() -> str:
        fetch(settings.gpu_admin_url)
        return f"gpu_admin answers on port {settings.gpu_admin_port}"

    return [
        ("store", store, START_LIMIT_S),
        ("API", api, START_LIMIT_S),
        ("control", control, START_LIMIT_S),
        ("worker", worker, WORKER_LIMIT_S),
        ("Flower", flower, START_LIMIT_S),
        ("gpu_admin", gpu_admin, START_LIMIT_S),
    ]


def _wait_for(name: str, ready: Ready, limit_s: float, processes: Processes, say: Say) -> None:
    """Raises ProcessEnded if any process ends meanwhile, CannotStart if it takes too long."""
    began, told = time.monotonic(), 0.0
    while True:
        if (ended := processes.ended()) is not None:
            raise ProcessEnded(ended.obituary())
        try:
            if line := ready():
                say(line)
                return
        except (OSError, redis.RedisError, SQLAlchemyError):  # requests' errors are OSErrors
            pass
        elapsed = time.monotonic() - began
        if elapsed > limit_s:
            raise CannotStart(f"The {name} was not ready after {limit_s:g} s.")
        if elapsed - told > PATIENCE_S:
            told = elapsed
            say(f"still waiting for the {name} ({elapsed:.0f} s)")
        time.sleep(0.1)


def _empty(folder: Path, keep: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and entry != keep:
            shutil.rmtree(entry)
        elif entry != keep:
            entry.unlink()


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Raises CannotStart while another platform runs on this data folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            # Released by the system with the process, however it ends. Children do not inherit the file.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise CannotStart(
                f"A platform already runs on {path.parent.parent} (pid {file.read()}). "
                "End it first, or set GPU_DATA_DIR and the ports for a second one."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
