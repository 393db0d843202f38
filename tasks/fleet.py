"""Both ends of a worker's card: what it says of itself with every beat, and what is read from all of them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from engines.catalogue import JobType
from tasks.routing import Load


class WorkerState(StrEnum):
    """What a worker that is alive does about new jobs."""

    #: Takes them.
    READY = "ready"
    #: Takes none; those it runs may end.
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Card:
    """One worker, as it describes itself."""

    worker_id: str
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
    #: Jobs that run now, by job type.
    busy: Mapping[JobType, int] = field(default_factory=dict)

    def encode(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> "Card":
        """The card that encode() wrote."""
        fields = json.loads(text)
        for name in ("models", "slots", "busy"):
            fields[name] = {JobType(job_type): value for job_type, value in fields[name].items()}
        return cls(**{**fields, "state": WorkerState(fields["state"])})


def load_of(cards: Iterable[Card], job_type: JobType, model: str | None = None, *, service_s: float | None) -> Load:
    """What the given workers of one region can do for a type; model: for jobs that name it."""
    able = [
        card
        for card in cards
        if card.state is WorkerState.READY and job_type in card.slots and model in (None, card.models.get(job_type))
    ]
    slots = sum(card.slots[job_type] for card in able)
    busy = sum(card.busy.get(job_type, 0) for card in able)
    return Load(slots=slots, free=max(slots - busy, 0), service_s=service_s)
