"""What the jobs API takes and gives; the seed's field names live here and nowhere deeper.

Params and results by job type are stated in engines/schemas.py.
"""

import base64
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from flask import current_app
from marshmallow import Schema, ValidationError, fields, post_load, validate, validates

from app.dispatch import Dispatch
from app.job_table import JobRow
from app.origin import FoundBy, Origin
from app.placement import Forecast
from app.request import Request
from app.settings import Settings
from app.waiting import Place
from engines.catalogue import JobType, UnknownModel
from engines.contract import Progress
from tasks.job import JobError, JobState
from tasks.reading import JobFields, near
from tasks.showing import rfc3339, warnings

#: Longest time one sync request may wait.
LONGEST_SYNC_S = 3600
MOST_PER_PAGE = 200
PRUNED = "It completed, and its result is no longer kept. Send the job again for a new one."


class Timestamp(fields.DateTime):
    """Unix seconds, shown as RFC 3339 in UTC with milliseconds."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str | None:
        return None if value is None else rfc3339(value)

    def _deserialize(  # type: ignore[override]
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> float:
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (TypeError, ValueError, OverflowError) as error:
            raise ValidationError("Must be a time like 2024-12-18T10:00:00Z.") from error


class WholeSeconds(fields.Integer):
    """Seconds, rounded up."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> int | None:
        return None if value is None else math.ceil(value)


class Listed(Protocol):
    """What is shown in pages, newest first."""

    @property
    def id(self) -> str:
        """A UUID."""

    @property
    def created_at(self) -> float:
        """Unix seconds."""


