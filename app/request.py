"""What a client wants done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.rows import fingerprint_of
from engines.catalogue import JobType


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, validated."""

    type: JobType
    #: The catalogue's id of the model that must run it, and what the client called it; None for any model.
    model: str | None
    requested_model: str | None
    params: Mapping[str, Any]
    priority: int
    region: str | None
    allow_cross_region: bool
    timeout_seconds: float
    queue_timeout_seconds: float | None
    #: Where its client is, for one that names no region; None for the default region.
    client_region: str | None = None
    #: The job that it runs again.
    retry_of: str | None = None

    def fingerprint(self) -> str:
        """Of what is to be done; how long a client waits, and from where it asks, may differ when it asks again."""
        may_differ = ("queue_timeout_seconds", "client_region", "retry_of")
        return fingerprint_of({key: value for key, value in asdict(self).items() if key not in may_differ})
