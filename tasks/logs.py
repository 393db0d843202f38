"""How a process of the platform logs: lines for people, or with LOG_FORMAT=json one JSON object a line.

What a line is about (job_id, request_id) is bound once, where the job or the request is taken up, so that the lines of
libraries carry it too.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from tasks.settings import SettingsError

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FORMATS = ("text", "json")

_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


@contextmanager
def of_job(job_id: str) -> Iterator[None]:
    """What this thread logs meanwhile is about the job."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def of_request(request_id: str | None, job_id: str | None = None) -> None:
    """What this thread logs from now on is about the request, and about the job that it names; None for none."""
    _request_id.set(request_id)
    _job_id.set(job_id)


def set_up(level: int, environ: Mapping[str, str], filename: str | None = None) -> None:
    """Log to standard error, or to a file, as LOG_FORMAT says; a process that logs already goes on as it does.

    Raises SettingsError.
    """
    handler: logging.Handler = logging.FileHandler(filename) if filename else logging.StreamHandler()
    handler.setFormatter(_formatter(environ))
    handler.addFilter(_bind)
    logging.basicConfig(level=level, handlers=[handler])
    # Else they would be text among the objects.
    logging.captureWarnings(is_json(environ))


def is_json(environ: Mapping[str, str]) -> bool:
    """Whether lines are JSON objects. Raises SettingsError."""
    said = environ.get("LOG_FORMAT", "").strip().lower() or FORMATS[0]
    if said not in FORMATS:
        raise SettingsError(f"LOG_FORMAT must be one of {', '.join(FORMATS)}, not {said!r}.")
    return said == "json"


def _formatter(environ: Mapping[str, str]) -> logging.Formatter:
    if not is_json(environ):
        return logging.Formatter(TEXT)
    # Only here: lines for people need nothing of it.
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        # What Celery hangs on its records: a task's arguments and what it returned.
        reserved_attrs=[*RESERVED_ATTRS, "data"],
        json_ensure_ascii=False,
    )


def _bind(record: logging.LogRecord) -> bool:
    # Celery's own lines about a task are written outside of it, and say its id beside their text.
    about = getattr(record, "data", None)
    job_id = _job_id.get() or (about.get("id") if isinstance(about, dict) else None)
    for name, value in (("job_id", job_id), ("request_id", _request_id.get())):
        if value is not None:
            setattr(record, name, value)
    return True
