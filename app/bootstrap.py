"""The bootstrap resource: what a GPU worker must know before it can take jobs."""

from typing import Any

from flask import current_app
from marshmallow import Schema, fields

from app.auth import requires
from app.keys import Scope
from app.parsing import Blueprint
from app.schemas import known_region
from app.settings import Settings

blueprint = Blueprint(
    "bootstrap", __name__, url_prefix="/api/v1/workers", description="What a GPU worker asks before it takes jobs."
)


class BootstrapQuery(Schema):
    """Who asks."""

    region = fields.String(
        load_default=None,
        validate=known_region,
        metadata={"example": "asia-east", "description": "The worker's region; left out, the platform's default one."},
    )


class BootstrapView(Schema):
    """Where a worker of the region belongs."""

    region = fields.String()
    broker = fields.String(metadata={"description": "URL of the region's broker, as workers reach it."})
    store = fields.String(metadata={"description": "URL of the region's store, as workers reach it."})
    latitude = fields.Float()
    longitude = fields.Float()


@blueprint.get("/bootstrap")
# The URLs hold passwords: no other scope may read them.
@requires(Scope.WORKER)
@blueprint.arguments(BootstrapQuery(), location="query")
@blueprint.response(200, BootstrapView)
def show(query: dict[str, Any]) -> dict[str, Any]:
    """The broker and store of a region, for its workers."""
    settings: Settings = current_app.extensions["settings"]
    region = settings.regions[query["region"] or settings.default_region].for_workers()
    return {
        "region": region.name,
        "broker": region.broker,
        "store": region.store,
        "latitude": region.latitude,
        "longitude": region.longitude,
    }
