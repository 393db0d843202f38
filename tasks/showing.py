"""What a client is shown of a job, the same by the API and by a direct worker."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from engines import catalogue
from engines.catalogue import JobType


def rfc3339(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def warnings(
    job_type: JobType, model: str | None, requested_model: str | None, result: Mapping[str, Any] | None
) -> list[str]:
    """What the client should know about how its job is or was answered.

    model: the one that must run it, and requested_model what the client called it.
    """
    told: list[str] = []
    if model and requested_model and (known := catalogue.known(job_type, model)):
        told += filter(None, [catalogue.warning(known, requested_model)])
    return told + [text for text in (result or {}).get("warnings", []) if text not in told]
