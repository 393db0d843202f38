"""The jobs resource: create, run, read, cancel, list, count."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

from flask import Response, jsonify, url_for

from app import examples
from app.audit import note_foreign
from app.auth import caller, requires
from app.dispatch import Submitted
from app.errors import JobEnded, JobNotFound, NotAgain
from app.job_table import JobRow
from app.keys import Scope
from app.parsing import Blueprint
from app.request import Request
from app.schemas import (
    CreateQuery,
    Cursor,
    DryRun,
    DryRunView,
    EventsHeaders,
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
    StreamQuery,
    SyncQuery,
)
from app.streams import END, sse, streams_here
from app.submission import admit, check_worker, dispatch_here, located, take_turn, turn, verdict
from app.waiting import Place, Statistics
from tasks.job import JobState

blueprint = Blueprint("jobs", __name__, url_prefix="/api/v1/jobs", description="Send inference jobs, follow them.")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

_RETRYABLE = frozenset({JobState.FAILED, JobState.TIMEOUT, JobState.CANCELLED})

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
    dispatch = dispatch_here()
    wanted, origin = located(wanted)
    if query["dry_run"]:
        return jsonify(_DRY_RUN.dump(DryRun(origin, dispatch.placement.forecast(wanted))))
    admit()
    submitted = dispatch.submit(caller().owner, wanted, idempotency_key=headers["idempotency_key"])
    return _accepted(submitted)


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
    dispatch = dispatch_here()
    wanted, _ = located(wanted)
    timeout_s: float = query["timeout"]
    if not query["wait_for_worker"]:
        check_worker(wanted)
    admit()
    # What nobody waits for any more is not begun.
    wanted = replace(wanted, queue_timeout_seconds=min(wanted.queue_timeout_seconds or timeout_s, timeout_s))
    with turn():
        submitted = dispatch.submit(caller().owner, wanted, idempotency_key=headers["idempotency_key"], must_send=True)
        row = dispatch.wait(submitted.row, timeout_s)
        if row.status is JobState.QUEUED:
            row = dispatch.give_up(row)
    extra = {"X-Job-Id": row.id}
    if submitted.replayed:
        extra["Idempotent-Replayed"] = "true"
    status, reason = verdict(row, timeout_s)
    if reason is None:
        return Shown(row, Place(), result=dispatch.result(row)), status, extra
    # OpenAI's clients would send a job that failed or takes long twice more.
    extra["x-should-retry"] = "false"
    return (
        jsonify(_UNFINISHED.dump(Shown(row, dispatch.placement.place(row), reason, dispatch.progress(row)))),
        status,
        extra,
    )


@blueprint.post("/stream")
@requires(Scope.INFER)
@blueprint.arguments(StreamQuery(), location="query")
@blueprint.arguments(IdempotencyHeaders(), location="headers")
@blueprint.arguments(JobCreate(), examples=examples.JOBS)
@blueprint.doc(responses={"200": examples.EVENTS})
def stream(query: dict[str, Any], headers: dict[str, Any], wanted: Request) -> Response:
    """Send a job and follow it: server-sent events from its place in the queue to its result.

    The answer is 200 whatever becomes of the job: its last event is `result` or `error`. A client that was cut off
    goes on with GET /api/v1/jobs/{X-Job-Id}/events and Last-Event-ID. Safe to repeat with an Idempotency-Key.
    """
    dispatch = dispatch_here()
    wanted, _ = located(wanted)
    admit()
    give_back = take_turn()
    try:
        submitted = dispatch.submit(caller().owner, wanted, idempotency_key=headers["idempotency_key"])
    except BaseException:
        give_back()
        raise
    row = submitted.row
    extra = {"X-Job-Id": row.id, "Content-Location": url_for("jobs.events", job_id=row.id)}
    if submitted.replayed:
        extra["Idempotent-Replayed"] = "true"
    on_hang_up = partial(dispatch.cancel, row) if query["cancel_on_disconnect"] else None
    return sse(streams_here().follow(row), on_hang_up=on_hang_up, on_close=give_back, headers=extra)


@blueprint.get("/<job_id>/events")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(EventsHeaders(), location="headers")
@blueprint.doc(responses={"200": examples.EVENTS, "204": {"description": "The client has had the last event."}})
def events(headers: dict[str, Any], job_id: str) -> Response:
    """Follow a job: server-sent events, from now to its result.

    `status` (`running` begins an answer anew), `progress`, `token`; last `result` or `error`. Works for a job in any
    state. With Last-Event-ID it goes on behind that event, without loss or repeat, for as long as the job runs and a
    minute longer.
    """
    row = _find(job_id)
    after = headers["last_event_id"]
    if after == END and row.ended:
        # Browsers come back until they are told to stop.
        return Response(status=204)
    give_back = take_turn()
    return sse(streams_here().follow(row, after), on_close=give_back, headers={"X-Job-Id": row.id})


@blueprint.get("/<job_id>")
@requires(Scope.INFER, Scope.READ)
@blueprint.response(200, JobView)
def show(job_id: str) -> Shown:
    """One job, with its result once it has completed."""
    row, dispatch = _find(job_id), dispatch_here()
    return Shown(row, dispatch.placement.place(row), progress=dispatch.progress(row), result=dispatch.result(row))


@blueprint.delete("/<job_id>")
@requires(Scope.INFER)
@blueprint.response(200, JobCancelled)
@blueprint.alt_response(409, "CONFLICT")
def cancel(job_id: str) -> dict[str, str]:
    """Cancel a job, queued or running.

    To cancel it again is fine; 409 if it had ended otherwise.
    """
    row = dispatch_here().cancel(_find(job_id))
    if row.status is not JobState.CANCELLED:
        raise JobEnded(row.id, row.status)
    return {"message": "Job cancelled", "job_id": row.id}


@blueprint.post("/<job_id>/retry")
@requires(Scope.INFER)
@blueprint.arguments(IdempotencyHeaders(), location="headers")
@blueprint.response(202, JobCreated, headers={"Location": {"schema": {"type": "string"}}})
@blueprint.alt_response(409, description="It has not failed, timed out or been cancelled; or its input is gone.")
def retry(headers: dict[str, Any], job_id: str) -> Any:
    """Run a job again that failed, timed out or was cancelled: a new job of the same owner, with the same request.

    Its `retry_of` names the old one, which stays as it is. Safe to repeat with an Idempotency-Key.
    """
    dispatch, row = dispatch_here(), _find(job_id)
    if row.status not in _RETRYABLE:
        detail = f"Job {row.id} is {row.status}; only one that failed, timed out or was cancelled can be run again."
        raise NotAgain("job_not_retryable", detail, row.status)
    wanted = dispatch.again(row)
    if wanted is None:
        detail = f"The input of job {row.id} is no longer kept; send it anew with POST /api/v1/jobs."
        raise NotAgain("input_pruned", detail, row.status)
    admit()
    submitted = dispatch.submit(row.owner, wanted, idempotency_key=headers["idempotency_key"])
    return _accepted(submitted)


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(JobsQuery(), location="query")
@blueprint.response(200, JobList)
def index(query: dict[str, Any]) -> dict[str, Any]:
    """One's own jobs, newest first, without their results."""
    before = query.pop("cursor")
    limit = query.pop("limit")
    rows = dispatch_here().rows.page(caller().sees, **query, limit=limit + 1, before=before)
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
    return dispatch_here().statistics(query["region"])


def _find(job_id: str) -> JobRow:
    row = dispatch_here().look(job_id.lower(), caller().sees) if _UUID.fullmatch(job_id) else None
    if row is None:
        raise JobNotFound(job_id)
    if row.owner != caller().owner:
        note_foreign(row.owner)
    return row


def _accepted(submitted: Submitted) -> Any:
    """202: the job as it stands, and where to look for it."""
    row = submitted.row
    extra = {"Location": url_for("jobs.show", job_id=row.id), "X-Job-Id": row.id}
    if submitted.replayed:
        extra["Idempotent-Replayed"] = "true"
    place = dispatch_here().placement.place(row, submitted.standing, newest=not submitted.replayed)
    return Shown(row, place), 202, extra
