"""Both ends of a worker's card: what it says of itself with every beat, and what is read from all of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum

from engines.catalogue import JobType
from tasks import routing
from tasks.routing import Load


class WorkerState(StrEnum):
    """What a worker does about new jobs."""

    #: Its engines are being loaded.
    LOADING = "loading"
    #: Takes them.
    READY = "ready"
    #: Takes none, because somebody said so; those it runs may end.
    DRAINING = "draining"
    #: Takes none outside its working hours.
    OFF_DUTY = "off_duty"
    #: Its lease has ended and it did not say why. No card says this: whoever reads them finds it out.
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Card:
    """One worker, as it describes itself."""

    #: One per process start.
    worker_id: str
    #: The same after a restart: what it was named, or its region, host and device.
    name: str
    region: str
    host: str
    device: str
    #: Model id by job type.
    models: Mapping[JobType, str]
    #: Jobs it may run at once, by job type.
    slots: Mapping[JobType, int]
    #: Unix seconds.
    started_at: float
    state: WorkerState = WorkerState.READY
    country: str | None = None
    city: str | None = None
    gpu_name: str | None = None
    gpu_memory_gib: float | None = None
    #: Of our own code.
    version: str = ""
    #: Where it serves holders of a token; None without direct mode.
    direct_url: str | None = None
    #: Jobs that run now, by job type.
    busy: Mapping[JobType, int] = field(default_factory=dict)
    #: Jobs that are computed together now, by job type; of engines that can say.
    batch: Mapping[JobType, int] = field(default_factory=dict)
    #: What the process holds for its engines, and what everybody uses of the GPU (None for the CPU), to a tenth: the
    #: same card need not be read twice.
    engine_memory_gib: float | None = None
    gpu_memory_used_gib: float | None = None

    def encode(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> "Card":
        """The card that encode() wrote, in this version or a later one."""
        known = {entry.name for entry in fields(cls)}
        said = {name: value for name, value in json.loads(text).items() if name in known}
        for name in ("models", "slots", "busy", "batch"):
            said[name] = {JobType(job_type): value for job_type, value in said.get(name, {}).items()}
        return cls(**{**said, "state": WorkerState(said["state"])})


class Roster:
    """The live workers of one store as they were read together; what a region can do is added up once."""

    def __init__(self, cards: Iterable[Card]) -> None:
        self._by_region: dict[str, list[Card]] = {}
        for card in cards:
            self._by_region.setdefault(card.region, []).append(card)
        self._loads: dict[tuple[str, JobType, str | None], Load] = {}
        self._beside: dict[tuple[str, JobType, str | None], list[str]] = {}

    def all(self) -> list[Card]:
        """Every worker."""
        return [card for cards in self._by_region.values() for card in cards]

    def of(self, region: str) -> list[Card]:
        """The region's workers."""
        return self._by_region.get(region, [])

    def load(self, region: str, job_type: JobType, model: str | None = None, *, service_s: float | None) -> Load:
        """What the region's workers can do for a type; model: for jobs that name it."""
        key = (region, job_type, model)
        found = self._loads.get(key)
        if found is None:
            found = self._loads[key] = load_of(self.of(region), job_type, model)
        return replace(found, service_s=service_s)

    def beside(self, region: str, job_type: JobType, model: str | None = None) -> list[str]:
        """Queues whose jobs wait for the same workers as those of the type, or of the type that name the model."""
        key = (region, job_type, model)
        found = self._beside.get(key)
        if found is None:
            takers = able(self.of(region), job_type, model)
            models: set[str | None] = {None} if model else {card.models.get(job_type) for card in takers} - {None}
            names = {routing.queue_name(region, job_type, other) for other in models} if takers else set()
            found = self._beside[key] = sorted(names)
        return found


def able(cards: Iterable[Card], job_type: JobType, model: str | None = None) -> list[Card]:
    """Those of the workers that take jobs of a type; model: jobs that name it."""
    return [
        card
        for card in cards
        if card.state is WorkerState.READY and job_type in card.slots and model in (None, card.models.get(job_type))
    ]


def load_of(cards: Iterable[Card], job_type: JobType, model: str | None = None) -> Load:
    """What the given workers of one region can do for a type; model: for jobs that name it."""
    everybody = able(cards, job_type)
    takers = able(everybody, job_type, model)
    slots = sum(card.slots[job_type] for card in takers)
    busy = sum(card.busy.get(job_type, 0) for card in takers)
    # Jobs that name no model are spread over all, and this share of them over those that hold it.
    share = slots / max(sum(card.slots[job_type] for card in everybody), 1)
    return Load(slots=slots, free=max(slots - busy, 0), service_s=None, share_beside=share)
