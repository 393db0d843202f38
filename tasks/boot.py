"""Worker start and stop: device, engines, card, drain.

Engines are loaded in worker_init, which Celery sends before it builds the consumer: no message is taken before every
engine is warm. An engine that cannot be loaded stops the worker.
"""

import logging
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from celery import signals

import celeryconfig
from engines import catalogue
from engines.catalogue import DEFAULT_ON_CPU, DEFAULT_ON_GPU, JobType, Model, UnknownModel
from engines.contract import Device, Engine, EngineLoadError, JobCancelled, JobReleased
from tasks import routing, settings
from tasks.channel import Listener
from tasks.fleet import Card
from tasks.ledger import Ledger, StoreError, open_store
from tasks.station import Station

logger = logging.getLogger(__name__)

#: Exit code of a worker that cannot start as configured: EX_CONFIG of sysexits.h. A supervisor need not retry it.
EXIT_CONFIG = 78
STORE_TIMEOUT_S = 5.0
#: For results of megabytes, which may go through a narrow line.
BULK_TIMEOUT_S = 120.0
#: How long the store may take to come up beside a worker that is started with it.
STORE_PATIENCE_S = 10.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_station: Station | None = None
_listener: Listener | None = None


def station() -> Station:
    """This process's station. Raises RuntimeError outside a worker."""
    if _station is None:
        raise RuntimeError("No engine is loaded: this is not a worker started by `celery -A tasks worker`.")
    return _station


@signals.setup_logging.connect
def _log(loglevel: int, **_: Any) -> None:
    """Celery leaves logging alone where this is connected; called by it too late for what is said while loading."""
    logging.basicConfig(level=loglevel, format=LOG_FORMAT)
    # Celery's own default is WARNING; what becomes of each job is worth a line.
    for name in ("tasks", "engines"):
        logging.getLogger(name).setLevel(min(loglevel, logging.INFO))


@signals.worker_init.connect
def _start(sender: Any, **_: Any) -> None:
    global _station, _listener
    _log(sender.loglevel)
    try:
        worker = settings.load_worker(os.environ)
        regions = settings.load_regions(os.environ)
        region, types = _served(list(sender.app.amqp.queues.consume_from), regions)
        if regions[region].broker != sender.app.conf.broker_url:
            raise settings.SettingsError(f"The queues are of {region}: set GPU_REGION={region}, whose broker differs.")
        engines, models, warnings, device = _load(types, worker)
    except (settings.SettingsError, UnknownModel, EngineLoadError) as error:
        sys.stderr.write(f"The worker cannot start: {error}\n")
        sys.exit(EXIT_CONFIG)
    # Beside the named queues: those of jobs that may not leave the region, and of jobs that ask for the loaded model.
    named: list[tuple[JobType, str | None]] = [*((job_type, None) for job_type in types), *models.items()]
    for job_type, model in named:
        for pinned in (False, True):
            queue = routing.queue_name(region, job_type, model, pinned=pinned)
            sender.app.amqp.queues.select_add(celeryconfig.queue_named(queue, regions[region].broker))

    slots = {
        job_type: min(engine.slots, worker.max_concurrent_jobs or engine.slots) for job_type, engine in engines.items()
    }
    sender.concurrency = min(sum(slots.values()), worker.max_concurrent_jobs or sys.maxsize)
    host = socket.gethostname()
    name = worker.name or f"{region}-{host}-{device.replace(':', '')}"
    card = Card(
        worker_id=f"{name}-{uuid.uuid4().hex[:8]}",
        name=name,
        region=region,
        host=host,
        device=device,
        models=models,
        slots=slots,
        started_at=time.time(),
    )
    url = regions[region].store
    store = open_store(url, timeout_s=STORE_TIMEOUT_S)
    patience_ends = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            store.ping()
            break
        except StoreError as error:
            if time.monotonic() > patience_ends:
                sys.stderr.write(f"The worker cannot start: the store of {region} cannot be reached: {error}\n")
                sys.exit(1)
        time.sleep(0.2)
    ledger = Ledger(store, bulk=open_store(url, timeout_s=BULK_TIMEOUT_S))
    _station = opened = Station(card, engines, ledger, warnings=warnings)
    _listener = Listener(store, card.worker_id, lambda job_id: opened.interrupt(job_id, JobCancelled()))


@signals.worker_ready.connect
def _open(**_: Any) -> None:
    """Show the card only now, when messages are taken."""
    opened = station()
    opened.open()
    logger.info("worker %s serves %s", opened.worker_id, ", ".join(opened.card.slots))


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    if _station is None:
        return
    _station.drain()
    grace_s = settings.load_worker(os.environ).drain_grace_s
    timer = threading.Timer(grace_s, _station.interrupt_all, [JobReleased("The worker is shutting down.")])
    timer.daemon = True
    timer.start()


@signals.worker_shutdown.connect
def _stop(**_: Any) -> None:
    if _listener is not None:
        _listener.close()
    if _station is not None:
        _station.close()


def _served(queues: list[str], regions: dict[str, routing.Region]) -> tuple[str, list[JobType]]:
    """The region and the job types that the -Q option names."""
    served: list[tuple[str, JobType]] = []
    for queue in queues:
        try:
            served.append(routing.split_queue(queue))
        except ValueError as error:
            raise settings.SettingsError(
                f"-Q {queue}: not a queue of ours. Name queues as region.type, such as asia-east.llm."
            ) from error
    names = {region for region, _ in served}
    if len(names) != 1:
        raise settings.SettingsError("Name the queues of one region with -Q, such as -Q asia-east.llm.")
    region = names.pop()
    if region not in regions:
        raise settings.SettingsError(f"-Q: region {region!r} is not configured; there are {', '.join(regions)}.")
    return region, list(dict.fromkeys(job_type for _, job_type in served))


def _load(
    types: list[JobType], worker: settings.WorkerSettings
) -> tuple[dict[JobType, Engine], dict[JobType, str], dict[JobType, str], str]:
    """Load every engine on the device this process owns: engines, model ids, what to tell with answers, the device."""
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

    chosen: dict[JobType, Model] = {
        job_type: loading.resolve(job_type, name) for job_type, name in worker.models.items() if job_type in types
    }
    device = Device("cpu")
    if len(chosen) < len(types) or any(model.on_device for model in chosen.values()):
        device = loading.detect_device(index, worker.dtype, worker.max_memory_gib, worker.offload)
    defaults = DEFAULT_ON_CPU if device.name == "cpu" else DEFAULT_ON_GPU
    engines: dict[JobType, Engine] = {}
    models: dict[JobType, str] = {}
    warnings: dict[JobType, str] = {}
    # The language model last: its cache takes its share of what the others have left.
    for job_type in sorted(types, key=lambda job_type: job_type is JobType.LLM):
        model = chosen.get(job_type) or loading.resolve(job_type, defaults[job_type])
        began = time.monotonic()
        engines[job_type] = loading.load(model, device)
        models[job_type] = model.id
        if warning := catalogue.warning(model, worker.models.get(job_type, model.id)):
            warnings[job_type] = warning
            logger.warning("%s", warning)
        logger.info("%s loaded on %s in %.1f s", model.id, device.name, time.monotonic() - began)
    return engines, models, warnings, device.name
