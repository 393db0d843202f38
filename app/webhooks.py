"""The webhooks resource: where a key wants to hear of the ends of its jobs, and what it was told."""

import re
import time
from collections.abc import Mapping
from typing import Any

from flask import current_app, url_for
from marshmallow import Schema, ValidationError, fields, validate

from app.auth import caller, requires
from app.deliveries import Deliveries, Delivery, DeliveryState, Event, TooManyWebhooks, Webhook
from app.destinations import LONGEST_URL, Destinations, Refused
from app.errors import Invalid, WebhookConflict, WebhookNotFound
from app.keys import Scope
from app.parsing import Blueprint
from app.schemas import MOST_PER_PAGE, Cursor, Timestamp
from engines.catalogue import JobType

blueprint = Blueprint("webhooks", __name__, url_prefix="/api/v1/webhooks", description="Hear of the ends of jobs.")

#: Webhooks of one owner; each end is told to all of them that want it.
MOST_WEBHOOKS = 20
MOST_OVERLAP_HOURS = 24 * 7

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _no_doubles(given: list[Any]) -> None:
    if len(set(given)) != len(given):
        raise ValidationError("Must not name one twice.")


class WebhookFields(Schema):
    """What an owner says of a webhook."""

    url = fields.String(
        validate=validate.Length(min=1, max=LONGEST_URL),
        metadata={
            "example": "https://example.com/hooks",
            "description": "https, and not inside the platform's network.",
        },
    )
    description = fields.String(
        validate=validate.And(validate.Length(max=255), validate.ContainsNoneOf("\0")), metadata={"example": "Billing"}
    )
    events = fields.List(fields.Enum(Event, by_value=True), validate=validate.And(validate.Length(min=1), _no_doubles))
    job_types = fields.List(
        fields.Enum(JobType, by_value=True), validate=_no_doubles, metadata={"description": "Left out or empty: all."}
    )
    enabled = fields.Boolean(
        metadata={"description": "false: nothing is sent, and what was pending is given up; it can be replayed."}
    )


class WebhookCreate(WebhookFields):
    """A new webhook."""

    url = fields.String(
        required=True,
        validate=validate.Length(min=1, max=LONGEST_URL),
        metadata={
            "example": "https://example.com/hooks",
            "description": "https, and not inside the platform's network.",
        },
    )


class RotateSecret(Schema):
    """For how long the old secret is still used."""

    overlap_hours = fields.Float(
        load_default=24.0,
        validate=validate.Range(min=0, max=MOST_OVERLAP_HOURS),
        metadata={"description": "Deliveries carry a signature of both secrets for so long."},
    )


class WebhookView(Schema):
    """A webhook, without its secret."""

    id = fields.UUID()
    url = fields.String()
    description = fields.String()
    events = fields.List(fields.Enum(Event, by_value=True))
    job_types = fields.List(fields.Enum(JobType, by_value=True), metadata={"description": "Empty: all."})
    enabled = fields.Boolean()
    disabled_reason = fields.String(
        allow_none=True, metadata={"description": "Why it was disabled, where nobody asked for it."}
    )
    failing_since = Timestamp(
        allow_none=True, metadata={"description": "Since when no delivery has arrived; null while they do."}
    )
    old_secret_until = Timestamp(
        allow_none=True, metadata={"description": "Until when the secret before the present one signs, too."}
    )
    created_at = Timestamp()


class WebhookWithSecret(WebhookView):
    """A webhook with its secret, which is shown this once."""

    secret = fields.String(metadata={"description": "whsec_ and base64; keep it, it cannot be shown again."})


class WebhookList(Schema):
    """One's own webhooks, oldest first."""

    items = fields.List(fields.Nested(WebhookView))


class AttemptView(Schema):
    """One try to deliver."""

    at = Timestamp()
    status_code = fields.Integer(allow_none=True, metadata={"description": "null where nothing answered."})
    error = fields.String(allow_none=True, metadata={"description": "null if it was delivered."})
    duration_seconds = fields.Float(attribute="duration_s")


class DeliveryView(Schema):
    """What a webhook was or is to be told."""

    id = fields.UUID(metadata={"description": "The header webhook-id of each of its attempts."})
    event = fields.String(metadata={"example": "job.completed"})
    job_id = fields.UUID(allow_none=True, metadata={"description": "null for a test."})
    state = fields.Enum(DeliveryState, by_value=True)
    created_at = Timestamp()
    next_attempt_at = Timestamp(
        attribute="next_at", allow_none=True, metadata={"description": "null where none is to come."}
    )
    attempts = fields.List(
        fields.Nested(AttemptView), attribute="log", metadata={"description": "The newest 20, oldest first."}
    )


class DeliveryList(Schema):
    """One page of deliveries, newest first."""

    items = fields.List(fields.Nested(DeliveryView))
    next_cursor = fields.String(allow_none=True, metadata={"description": "null on the last page."})


class DeliveriesQuery(Schema):
    """Which deliveries to list."""

    state = fields.Enum(DeliveryState, by_value=True, load_default=None)
    limit = fields.Integer(load_default=50, validate=validate.Range(min=1, max=MOST_PER_PAGE))
    cursor = Cursor(load_default=None, metadata={"description": "next_cursor of the page before."})


