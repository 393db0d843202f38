"""The models resource: what can be asked for, what it needs, and where it is live."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flask import current_app
from marshmallow import Schema, fields

from app.auth import requires
from app.dispatch import Dispatch
from app.keys import Scope
from app.parsing import Blueprint
from engines.catalogue import DEFAULT_ON_CPU, DEFAULT_ON_GPU, MODELS, JobType
from tasks.fleet import Card, WorkerState, load_of

blueprint = Blueprint("models", __name__, url_prefix="/api/v1/models", description="What can be asked for, and where.")


class LiveView(Schema):
    """Where a model is loaded now."""

    region = fields.String()
    workers = fields.Integer()
    slots = fields.Integer(metadata={"description": "Jobs it takes at once there."})
    free = fields.Integer(metadata={"description": "Slots that are free."})


class ModelView(Schema):
    """One model."""

    id = fields.String(metadata={"description": "What a job's `model` may say."})
    type = fields.String()
    memory_gib = fields.Float(
        allow_none=True, metadata={"description": "Device memory it takes, about; null where not known."}
    )
    aliases = fields.Dict(
        fields.String(), fields.String(), metadata={"description": "Other ids that mean it, and why it is this one."}
    )
    gated = fields.Boolean(metadata={"description": "Its hub asks to accept terms first."})
    default = fields.Boolean(
        metadata={"description": "A worker that is told nothing else loads it, on a GPU or a CPU."}
    )
    live = fields.List(fields.Nested(LiveView))


class ModelList(Schema):
    """All models."""

    items = fields.List(fields.Nested(ModelView))


class ModelsQuery(Schema):
    """Which models to list."""

    type = fields.Enum(JobType, by_value=True, load_default=None)
    live = fields.Boolean(load_default=None, metadata={"description": "true: those that a worker has loaded now."})


@dataclass(frozen=True, slots=True)
class Live:
    """A model in one region."""

    region: str
    workers: int
    slots: int
    free: int


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(ModelsQuery(), location="query")
@blueprint.response(200, ModelList)
def index(query: dict[str, Any]) -> dict[str, Any]:
    """The catalogue, and what workers have loaded beside it."""
    dispatch: Dispatch = current_app.extensions["dispatch"]
    live = live_models(dispatch.placement.cards())
    known = {(row.type, row.id): row for row in MODELS}
    items = []
    for key in [*known, *sorted(live.keys() - known.keys())]:
        row = known.get(key)
        # An engine without weights is no model: it is listed only where somebody runs it.
        if row is not None and not row.on_device and key not in live:
            continue
        items.append(
            {
                "id": key[1],
                "type": str(key[0]),
                "memory_gib": row.memory_gib if row else None,
                "aliases": row.aliases if row else {},
                "gated": bool(row and row.gated),
                "default": key[1] in (DEFAULT_ON_GPU[key[0]], DEFAULT_ON_CPU[key[0]]),
                "live": live.get(key, []),
            }
        )
    if query["type"] is not None:
        items = [item for item in items if item["type"] == query["type"]]
    if query["live"] is not None:
        items = [item for item in items if bool(item["live"]) is query["live"]]
    return {"items": items}


def live_models(cards: Iterable[Card]) -> dict[tuple[JobType, str], list[Live]]:
    """Where each model is loaded by a worker that takes jobs."""
    found: dict[tuple[JobType, str, str], list[Card]] = defaultdict(list)
    for card in cards:
        if card.state is WorkerState.READY:
            for job_type, model in card.models.items():
                found[job_type, model, card.region].append(card)
    live: dict[tuple[JobType, str], list[Live]] = defaultdict(list)
    for (job_type, model, region), holders in found.items():
        load = load_of(holders, job_type)
        live[job_type, model].append(Live(region, len(holders), load.slots, load.free))
    return live
