"""Regions, queue names, and which region a job joins: pure functions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.catalogue import JobType

#: Higher is sooner; the public scale.
PRIORITIES = range(10)
EXCHANGE = "jobs"


@dataclass(frozen=True, slots=True)
class Region:
    """A place with workers: its broker, its store, its spot on the map."""

    name: str
    #: Celery broker URL.
    broker: str
    #: Redis or Valkey URL of the store.
    store: str
    latitude: float
    longitude: float
    #: ISO 3166 codes of the countries whose clients it is home to.
    countries: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """What a region can do now for one job type."""

    #: Slots of live workers, and how many of them are free.
    slots: int
    free: int
    #: Mean seconds of a job; None until one has completed.
    service_s: float | None


def queue_name(region: str, job_type: JobType, model: str | None = None, *, pinned: bool = False) -> str:
    """The queue of a region and type, such as asia-east.llm.

    model: of the jobs that name it, such as asia-east.llm@qwen-qwen2-5-7b-instruct; only workers that hold the model
    take from there, so that nobody is handed what he cannot run.
    pinned: of the jobs that may not leave the region (.local), so that nothing outside can export them.
    """
    name = f"{region}.{job_type}"
    if model is not None:
        name += "@" + re.sub(r"[^a-z0-9]+", "-", model.casefold()).strip("-")
    return f"{name}.local" if pinned else name


def split_queue(name: str) -> tuple[str, JobType]:
    """The region and type that a queue's name states. Raises ValueError for a name that is none of ours."""
    region, _, rest = name.partition(".")
    return region, JobType(rest.removesuffix(".local").partition("@")[0])


def is_amqp(broker: str) -> bool:
    """Whether a broker URL is RabbitMQ's; otherwise it is Redis or Valkey."""
    return broker.startswith(("amqp", "pyamqp"))


def broker_priority(priority: int, broker: str) -> int:
    """The public priority on the broker's own scale.

    kombu's Redis transport serves 0 first, RabbitMQ serves the highest first.
    """
    return priority if is_amqp(broker) else PRIORITIES[-1] - priority


def distance_km(one: Region, other: Region) -> float:
    """Great-circle distance, by the haversine formula on a sphere of 6371 km."""
    lat1, lat2 = math.radians(one.latitude), math.radians(other.latitude)
    dlat, dlon = lat2 - lat1, math.radians(other.longitude - one.longitude)
    a = math.sin(dlat / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin(dlon / 2) ** 2
    return 2 * 6371 * math.asin(math.sqrt(a))


def choose_region(wanted: str, regions: Mapping[str, Region], loads: Mapping[str, Load], *, cross_region: bool) -> str:
    """The region whose queue the job joins: the wanted one while it has a live worker, else the nearest that has.

    loads: by region; a region that is missing cannot be reached. With nobody anywhere the job waits where it was
    wanted.
    """
    if not cross_region or _serves(loads.get(wanted)):
        return wanted
    able = [name for name, load in loads.items() if name in regions and _serves(load)]
    return min(able, key=lambda name: distance_km(regions[wanted], regions[name]), default=wanted)


def estimated_wait_s(ahead: int, load: Load) -> float | None:
    """Seconds until a job with `ahead` others before it starts; None where that is not known.

    A free slot is waited for not at all; else one residual job, then one service time per job ahead and slot. The
    residual of a job that was met at a random moment is half a service time.
    """
    if load.slots == 0:
        return None
    if ahead < load.free:
        return 0.0
    if load.service_s is None:
        return None
    return load.service_s / 2 + load.service_s * (ahead - load.free) / load.slots


def _serves(load: Load | None) -> bool:
    return load is not None and load.slots > 0