class Cursor(fields.String):
    """The place after the last item of a page, as clients need not read it."""

    def _deserialize(  # type: ignore[override]
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> tuple[float, str]:
        try:
            created_at, item_id = json.loads(base64.urlsafe_b64decode(value))
            return float(created_at), str(uuid.UUID(item_id))
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValidationError("Must be the next_cursor of an earlier page.") from error

    @staticmethod
    def after(row: Listed) -> str:
        """The cursor of the page that follows the row."""
        return base64.urlsafe_b64encode(json.dumps([row.created_at, row.id]).encode()).decode()


def known_region(name: str) -> None:
    """Pass if there is such a region. Raises ValidationError with the near names."""
    settings: Settings = current_app.extensions["settings"]
    if name not in settings.regions:
        raise ValidationError(f"Unknown region. {near(name, settings.regions)}")


_region_example = {"example": "asia-east"}


class JobCreate(JobFields):
    """A job that a client asks for."""

    @validates("region")
    def _region(self, name: str | None, **_: Any) -> None:
        if name is not None:
            known_region(name)

    @post_load
    def _request(self, data: dict[str, Any], **_: Any) -> Request:
        job_type, name = JobType(data["type"]), data["model"]
        dispatch: Dispatch = current_app.extensions["dispatch"]
        try:
            model = None if name is None else dispatch.placement.model_id(job_type, name)
        except UnknownModel as error:
            raise ValidationError(str(error), "model") from error
        return Request(**{**data, "type": job_type, "model": model, "requested_model": name})


class CreateQuery(Schema):
    """Whether a job is really sent."""

    dry_run = fields.Boolean(
        load_default=False,
        metadata={"description": "true: say where the job would go, why, and how long it would wait; keep nothing."},
    )


class IdempotencyHeaders(Schema):
    """How a client makes a create safe to repeat."""

    idempotency_key = fields.String(
        data_key="Idempotency-Key",
        load_default=None,
        validate=validate.Regexp(r"^[\x21-\x7e]{1,255}$", error="Must be 1 to 255 visible ASCII characters."),
        metadata={"description": "The same key and body give the same job again; kept as long as the job."},
    )


class SyncQuery(Schema):
    """How long a sync request waits."""

    timeout = fields.Float(
        load_default=60.0,
        validate=validate.Range(min=0, min_inclusive=False, max=LONGEST_SYNC_S),
        metadata={"description": "Seconds to wait for the result; a job that has not begun by then is dropped."},
    )
    wait_for_worker = fields.Boolean(
        load_default=True, metadata={"description": "false: 503 at once when no live worker serves such a job."}
    )


class StreamQuery(Schema):
    """What becomes of a job whose client stops to listen."""

    cancel_on_disconnect = fields.Boolean(
        load_default=False,
        metadata={"description": "true: cancel the job if the client hangs up before the last event."},
    )


class EventsHeaders(Schema):
    """Where a client goes on."""

    last_event_id = fields.String(
        data_key="Last-Event-ID",
        load_default=None,
        metadata={
            "description": "The id of the last event that the client has; one that is none of ours counts for nothing."
        },
    )


class JobsQuery(Schema):
    """Which of one's jobs to list."""

    status = fields.Enum(JobState, by_value=True, load_default=None)
    type = fields.Enum(JobType, by_value=True, load_default=None)
    region = fields.String(load_default=None, validate=known_region, metadata=_region_example)
    created_after = Timestamp(load_default=None)
    limit = fields.Integer(load_default=50, validate=validate.Range(min=1, max=MOST_PER_PAGE))
    cursor = Cursor(load_default=None, metadata={"description": "next_cursor of the page before."})


class QueueQuery(Schema):
    """Which queues to count."""

    region = fields.String(load_default=None, validate=known_region, metadata=_region_example)


@dataclass(frozen=True, slots=True)
class Shown:
    """A job as a client is shown it."""

    row: JobRow
    place: Place
    #: What to do about it, where the answer is not the result.
    detail: str | None = None
    progress: Progress | None = None
    #: What the type gives, once it has completed.
    result: Mapping[str, Any] | None = None

    @property
    def error(self) -> JobError | None:
        """Why it did not complete."""
        return JobError(self.row.error_code, self.row.error_message or "") if self.row.error_code else None

    @property
    def warnings(self) -> list[str]:
        """What the client should know about how it is or was answered."""
        told = warnings(self.row.type, self.row.model, self.row.requested_model, self.result)
        return [*told, PRUNED] if self.row.status is JobState.COMPLETED and self.row.pruned_at is not None else told


class JobCreated(Schema):
    """A job that was accepted."""

    job_id = fields.UUID(attribute="row.id")
    status = fields.Enum(JobState, by_value=True, attribute="row.status")
    created_at = Timestamp(attribute="row.created_at")
    queue_position = fields.Integer(
        attribute="place.position", allow_none=True, metadata={"description": "1 is next; null where not known."}
    )
    estimated_wait_seconds = WholeSeconds(
        attribute="place.estimated_wait_s", allow_none=True, metadata={"description": "null where not known."}
    )


@dataclass(frozen=True, slots=True)
class DryRun:
    """Where a job would go, as a client is shown it."""

    origin: Origin
    forecast: Forecast


class DryRunView(Schema):
    """Where a job would go, and why."""

    region = fields.String(
        attribute="forecast.decision.region", metadata={"description": "Where it would be queued now."}
    )
    reason = fields.String(attribute="forecast.decision.reason", metadata={"description": "Why there."})
    client_region = fields.String(
        attribute="origin.region",
        metadata={"description": "The region it was wanted in: the client's own, or the job's."},
    )
    origin = fields.Enum(
        FoundBy,
        by_value=True,
        attribute="origin.found_by",
        metadata={
            "description": "How client_region was found: the job's `region`, a proxy's header, the operator's table of "
            "networks, the country of the address, or none of them."
        },
    )
    estimated_wait_seconds = WholeSeconds(
        attribute="forecast.decision.estimated_wait_s",
        allow_none=True,
        metadata={"description": "null where not known."},
    )
    queue_position = fields.Integer(
        attribute="forecast.position", allow_none=True, metadata={"description": "1 is next; null where not known."}
    )
    available_workers = fields.Integer(
        attribute="forecast.available_workers", metadata={"description": "Live workers there that would take it."}
    )
    model = fields.String(
        attribute="forecast.model",
        allow_none=True,
        metadata={"description": "The model that would run it; null where that depends on the worker, or nobody does."},
    )


class ErrorView(Schema):
    """Why a job did not complete."""

    code = fields.String()
    message = fields.String()


class ProgressView(Schema):
    """How far a running job has come."""

    done = fields.Integer()
    total = fields.Integer(allow_none=True, metadata={"description": "null where not known."})
    unit = fields.String(metadata={"example": "step", "description": "token, step, second, text, node"})
    percent = fields.Function(
        lambda progress: round(100 * progress.done / progress.total, 1) if progress.total else None,
        metadata={"type": "number", "nullable": True},
    )


class JobItem(JobCreated):
    """A job in a list: everything but its result."""

    type = fields.String(attribute="row.type")
    model = fields.String(
        attribute="row.model",
        allow_none=True,
        metadata={"description": "The model that must run it; null for any. Which one did is in the result."},
    )
    requested_model = fields.String(
        attribute="row.requested_model", allow_none=True, metadata={"description": "What the client called it."}
    )
    region = fields.String(attribute="row.region", metadata={"description": "Where it is queued, runs or ran."})
    worker_id = fields.String(attribute="row.worker_id", allow_none=True)
    started_at = Timestamp(attribute="row.started_at", allow_none=True)
    completed_at = Timestamp(attribute="row.completed_at", allow_none=True)
    priority = fields.Integer(attribute="row.priority")
    timeout_seconds = fields.Float(attribute="row.timeout_seconds")
    attempt = fields.Integer(
        attribute="row.attempt",
        metadata={"description": "Grows with every worker that was lost under it and every region it left."},
    )
    error = fields.Nested(ErrorView, allow_none=True)
    retry_of = fields.UUID(
        attribute="row.retry_of", allow_none=True, metadata={"description": "The job that it runs again."}
    )
    queued_reason = fields.String(
        attribute="place.reason", allow_none=True, metadata={"description": "Why it still waits."}
    )


class JobView(JobItem):
    """A job with its result."""

    progress = fields.Nested(ProgressView, allow_none=True, metadata={"description": "Of a running job."})
    warnings = fields.List(fields.String(), metadata={"description": "What to know about how it was answered."})
    result = fields.Raw(
        allow_none=True,
        metadata={
            "type": "object",
            "description": "What the type gives; null once it is no longer kept.",
            "additionalProperties": {},
        },
    )
    result_pruned_at = Timestamp(
        attribute="row.pruned_at",
        allow_none=True,
        metadata={"description": "Since when its input and result are no longer kept; null while they are."},
    )


class JobUnfinished(JobView):
    """A job that a sync request waited for in vain."""

    detail = fields.String(metadata={"description": "Why there is no result, and whether the job goes on."})


class JobList(Schema):
    """One page of jobs."""

    items = fields.List(fields.Nested(JobItem))
    next_cursor = fields.String(allow_none=True, metadata={"description": "null on the last page."})


class JobCancelled(Schema):
    """A job that is cancelled."""

    message = fields.String(metadata={"example": "Job cancelled"})
    job_id = fields.UUID()


class RegionStats(Schema):
    """One region's queues and workers now."""

    queued = fields.Integer()
    running = fields.Integer()
    available_workers = fields.Integer()
    oldest_wait_seconds = WholeSeconds(attribute="oldest_wait_s", allow_none=True)
    reachable = fields.Boolean(
        metadata={
            "description": "Whether its store answers; while it does not, the other figures are what is on record."
        }
    )


class QueueStats(Schema):
    """Queues and workers now."""

    total_queued = fields.Integer()
    available_workers = fields.Integer(metadata={"description": "Live workers that take new jobs."})
    estimated_wait_seconds = WholeSeconds(
        attribute="estimated_wait_s",
        allow_none=True,
        metadata={"description": "Of a new job of the slowest served type; null where not known."},
    )
    by_type = fields.Dict(fields.String(), fields.Integer())
    running = fields.Integer()
    oldest_wait_seconds = WholeSeconds(
        attribute="oldest_wait_s",
        allow_none=True,
        metadata={"description": "Since the oldest queued job was accepted; null where none waits."},
    )
    by_region = fields.Dict(fields.String(), fields.Nested(RegionStats))


class HealthView(Schema):
    """The process answers."""

    status = fields.String(metadata={"example": "ok"})


class ReadyView(Schema):
    """What the API needs, and how it is: "ok" or what is wrong."""

    status = fields.String(validate=validate.OneOf(["ready", "degraded", "unready"]))
    database = fields.String(metadata={"example": "ok"})
    regions = fields.Dict(fields.String(), fields.String(), metadata={"example": {"asia-east": "ok"}})


class ProblemView(Schema):
    """Why a request was not answered as asked (RFC 9457)."""

    type = fields.String(metadata={"example": "about:blank"})
    title = fields.String(metadata={"example": "Unprocessable Entity"})
    status = fields.Integer(metadata={"example": 422})
    detail = fields.String(metadata={"example": "params.max_tokens: Must be greater than or equal to 1."})
    code = fields.String(metadata={"example": "validation_failed", "description": "For programs; never changes."})
    request_id = fields.String()
    job_status = fields.String(
        metadata={"example": "completed", "description": "With code job_ended: what became of the job."}
    )
    errors = fields.Dict(
        fields.String(),
        fields.List(fields.String()),
        metadata={
            "description": "With 422: messages by the dotted path of each field.",
            "example": {"params.messages.0.role": ["Must be one of: system, user, assistant."]},
        },
    )
