"""The usage resource: what one's jobs used, by day, type, model and key."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

from flask import current_app
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from app.auth import caller, requires
from app.errors import Invalid, ScopeMissing
from app.keys import Keys, Quotas, Scope
from app.parsing import Blueprint
from app.quotas import standings
from app.schemas import Timestamp
from app.usage import FIRST_DAY, SUMS, Usage

blueprint = Blueprint("usage", __name__, url_prefix="/api/v1/usage", description="What was used.")

#: Days of one report, and how many of them if the request names none.
MOST_DAYS = 366
DAYS = 30
MOST_ITEMS = 10_000
#: What a report may be split by, and the table's column for it.
GROUPS = {"day": "day", "type": "type", "model": "model", "key": "owner"}


class Groups(fields.String):
    """Names with commas between, as a list."""

    def _deserialize(self, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        names = [name.strip() for name in super()._deserialize(*args, **kwargs).split(",")]
        if not set(names) <= GROUPS.keys() or len(set(names)) < len(names):
            raise ValidationError(f"Must be some of {', '.join(GROUPS)}, each once, with commas between.")
        return names


class UsageQuery(Schema):
    """Which days of UTC to add up, and how to split them."""

    first = fields.Date(data_key="from", load_default=None, metadata={"description": "The first day; else 30 days."})
    last = fields.Date(data_key="to", load_default=None, metadata={"description": "The last day; else today."})
    group_by = Groups(load_default=["day"], metadata={"example": "day,model", "description": "day, type, model, key"})
    key = fields.String(
        load_default=None,
        validate=validate.Length(min=1, max=64),
        metadata={"description": "For admins: of this key alone, by its id; left out, of all keys."},
    )

    @validates_schema
    def _days(self, data: dict[str, Any], **_: Any) -> None:
        first, last = days(data)
        if not timedelta(0) <= last - first < timedelta(days=MOST_DAYS):
            raise ValidationError(f"Must not be after `to`, and at most {MOST_DAYS} days with it.", "from")


class UsageSums(Schema):
    """What was used; jobs count when they have ended."""

    jobs = fields.Integer(metadata={"description": "That have ended, whatever became of them."})
    completed = fields.Integer()
    failed = fields.Integer()
    cancelled = fields.Integer()
    timeout = fields.Integer()
    prompt_tokens = fields.Integer()
    completion_tokens = fields.Integer()
    images = fields.Integer()
    audio_seconds = fields.Float(metadata={"description": "Of sound that was read."})
    gpu_seconds = fields.Float(metadata={"description": "For which jobs ran."})


class UsageItem(UsageSums):
    """One part of the report; it has the members that `group_by` names."""

    day = fields.Date()
    type = fields.String()
    model = fields.String(allow_none=True, metadata={"description": "That ran; null where no worker said."})
    key = fields.String(metadata={"description": "The owner, as GET /api/v1/keys has it."})


class QuotaView(Schema):
    """One quota, as it stands."""

    name = fields.String(metadata={"example": "jobs_per_day"})
    limit = fields.Integer()
    used = fields.Float(metadata={"description": "Jobs count from when they are accepted."})
    resets_at = Timestamp()


class UsageView(Schema):
    """Usage over some days, split and in all."""

    first = fields.Date(data_key="from")
    last = fields.Date(data_key="to")
    items = fields.List(fields.Nested(UsageItem))
    total = fields.Nested(UsageSums)
    quotas = fields.List(fields.Nested(QuotaView), metadata={"description": "Of the key; [] for all keys together."})


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(UsageQuery(), location="query")
@blueprint.response(200, UsageView)
@blueprint.alt_response(403, description="`key` is for admins.")
def index(query: dict[str, Any]) -> dict[str, Any]:
    """What one's jobs used; for admins, everybody's or one key's. A job counts within seconds of its end."""
    usage: Usage = current_app.extensions["usage"]
    owner, quotas = _whose(query["key"], usage)
    first, last = days(query)
    columns = [GROUPS[name] for name in query["group_by"]]
    rows = usage.report(owner, first, last, columns, MOST_ITEMS + 1)
    if len(rows) > MOST_ITEMS:
        raise Invalid({"group_by": [f"More than {MOST_ITEMS} items; ask for fewer days or split less."]})
    (total,) = usage.report(owner, first, last, [], 1)
    return {
        "first": first,
        "last": last,
        "items": [_item(row._mapping) for row in rows],
        "total": _item(total._mapping),
        "quotas": standings(quotas, usage.spent(owner, _MOST_JOBS)) if owner is not None else [],
    }


#: Live jobs that are counted for a report at most.
_MOST_JOBS = 100_000


def days(query: Any) -> tuple[date, date]:
    """The first and the last day that are asked for."""
    last = query["last"] or datetime.now(UTC).date()
    return query["first"] or last - timedelta(days=DAYS - 1), last


def _whose(key_id: str | None, usage: Usage) -> tuple[str | None, Quotas]:
    """The owner whose usage is asked for, None for everybody's, and its quotas. Raises ScopeMissing or Invalid."""
    me = caller()
    if key_id is None:
        return me.sees, me.quotas
    owner = usage.owner_of(key_id)
    if me.sees is not None and me.sees not in (owner, key_id):
        raise ScopeMissing("Only a key with scope admin may ask for another key's usage.")
    if owner is None:
        raise Invalid({"key": ["No such key; GET /api/v1/keys names those there are."]})
    keys: Keys = current_app.extensions["keys"]
    key = keys.find(key_id)
    return owner, key.quotas if key else Quotas()


def _item(found: Any) -> dict[str, Any]:
    """What UsageItem takes."""
    item = {name: found[name] for name in SUMS}
    item["jobs"] = sum(item[name] for name in ("completed", "failed", "cancelled", "timeout"))
    item["audio_seconds"], item["gpu_seconds"] = round(item["audio_s"], 3), round(item["gpu_s"], 3)
    if "day" in found:
        item["day"] = date.fromordinal(FIRST_DAY + found["day"])
    if "model" in found:
        item["model"] = found["model"] or None
    for name in ("type", "key"):
        if GROUPS[name] in found:
            item[name] = found[GROUPS[name]]
    return item
