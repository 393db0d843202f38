"""Worker start and stop: device, engines, card, drain.

Engines are loaded in worker_init, which Celery sends before it builds the consumer: no message is taken before every
engine is warm. An engine that cannot be loaded stops the worker.
"""

import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn
from zoneinfo import ZoneInfo

from celery import signals
from celery.utils.log import mlevel
from celery.utils.nodenames import node_format
from celery.utils.text import str_to_list

import celeryconfig
from engines import catalogue
from engines.catalogue import DEFAULT_ON_CPU, DEFAULT_ON_GPU, JobType, Model, UnknownModel
from engines.contract import Device, Engine, EngineLoadError, JobCancelled, ServerAway
from tasks import bootstrap, consuming, logs, memory, routing, settings, tracing, transport
from tasks.channel import Listener
from tasks.duty import Duty, Hours
from tasks.fleet import Card, WorkerState
from tasks.ledger import Ledger
from tasks.options import EXIT_AWAY as EXIT_AWAY
from tasks.options import EXIT_CONFIG as EXIT_CONFIG
from tasks.presence import BEAT_S
from tasks.station import FALL_GRACE_S, Station
from tasks.store import StoreError, open_store

if TYPE_CHECKING:
    from tasks.direct import DirectServer

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 5.0
#: For results of megabytes, which may go through a narrow line.
BULK_TIMEOUT_S = 120.0
#: How long the store may take to come up beside a worker that is started with it.
STORE_PATIENCE_S = 10.0

_worker: settings.WorkerSettings | None = None
_home: routing.Region | None = None
_station: Station | None = None
_listener: Listener | None = None
_direct: "DirectServer | None" = None


def station() -> Station:
    """This process's station. Raises RuntimeError outside a worker."""
    if _station is None:
        raise RuntimeError("No engine is loaded: this is not a worker started by `celery -A tasks worker`.")
    return _station


@signals.setup_logging.connect
def _log(loglevel: int, logfile: str | None = None, **_: Any) -> None:
    """Celery leaves logging alone where this is connected; called by it too late for what is said while loading."""
    logs.set_up(loglevel, os.environ, logfile)
    # Celery's own default is WARNING; what becomes of each job is worth a line.
    for name in ("tasks", "engines"):
        logging.getLogger(name).setLevel(min(loglevel, logging.INFO))


@signals.celeryd_init.connect
def _configure(sender: str, instance: Any, conf: Any, options: dict[str, Any], **_: Any) -> None:
    """Give Celery the broker, store and queues of the region that this worker serves, before it sets them up."""
    global _worker, _home
    logfile = options.get("logfile")
    try:
        # Celery's banner is no JSON object.
        instance.quiet = instance.quiet or logs.is_json(os.environ)
    except settings.SettingsError as error:
        logging.basicConfig(format=logs.TEXT)
        _refuse(error)
    # The sender is the node's name, which a path may name parts of: %n, %h.
    _log(mlevel(options.get("loglevel") or logging.WARNING), node_format(logfile, sender) if logfile else None)
    try:
        tracing.start("worker", os.environ)
        for name, known in settings.misspelled(os.environ).items():
            logger.warning("%s is no variable of ours; did you mean %s?", name, known)
        queues = str_to_list(options.get("queues")) or []
        _worker = worker = settings.load_worker(os.environ)
        _home = home = bootstrap.home(os.environ, worker, _named_region(queues))
        conf.update(celeryconfig.connections_of(home))
        if conf.broker_url != home.broker:
            raise settings.SettingsError("CELERY_BROKER_URL and -b are not for workers: set GPU_BROKER_URL.")
        transport.check([home], allowed=worker.allow_plaintext)
        memory.check([home])
    except settings.SettingsError as error:
        _refuse(error)
    except bootstrap.ServerAway as error:
        _refuse(error, EXIT_AWAY)
    queues = queues or [routing.queue_name(home.name, job_type) for job_type in worker.served_types]
    conf.task_queues = [celeryconfig.queue_named(name, home.broker) for name in queues]


