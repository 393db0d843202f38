"""Regions, queue names, and which region a job joins: pure functions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engines.catalogue import JobType

#: Higher is sooner; the public scale.
PRIORITIES = range(10)
EXCHANGE = "jobs"
#: What distance costs, there and back: light in glass needs 10 ms for 1000 km, and cables make detours.
SECONDS_PER_KM = 1 / 100_000
#: A job leaves for a shorter wait only if it saves this many seconds, and this share of its wait: estimates are no
#: better than that, and jobs that change sides at every flicker would only trade the places.
LEAST_SAVED_S = 2.0
LEAST_SAVED_SHARE = 0.3
#: A running job that should have ended by now is taken to need this share of a service time.
LEAST_RESIDUAL_SHARE = 0.1


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
    #: What workers use instead, where they reach broker and store by other addresses than the API.
    worker_broker: str | None = None
    worker_store: str | None = None

    def for_workers(self) -> "Region":
        """The region with the addresses that its workers use."""
        return replace(self, broker=self.worker_broker or self.broker, store=self.worker_store or self.store)


@dataclass(frozen=True, slots=True)
class Load:
    """What a region can do now for one job type."""

    #: Slots of live workers, and how many of them are free.
    slots: int
    free: int
    #: Mean seconds of a job; None until one has completed.
    service_s: float | None
    #: Seconds until each busy slot is free again, as far as that can be told, soonest first.
    residuals_s: Sequence[float] = ()
    #: How much a job of the queues beside counts as one of its own: less than 1 where others go to other workers.
    share_beside: float = 1.0

    def with_running(self, elapsed_s: Sequence[float], beside_s: Sequence[float]) -> "Load":
        """The load while jobs run for so long already: those of its own queue, and of the queues beside."""
        busy = min(len(elapsed_s) + round(self.share_beside * len(beside_s)), self.slots)
        residuals: list[float] = []
        if self.service_s is not None:
            residuals = sorted(residual_s(passed, self.service_s) for passed in (*elapsed_s, *beside_s))
            residuals = [residuals[n * len(residuals) // busy] for n in range(busy)]
        return replace(self, free=self.slots - busy, residuals_s=residuals)

    def with_busy(self, running: int, beside: int) -> "Load":
        """The load while that many jobs run; those that were not known of have just begun."""
        busy = min(running + round(self.share_beside * beside), self.slots)
        ended = max(len(self.residuals_s) - busy, 0)
        return replace(self, free=self.slots - busy, residuals_s=self.residuals_s[ended:])


@dataclass(frozen=True, slots=True)
class Offer:
    """What a region can do now for one job."""

    load: Load
    #: Jobs that wait there and would run before it: those of its own queue, and of the queues beside.
    ahead: int
    ahead_beside: int = 0

    @property
    def wait_s(self) -> float | None:
        """Seconds until it would begin; None where that is not known."""
        return estimated_wait_s(self.ahead + round(self.load.share_beside * self.ahead_beside), self.load)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job goes, and why."""

    region: str
    #: A sentence or two.
    reason: str
    #: Seconds until it would begin there; None where that is not known.
    estimated_wait_s: float | None


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


def choose_region(
    wanted: str,
    regions: Mapping[str, Region],
    offers: Mapping[str, Offer],
    *,
    cross_region: bool,
    what: str = "such a job",
) -> Decision:
    """Where a job goes: the wanted region while it can serve, else the nearest that can; a farther one if much sooner.

    offers: by region; one that is missing cannot be reached, and those beyond the wanted one may be left out while it
    is serves_at_once(). A region is sooner only by known waits that differ by more than the distance costs and the
    estimates may be wrong. With nobody anywhere, and without cross_region, the job waits where it was wanted.
    what: is to be served, for the reason.
    """
    here = offers.get(wanted)
    wait_s = here.wait_s if here else None
    if not cross_region:
        lack = None if here and here.load.slots else _lack(wanted, here, what)
        return Decision(wanted, f"It may not leave {wanted}." + (f" {lack}" if lack else ""), wait_s)
    if here is not None and serves_at_once(here):
        return Decision(wanted, f"{wanted} has a free slot for {what}.", wait_s)
    able = [name for name, offer in offers.items() if name in regions and offer.load.slots > 0]
    far_km = {name: distance_km(regions[wanted], regions[name]) for name in able}
    nearest = wanted if wanted in far_km else min(able, key=far_km.__getitem__, default=None)
    if nearest is None:
        return Decision(wanted, f"{_lack(wanted, here, what)} Nor does another region; it waits in {wanted}.", None)
    region = _soonest(nearest, offers, far_km)
    offer = offers[region]
    if region == wanted:
        reason = f"{wanted} serves {what}, and no other region is so much sooner that it pays to leave."
    elif nearest == wanted:
        reason = (
            f"It would wait about {_round(wait_s)} s in {wanted} and {_round(offer.wait_s)} s in {region}, "
            f"{far_km[region]:.0f} km away."
        )
    else:
        rank = "nearest" if region == nearest else "soonest"
        reason = f"{_lack(wanted, here, what)} {region}, {far_km[region]:.0f} km away, is the {rank} that can."
    return Decision(region, reason, offer.wait_s)


def serves_at_once(offer: Offer) -> bool:
    """Whether a job would begin there without waiting, so that no other region can be better."""
    return offer.load.slots > 0 and offer.wait_s == 0


def estimated_wait_s(ahead: int, load: Load) -> float | None:
    """Seconds until a job with `ahead` others before it starts; None where that is not known.

    A free slot is waited for not at all. Else the slots become free one after the other, each when its present job is
    done and then once per service time, and every job ahead takes the first that does.
    """
    if load.slots == 0:
        return None
    if ahead < load.free:
        return 0.0
    if load.service_s is None:
        return None
    # The free slots are taken by the first of those ahead, just now.
    until_free = [*load.residuals_s[: load.slots], *[load.service_s] * (load.slots - len(load.residuals_s))]
    rounds, place = divmod(ahead - load.free, load.slots)
    return sorted(until_free)[place] + rounds * load.service_s


def residual_s(elapsed_s: float, service_s: float) -> float:
    """Seconds that a running job may still take; one that takes longer than most has a while to go, too."""
    return max(service_s - elapsed_s, service_s * LEAST_RESIDUAL_SHARE)


def _soonest(nearest: str, offers: Mapping[str, Offer], far_km: Mapping[str, float]) -> str:
    """The region of least wait and distance together, if it is worth leaving the nearest one for; else that one.

    far_km: of the regions that can serve.
    """
    wait_s = offers[nearest].wait_s
    if wait_s is None:
        return nearest
    costs = {
        name: known + far_km[name] * SECONDS_PER_KM for name in far_km if (known := offers[name].wait_s) is not None
    }
    best = min(costs, key=costs.__getitem__)
    saved_s = costs[nearest] - costs[best]
    return best if saved_s > max(LEAST_SAVED_S, LEAST_SAVED_SHARE * wait_s) else nearest


def _lack(region: str, offer: Offer | None, what: str) -> str:
    return f"{region} cannot be reached." if offer is None else f"No live worker serves {what} in {region}."


def _round(wait_s: float | None) -> int:
    return math.ceil(wait_s or 0)
