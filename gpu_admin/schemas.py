"""What the API takes and gives; the seed's names live here and nowhere deeper."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from gpu_admin.contract import InstanceStatus

#: Most lines of a server's log that one request may have.
MOST_LINES = 10_000
#: More GPUs than any host has; what is there says the host.
_GPU_ID = validate.Range(min=0, max=65_535)


class Whole(fields.Integer):
    """A JSON integer: no text, no fraction, no truth value."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValidationError("Must be an integer.")
        return value


class Truth(fields.Boolean):
    """true or false, and no other word for it."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ValidationError("Must be true or false.")
        return value


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
            raise ValidationError("Must be a time like 2024-01-01T00:00:00.000Z.") from error


def rfc3339(seconds: float) -> str:
    """2024-01-01T00:00:00.000Z for unix seconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_model = {"example": "MAM"}
_gpu = {"example": 0, "description": "As NVML numbers the host's GPUs."}


class StopRequest(Schema):
    """Which model, on which GPU."""

    class Meta:
        unknown = RAISE

    model_name = fields.String(required=True, validate=validate.Length(min=1, max=64), metadata=_model)
    gpu_id = Whole(required=True, validate=_GPU_ID, metadata=_gpu)


class StartRequest(StopRequest):
    """Which model, on which GPU, and how."""

    config = fields.Dict(
        keys=fields.String(),
        load_default=dict,
        allow_none=True,
        metadata={"description": "Options of the model's runner; docs/gpu_admin.md lists them.", "example": {}},
    )
    force = Truth(
        load_default=False,
        metadata={"description": "Start it although its stated memory does not fit.", "example": False},
    )


class KillQuery(Schema):
    """Which process of that number."""

    started_at = Timestamp(
        load_default=None,
        metadata={"description": "As GET /api/v1/gpus shows it: a process that has its number since is left alone."},
    )


class LogQuery(Schema):
    """Which lines."""

    tail = fields.Integer(load_default=100, validate=validate.Range(min=1, max=MOST_LINES))
    gpu_id = fields.Integer(load_default=None, validate=_GPU_ID, metadata={"description": "Of the instance there."})


class ErrorView(Schema):
    """What every error looks like."""

    detail = fields.String(required=True)


class Welcome(Schema):
    """The service is there."""

    status = fields.String(metadata={"example": "ok"})
    message = fields.String()


class ModelInstanceInfo(Schema):
    """A model, and its instance on the GPU that was asked for."""

    model_name = fields.String(metadata=_model)
    model_type = fields.String(metadata={"description": "Its runner.", "example": "triton"})
    active_gpu_ids = fields.List(
        fields.Integer(), metadata={"description": "Where it runs or is about to.", "example": [0]}
    )
    total_instances = fields.Integer(metadata={"description": "Copies on all of those.", "example": 8})
    status = fields.Enum(InstanceStatus, by_value=True, metadata={"description": "On the GPU that was asked for."})
    pid = fields.Integer(allow_none=True, metadata={"description": "Its server's main process."})
    port = fields.Integer(allow_none=True, metadata={"description": "Where its server listens.", "example": 8000})
    created_at = Timestamp()
    updated_at = Timestamp()
    gpu_id = fields.Integer(metadata=_gpu)
    reason = fields.String(allow_none=True, metadata={"description": "Why it is in ERROR, or what else to know."})


class ModelStatusItem(Schema):
    """A model on a GPU."""

    model_name = fields.String(metadata=_model)
    model_type = fields.String(metadata={"example": "triton"})
    gpu_id = fields.Integer(metadata=_gpu)
    status = fields.Enum(InstanceStatus, by_value=True)


class ModelInstanceView(ModelStatusItem):
    """All that is known of a model on a GPU."""

    gpu_ids = fields.List(fields.Integer(), metadata={"description": "Several where one server spans them."})
    reason = fields.String(allow_none=True)
    pid = fields.Integer(allow_none=True)
    port = fields.Integer(allow_none=True)
    gpu_memory_mib = fields.Float(allow_none=True, metadata={"description": "What its processes hold; null: unknown."})
    memory_gib = fields.Float(allow_none=True, metadata={"description": "What it was said to take on each GPU."})
    since = Timestamp(metadata={"description": "When it came to its status."})
    created_at = Timestamp(metadata={"description": "When it was ordered."})


class SupportedModelView(Schema):
    """A model that can be started."""

    model_name = fields.String(metadata=_model)
    model_type = fields.String(metadata={"example": "triton"})
    instances_per_gpu = fields.Integer(metadata={"example": 8})
    memory_gib = fields.Float(allow_none=True, metadata={"description": "On each GPU; null where nobody stated it."})


class LogView(Schema):
    """The last lines of a model's server, oldest first."""

    model_name = fields.String(metadata=_model)
    lines = fields.List(fields.String())


class ProcessView(Schema):
    """A process that holds memory of a GPU."""

    pid = fields.Integer(metadata={"example": 12345})
    name = fields.String(metadata={"example": "tritonserver"})
    gpu_memory_usage = fields.Integer(allow_none=True, metadata={"description": "MiB.", "example": 4096})
    started_at = Timestamp(allow_none=True, metadata={"description": "null where the host cannot tell."})


class GPUInfo(Schema):
    """One GPU; what the card does not report is null."""

    id = fields.Integer(metadata={"example": 0})
    memory_usage = fields.Float(allow_none=True, metadata={"description": "Per cent.", "example": 45.5})
    power_draw = fields.Float(allow_none=True, metadata={"description": "Watt.", "example": 150.7})
    processes = fields.List(fields.Nested(ProcessView))
    name = fields.String(allow_none=True)
    uuid = fields.String(allow_none=True)
    memory_total = fields.Float(allow_none=True, metadata={"description": "MiB."})
    memory_used = fields.Float(allow_none=True, metadata={"description": "MiB."})
    utilization = fields.Float(allow_none=True, metadata={"description": "Per cent."})
    temperature = fields.Float(allow_none=True, metadata={"description": "Degrees Celsius."})
    error = fields.String(allow_none=True, metadata={"description": "Why the card cannot be read."})


class KillProcessResponse(Schema):
    """A process that is gone."""

    pid = fields.Integer(metadata={"example": 12345})
    status = fields.String(metadata={"example": "killed"})
    message = fields.String()