@blueprint.post("")
@requires(Scope.INFER)
@blueprint.arguments(WebhookCreate())
@blueprint.response(201, WebhookWithSecret, headers={"Location": {"schema": {"type": "string"}}})
@blueprint.alt_response(409, description="There are as many as one key may have.")
def create(wanted: dict[str, Any]) -> Any:
    """Make a webhook; its secret is shown this once.

    It hears of the ends of this key's jobs: of every kind, unless `events` and `job_types` say otherwise.
    """
    _check(wanted["url"])
    values = {"description": "", "events": list(Event), "job_types": [], "enabled": True, **wanted}
    try:
        hook = _deliveries().create(caller().owner, **values, most=MOST_WEBHOOKS)
    except TooManyWebhooks as error:
        detail = f"This key has {MOST_WEBHOOKS} webhooks, as many as it may; delete one first."
        raise WebhookConflict("too_many_webhooks", detail) from error
    return hook, 201, {"Location": url_for("webhooks.show", webhook_id=hook.id)}


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, WebhookList)
def index() -> dict[str, Any]:
    """One's own webhooks, oldest first."""
    return {"items": _deliveries().all(caller().owner)}


@blueprint.get("/<webhook_id>")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, WebhookView)
@blueprint.alt_response(404, description="No such webhook.")
def show(webhook_id: str) -> Webhook:
    """One webhook."""
    return _find(webhook_id)


@blueprint.patch("/<webhook_id>")
@requires(Scope.INFER)
@blueprint.arguments(WebhookFields())
@blueprint.response(200, WebhookView)
@blueprint.alt_response(404, description="No such webhook.")
def change(wanted: dict[str, Any], webhook_id: str) -> Webhook:
    """Change what is named; `enabled: true` starts one again that was disabled."""
    _find(webhook_id)
    if "url" in wanted:
        _check(wanted["url"])
    return _still(_deliveries().change(webhook_id, wanted), webhook_id)


@blueprint.delete("/<webhook_id>")
@requires(Scope.INFER)
@blueprint.response(204)
@blueprint.alt_response(404, description="No such webhook.")
def remove(webhook_id: str) -> None:
    """Delete a webhook with its log; what was pending is not sent."""
    _deliveries().delete(_find(webhook_id).id)


@blueprint.post("/<webhook_id>/rotate-secret")
@requires(Scope.INFER)
@blueprint.arguments(RotateSecret())
@blueprint.response(200, WebhookWithSecret)
@blueprint.alt_response(404, description="No such webhook.")
def rotate_secret(wanted: Mapping[str, float], webhook_id: str) -> Webhook:
    """A new secret, shown this once; the old one signs beside it for a while."""
    _find(webhook_id)
    return _still(_deliveries().rotate_secret(webhook_id, overlap_s=wanted["overlap_hours"] * 3600), webhook_id)


@blueprint.post("/<webhook_id>/test")
@requires(Scope.INFER)
@blueprint.response(202, DeliveryView)
@blueprint.alt_response(404, description="No such webhook.")
@blueprint.alt_response(409, description="It is disabled.")
def test(webhook_id: str) -> Delivery:
    """Send an event of type `webhook.test`; what came of it is in the deliveries."""
    return _deliveries().enter_test(_enabled(webhook_id), time.time())


@blueprint.get("/<webhook_id>/deliveries")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(DeliveriesQuery(), location="query")
@blueprint.response(200, DeliveryList)
@blueprint.alt_response(404, description="No such webhook.")
def deliveries(query: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """What a webhook was and is to be told, newest first, with every attempt."""
    hook, limit = _find(webhook_id), query["limit"]
    rows = _deliveries().page(hook.id, state=query["state"], limit=limit + 1, before=query["cursor"])
    page = rows[:limit]
    return {"items": page, "next_cursor": Cursor.after(page[-1]) if len(rows) > limit else None}


@blueprint.post("/<webhook_id>/deliveries/<delivery_id>/replay")
@requires(Scope.INFER)
@blueprint.response(202, DeliveryView)
@blueprint.alt_response(404, description="No such webhook or delivery.")
@blueprint.alt_response(409, description="The webhook is disabled, or an attempt is under way.")
def replay(webhook_id: str, delivery_id: str) -> Delivery:
    """Deliver it again, from the first attempt on, under the same webhook-id."""
    hook = _enabled(webhook_id)
    known = _deliveries().find(hook.id, delivery_id) if _UUID.fullmatch(delivery_id) else None
    if known is None:
        raise WebhookNotFound(webhook_id, delivery_id)
    replayed = _deliveries().replay(delivery_id)
    if replayed is None:
        raise WebhookConflict("delivery_running", "It is being sent right now; look at its attempts first.")
    return replayed


def _deliveries() -> Deliveries:
    known: Deliveries = current_app.extensions["deliveries"]
    return known


def _check(url: str) -> None:
    destinations: Destinations = current_app.extensions["destinations"]
    try:
        destinations.check(url)
    except Refused as error:
        raise Invalid({"url": [str(error)]}) from error


def _find(webhook_id: str) -> Webhook:
    hook = _deliveries().get(webhook_id, caller().owner) if _UUID.fullmatch(webhook_id) else None
    return _still(hook, webhook_id)


def _still(hook: Webhook | None, webhook_id: str) -> Webhook:
    """The webhook, where nobody has deleted it meanwhile."""
    if hook is None:
        raise WebhookNotFound(webhook_id)
    return hook


def _enabled(webhook_id: str) -> Webhook:
    hook = _find(webhook_id)
    if not hook.enabled:
        detail = f"It is disabled, so nothing is sent. {hook.disabled_reason or ''}".strip()
        raise WebhookConflict("webhook_disabled", f"{detail} Enable it first: PATCH with enabled true.")
    return hook
