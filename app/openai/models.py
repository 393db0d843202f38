"""GET /v1/models: what live workers serve, one entry for each model."""

from collections.abc import Iterable
from typing import Any

from marshmallow import Schema, fields

from app.auth import requires
from app.keys import Scope
from app.models import live_models
from app.openai.errors import ModelNotFound
from app.openai.routes import blueprint
from app.submission import dispatch_here
from engines import catalogue
from engines.catalogue import JobType, UnknownModel
from tasks.fleet import Card
from tasks.reading import near


class ServedModel(Schema):
    """One model."""

    id = fields.String(required=True)
    object = fields.String(required=True, metadata={"example": "model"})
    created = fields.Integer(required=True, metadata={"description": "Unix seconds, since when a worker serves it."})
    owned_by = fields.String(required=True)
    types = fields.List(fields.String(), metadata={"description": "The job types it serves; not OpenAI's."})
    regions = fields.List(fields.String(), metadata={"description": "Where; not OpenAI's."})


class ServedModelList(Schema):
    """All that are served now."""

    object = fields.String(required=True, metadata={"example": "list"})
    data = fields.List(fields.Nested(ServedModel), required=True)


@blueprint.get("/models")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, ServedModelList)
def list_models() -> dict[str, Any]:
    """What live workers serve."""
    return {"object": "list", "data": list(_served(dispatch_here().placement.cards()).values())}


@blueprint.get("/models/<path:model>")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, ServedModel)
def show_model(model: str) -> dict[str, Any]:
    """One model that is served, by its id or another name of it."""
    served = _served(dispatch_here().placement.cards())
    by_name = {known.casefold(): known for known in served}
    for job_type in JobType:
        if found := by_name.get(model.casefold()):
            return served[found]
        try:
            model_id = catalogue.find(job_type, model).id
        except UnknownModel:
            continue
        if model_id in served:
            return served[model_id]
    raise ModelNotFound(f"No live worker serves {model[:200]!r}. {near(model, served)}")


def _served(cards: Iterable[Card]) -> dict[str, dict[str, Any]]:
    """Entries by id, in the order of ids."""
    cards = list(cards)
    found: dict[str, dict[str, Any]] = {}
    for (job_type, model), places in sorted(live_models(cards).items(), key=lambda entry: (entry[0][1], entry[0][0])):
        since = min(card.started_at for card in cards if card.models.get(job_type) == model)
        entry = found.setdefault(
            model,
            {
                "id": model,
                "object": "model",
                "created": int(since),
                "owned_by": model.partition("/")[0] if "/" in model else "platform",
                "types": [],
                "regions": [],
            },
        )
        entry["created"] = min(entry["created"], int(since))
        entry["types"].append(str(job_type))
        entry["regions"] = sorted({*entry["regions"], *(place.region for place in places)})
    return found
