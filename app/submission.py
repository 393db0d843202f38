"""Taking a job in for the caller of this request: what every route that sends one does alike."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import assert_never

from flask import current_app

from app.auth import caller
from app.dispatch import Dispatch
from app.errors import Busy, Invalid
from app.job_table import JobRow
from app.limits import QueueCap
from app.origin import HEADER, Origin, UnknownRegion, find_here
from app.request import Request
from tasks.job import JobState

#: When to ask again where no worker is live: a worker needs about this long to load a small model.
NO_WORKER_RETRY_S = 10
TOO_MANY_RETRY_S = 1


def dispatch_here() -> Dispatch:
    """The app's Dispatch."""
    dispatch: Dispatch = current_app.extensions["dispatch"]
    return dispatch


def located(wanted: Request) -> tuple[Request, Origin]:
    """The request with the region of its client, and how that was found. Raises Invalid."""
    try:
        origin = find_here(wanted.region)
    except UnknownRegion as error:
        raise Invalid({HEADER: [str(error)]}) from error
    return replace(wanted, client_region=origin.region), origin


def check_worker(wanted: Request) -> None:
    """Pass if a live worker may take such a job now. Raises Busy."""
    if not dispatch_here().placement.has_worker(wanted):
        what = wanted.type if wanted.model is None else f"{wanted.type} with {wanted.model}"
        detail = f"No live worker serves {what} where this job may run; nothing was submitted."
        raise Busy("no_worker", detail, retry_after_s=NO_WORKER_RETRY_S)


def admit() -> None:
    """Pass if the caller may queue one job more. Raises TooMany."""
    cap: QueueCap = current_app.extensions["queue_cap"]
    cap.admit(caller())


def take_turn() -> Callable[[], None]:
    """Take one of the turns of requests that wait for their job; gives it back when called. Raises Busy."""
    turns: threading.Semaphore = current_app.extensions["sync_turns"]
    if not turns.acquire(blocking=False):
        detail = "Too many requests wait for their jobs; send it with POST /api/v1/jobs, which does not wait."
        raise Busy("too_many_waiting", detail, retry_after_s=TOO_MANY_RETRY_S)
    return turns.release


@contextmanager
def turn() -> Iterator[None]:
    """Wait for a job within it. Raises Busy."""
    give_back = take_turn()
    try:
        yield
    finally:
        give_back()


def verdict(row: JobRow, timeout_s: float) -> tuple[int, str | None]:
    """The HTTP status of an answer that waited for the job, and what to say where it is not the result."""
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
