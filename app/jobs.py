"""The jobs resource: create, run, read, cancel, list, count."""

import re
import threading
from dataclasses import replace
from typing import Any, assert_never

from flask import current_app, jsonify, url_for

from app import examples
from app.audit import note_foreign
from app.auth import caller, requires
from app.dispatch import Dispatch, Place, Request, Statistics
from app.errors import Busy, Invalid, JobEnded, JobNotFound
from app.keys import Scope
from app.limits import QueueCap
from app.origin import HEADER, Origin, UnknownRegion, find_here
from app.parsing import Blueprint
from app.rows import JobRow
from app.schemas import (
    CreateQuery,
    Cursor,
    DryRun,
    DryRunView,
    IdempotencyHeaders,
    JobCancelled,
    JobCreate,
    JobCreated,
    JobList,
    JobsQuery,
    JobUnfinished,
    JobView,
    QueueQuery,
    QueueStats,
    Shown,
    SyncQuery,
)
from tasks.job import JobState

blueprint = Blueprint("jobs", __name__, url_prefix="/api/v1/jobs", description="Send inference jobs, follow them.")

#: When to ask again where no worker is live: a worker needs about this long to load a small model.
NO_WORKER_RETRY_S = 10
TOO_MANY_RETRY_S = 1

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

_DRY_RUN = DryRunView()
_UNFINISHED = JobUnfinished()


@blueprint.post("")
@requires(Scope.INFER)
@blueprint.arguments(CreateQuery(), location="query")
@blueprint.arguments(IdempotencyHeaders(), location="headers")
@blueprint.arguments(JobCreate(), examples=examples.JOBS)
@blueprint.response(202, JobCreated, headers={"Location": {"schema": {"type": "string"}}})
@blueprint.alt_response(
    200, schema=DryRunView, examples=examples.DRY_RUNS, description="With dry_run: where it would go, and why."
)
def create(query: dict[str, Any], headers: dict[str, Any], wanted: Request) -> Any:
    """Send a job and return at once.

    Poll the job at Location. Safe to repeat with an Idempotency-Key. With dry_run=true nothing is sent or kept.
    """
    dispatch = _dispatch()
    wanted, origin = _located(wanted)
    if query["dry_run"]:
        return jsonify(_DRY_RUN.dump(DryRun(origin, dispatch.forecast(wanted))))
    _queue_cap().admit(caller())
    submitted = dispatch.submit(caller().owner, wanted, idempotency_key=headers["idempotency_key"])
    row = submitted.row
    extra = {"Location": url_for("jobs.show", job_id=row.id), "X-Job-Id": row.id}
    if submitted.replayed:
        extra["Idempotent-Replayed"] = "true"
    return Shown(row, dispatch.place(row, submitted.standing)), 202, extra


@blueprint.post("/sync")
@requires(Scope.INFER)
@blueprint.arguments(SyncQuery(), location="query")
@blueprint.arguments(IdempotencyHeaders(), location="headers")
@blueprint.arguments(JobCreate(), examples=examples.JOBS)
@blueprint.response(200, JobView, headers={"X-Job-Id": {"schema": {"type": "string"}}})
@blueprint.alt_response(409, schema=JobUnfinished, description="It was cancelled.")
@blueprint.alt_response(500, schema=JobUnfinished, description="It failed; `error` says why.")
@blueprint.alt_response(504, schema=JobUnfinished, description="It timed out, or goes on; `detail` says which.")
def run(query: dict[str, Any], headers: dict[str, Any], wanted: Request) -> Any:
    """Send a job and wait for its result."""
    dispatch = _dispatch()
    wanted, _ = _located(wanted)
    timeout_s: float = query["timeout"]
    if not query["wait_for_worker"] and not dispatch.has_worker(wanted):
        detail = f"No live worker serves {wanted.type} where this job may run; nothing was submitted."
        raise Busy("no_worker", detail, retry_after_s=NO_WORKER_RETRY_S)
    _queue_cap().admit(caller())
    # What nobody waits for any more is not begun.
    wanted = replace(wanted, queue_timeout_seconds=min(wanted.queue_timeout_seconds or timeout_s, timeout_s))
    turns: threading.Semaphore = current_app.extensions["sync_turns"]
    if not turns.acquire(blocking=False):
        detail = "Too many requests wait for their jobs; send it with POST /api/v1/jobs, which does not wait."
        raise Busy("too_many_waiting", detail, retry_after_s=TOO_MANY_RETRY_S)
    try:
        submitted = dispatch.submit(caller().owner, wanted, idempotency_key=headers["idempotency_key"], must_send=True)
        row = dispatch.wait(submitted.row, timeout_s)
        if row.status is JobState.QUEUED:
            row = dispatch.give_up(row)
    finally:
        turns.release()
    extra = {"X-Job-Id": row.id}
    if submitted.replayed:
        extra["Idempotent-Replayed"] = "true"
    status, reason = _verdict(row, timeout_s)
    if reason is None:
        return Shown(row, Place(), result=dispatch.result(row)), status, extra
    # OpenAI's clients would send a job that failed or takes long twice more.
    extra["x-should-retry"] = "false"
    return jsonify(_UNFINISHED.dump(Shown(row, dispatch.place(row), reason, dispatch.progress(row)))), status, extra