@signals.worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    global _station, _listener, _direct
    _log(sender.loglevel)
    worker, home = _told()
    region = home.name
    # Celery's own handler comes with the consumer. Who is stopped while loading says goodbye, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    loaded = False
    try:
        types = _served(list(sender.app.amqp.queues.consume_from))
        chosen, device = _choose(types, worker)
        card = _card(worker, region, chosen, device)
        door, card = _open_door(worker, card, home)
        store = open_store(home.store, timeout_s=STORE_TIMEOUT_S)
        ledger = Ledger(store, bulk=open_store(home.store, timeout_s=BULK_TIMEOUT_S))
        _station = opened = Station(card, {}, ledger, beat_s=min(worker.heartbeat_interval_s, BEAT_S))
        # Shown from now on: to load takes minutes.
        opened.announce()
        engines, models, warnings = _load(chosen, device, worker)
        loaded = True
    except ServerAway as error:
        _refuse(error, EXIT_AWAY)
    except (settings.SettingsError, UnknownModel, EngineLoadError) as error:
        _refuse(error)
    finally:
        if _station is not None and not loaded:
            _station.close()
    # Beside the named queues: those of jobs that may not leave the region, and of jobs that ask for the loaded model.
    named: list[tuple[JobType, str | None]] = [*((job_type, None) for job_type in types), *models.items()]
    for job_type, model in named:
        for pinned in (False, True):
            queue = routing.queue_name(region, job_type, model, pinned=pinned)
            sender.app.amqp.queues.select_add(celeryconfig.queue_named(queue, home.broker))

    duty = _duty(engines, worker)
    sender.concurrency = min(sum(duty.slots.values()), worker.max_concurrent_jobs or sys.maxsize)
    consuming.attach(sender, duty)
    from engines import loading

    opened.equip(engines, models, duty, warnings, lambda: loading.memory_used(device))
    if door is not None:
        from tasks.direct import DirectServer

        _direct = DirectServer(opened, ledger, door)
    patience_ends = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            # Before a message is taken: it may have been told to drain.
            opened.beat()
            break
        except StoreError as error:
            if time.monotonic() > patience_ends:
                _refuse(StoreError(f"the store of {region} cannot be reached: {error}"), EXIT_AWAY)
        time.sleep(0.2)
    _listener = Listener(
        store, opened.worker_id, lambda job_id: opened.interrupt(job_id, JobCancelled()), opened.beat_now
    )


@signals.worker_ready.connect
def _open(**_: Any) -> None:
    """Show only now that messages are taken."""
    opened = station()
    if _direct is not None:
        _direct.start()
    opened.open()
    logger.info("worker %s serves %s", opened.worker_id, ", ".join(opened.card.slots))


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    if _station is None:
        return
    _station.drain(_told()[0].drain_grace_s)


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    if _listener is not None:
        _listener.close()
    if _direct is not None:
        # Celery waits for the jobs of its own pool only.
        _direct.close(_told()[0].drain_grace_s + FALL_GRACE_S)
    if _station is not None:
        _station.close()
    tracing.stop()


def _told() -> tuple[settings.WorkerSettings, routing.Region]:
    """What this worker was told, and the region it serves; read once, before Celery connects."""
    if _worker is None or _home is None:
        raise RuntimeError("Nothing was configured: this is not a worker started by `celery -A tasks worker`.")
    return _worker, _home


def _named_region(queues: list[str]) -> str | None:
    """The one region that the -Q option names; None without that option. Raises SettingsError."""
    names = {region for region, _ in map(_split, queues)}
    if len(names) > 1:
        raise settings.SettingsError("Name the queues of one region with -Q, such as -Q asia-east.llm.")
    return next(iter(names), None)


def _served(queues: list[str]) -> list[JobType]:
    """The job types of the queues, each once."""
    return list(dict.fromkeys(job_type for _, job_type in map(_split, queues)))


def _split(queue: str) -> tuple[str, JobType]:
    try:
        return routing.split_queue(queue)
    except ValueError as error:
        raise settings.SettingsError(
            f"-Q {queue}: not a queue of ours. Name queues as region.type, such as asia-east.llm."
        ) from error


def _refuse(error: Exception, code: int = EXIT_CONFIG) -> NoReturn:
    """End the worker with one line that says why."""
    # Not to stderr: that of a worker in the background goes nowhere.
    logger.critical("The worker cannot start: %s", error)
    sys.exit(code)