@blueprint.get("/<job_id>")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, JobView)
def show(job_id: str) -> Shown:
    """One job, with its result once it has completed."""
    row, dispatch = _find(job_id), _dispatch()
    return Shown(row, dispatch.place(row), progress=dispatch.progress(row), result=dispatch.result(row))


@blueprint.delete("/<job_id>")
@requires(Scope.INFER)
@blueprint.response(200, JobCancelled)
@blueprint.alt_response(409, "CONFLICT")
def cancel(job_id: str) -> dict[str, str]:
    """Cancel a job, queued or running.

    To cancel it again is fine; 409 if it had ended otherwise.
    """
    row = _dispatch().cancel(_find(job_id))
    if row.status is not JobState.CANCELLED:
        raise JobEnded(row.id, row.status)
    return {"message": "Job cancelled", "job_id": row.id}


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(JobsQuery(), location="query")
@blueprint.response(200, JobList)
def index(query: dict[str, Any]) -> dict[str, Any]:
    """One's own jobs, newest first, without their results."""
    before = query.pop("cursor")
    limit = query.pop("limit")
    rows = _dispatch().rows.page(caller().sees, **query, limit=limit + 1, before=before)
    page = rows[:limit]
    if foreign := next((row.owner for row in page if row.owner != caller().owner), None):
        note_foreign(f"{foreign} and others")
    return {
        "items": [Shown(row, Place()) for row in page],
        "next_cursor": Cursor.after(page[-1]) if len(rows) > limit else None,
    }


@blueprint.get("/stats/queue")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(QueueQuery(), location="query")
@blueprint.response(200, QueueStats)
def statistics(query: dict[str, Any]) -> Statistics:
    """What waits and who works, in one region or in all."""
    return _dispatch().statistics(query["region"])


def _dispatch() -> Dispatch:
    dispatch: Dispatch = current_app.extensions["dispatch"]
    return dispatch


def _queue_cap() -> QueueCap:
    cap: QueueCap = current_app.extensions["queue_cap"]
    return cap


def _located(wanted: Request) -> tuple[Request, Origin]:
    """The request with the region of its client, and how that was found."""
    try:
        origin = find_here(wanted.region)
    except UnknownRegion as error:
        raise Invalid({HEADER: [str(error)]}) from error
    return replace(wanted, client_region=origin.region), origin


def _find(job_id: str) -> JobRow:
    row = _dispatch().look(job_id.lower(), caller().sees) if _UUID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound(job_id)
    if row.owner != caller().owner:
        note_foreign(row.owner)
    return row


def _verdict(row: JobRow, timeout_s: float) -> tuple[int, str | None]:
    """The HTTP status of a sync answer, and what to say where it is not the result."""
    match row.status:
        case JobState.COMPLETED:
            return 200, None
        case JobState.FAILED:
            return 500, row.error_message or "The job failed."
        case JobState.CANCELLED:
            return 409, "The job was cancelled."
        case JobState.TIMEOUT:
            return 504, row.error_message or "The job timed out."
        case JobState.QUEUED:
            return 504, f"No worker has begun it within {timeout_s:g} s. It is at /api/v1/jobs/{row.id}."
        case JobState.RUNNING:
            return 504, f"Not done within {timeout_s:g} s; it goes on. Its result will be at /api/v1/jobs/{row.id}."
        case _:
            assert_never(row.status)