def _choose(types: list[JobType], worker: settings.WorkerSettings) -> tuple[dict[JobType, Model], Device]:
    """The model of each type, in the order to load them, and the device that this process owns."""
    index = worker.device_id
    if index is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        # Before torch is imported: CUDA reads it once and cannot be told otherwise later. The device is then the
        # only visible one; where somebody has pinned already, the number counts among those.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
        index = 0
    # libgomp reads it at load. Its default spins for so long that a step takes three to five times as long as soon as
    # one neighbour is busy (pytorch#80777).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from engines import loading

    # What a server of the host computes has the same default on every device.
    told = {**{job_type: DEFAULT_ON_CPU[job_type] for job_type in catalogue.SERVERS}, **worker.models}
    named: dict[JobType, Model] = {
        job_type: _resolve(job_type, name, worker.trust_remote_code)
        for job_type, name in told.items()
        if job_type in types
    }
    device = Device("cpu")
    if len(named) < len(types) or any(model.on_device for model in named.values()):
        device = loading.detect_device(index, worker.dtype, worker.max_memory_gib, worker.offload)
        if device.name == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES"):
            logger.warning(
                "GPU %s is asked for, but torch finds none: the CPU is used. Is it torch's CPU build, or a driver that "
                "does not answer?",
                os.environ["CUDA_VISIBLE_DEVICES"],
            )
    defaults = DEFAULT_ON_CPU if device.name == "cpu" else DEFAULT_ON_GPU
    # The language model last: its cache takes its share of what the others have left.
    ordered = sorted(types, key=lambda job_type: job_type is JobType.LLM)
    return {
        job_type: named.get(job_type) or _resolve(job_type, defaults[job_type], worker.trust_remote_code)
        for job_type in ordered
    }, device


def _open_door(worker: settings.WorkerSettings, card: Card, home: routing.Region) -> tuple[socket.socket | None, Card]:
    """The port of direct mode, and the card with its address; neither without direct mode. Raises SettingsError."""
    listen = worker.direct
    if not listen.enabled:
        return None, card
    # Not at the top: it loads an HTTP server, which no other worker needs.
    from tasks import direct

    try:
        door = direct.bind(listen)
        url = direct.public_url(listen, home.store)
    except OSError as error:
        raise settings.SettingsError(
            f"direct.host {listen.host}, direct.port {listen.port} (GPU_DIRECT_PORT): {error.strerror or error}."
        ) from error
    return door, dataclasses.replace(card, direct_url=url)


def _duty(engines: Mapping[JobType, Engine], worker: settings.WorkerSettings) -> Duty:
    """The slots that the engines have, and when they may be filled."""
    cap, start, end = worker.max_concurrent_jobs, worker.working_hours_start, worker.working_hours_end
    zone = ZoneInfo(worker.timezone) if worker.timezone else None
    return Duty(
        {job_type: min(engine.slots, cap or engine.slots) for job_type, engine in engines.items()},
        max_jobs=cap,
        hours=None if start is None or end is None else Hours(start, end, zone),
        acceptance_rate=worker.acceptance_rate,
        poll_s=worker.poll_interval_s,
    )


def _resolve(job_type: JobType, name: str, trusted: Collection[str]) -> Model:
    """The model that the settings name. Raises SettingsError, which says where they do."""
    from engines import loading

    try:
        return loading.resolve(job_type, name, trusted)
    except UnknownModel as error:
        variable = next(variable for variable, known in settings.MODEL_VARIABLES.items() if known is job_type)
        raise settings.SettingsError(f"{settings.where(os.environ, variable)}: {error}") from error


def _card(worker: settings.WorkerSettings, region: str, chosen: dict[JobType, Model], device: Device) -> Card:
    """What the worker says of itself before its engines are loaded."""
    from engines import loading

    host = socket.gethostname()
    name = worker.name or f"{region}-{host}-{device.name.replace(':', '')}"
    gpu_name, gpu_memory_gib = loading.describe(device)
    return Card(
        # Part of keys in the store and of paths of the API, unlike the name, which may be of any script.
        worker_id=f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-') or 'worker'}-{uuid.uuid4().hex[:8]}",
        name=name,
        region=region,
        host=host,
        device=device.name,
        models={job_type: model.id for job_type, model in chosen.items()},
        slots=dict.fromkeys(chosen, 0),
        started_at=time.time(),
        state=WorkerState.LOADING,
        country=worker.country,
        city=worker.city,
        gpu_name=gpu_name,
        gpu_memory_gib=gpu_memory_gib,
        version=settings.version(),
    )


def _load(
    chosen: dict[JobType, Model], device: Device, worker: settings.WorkerSettings
) -> tuple[dict[JobType, Engine], dict[JobType, str], dict[JobType, str]]:
    """Load every engine: engines, model ids, what to tell with answers."""
    from engines import loading

    engines: dict[JobType, Engine] = {}
    models: dict[JobType, str] = {}
    warnings: dict[JobType, str] = {}
    for job_type, model in chosen.items():
        began = time.monotonic()
        engines[job_type] = loading.load(model, device)
        models[job_type] = model.id
        if warning := catalogue.warning(model, worker.models.get(job_type, model.id).partition("@")[0]):
            warnings[job_type] = warning
            logger.warning("%s", warning)
        logger.info("%s loaded on %s in %.1f s", model.id, device.name, time.monotonic() - began)
    return engines, models, warnings
