"""A call of these routes as jobs: sent, waited for, and cancelled when its client hangs up."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flask import request
from marshmallow import EXCLUDE, ValidationError, fields, post_load, validate

from app.auth import caller
from app.dispatch import Dispatch
from app.job_table import JobRow
from app.openai.errors import ModelLoading, ModelNotFound, NoResult
from app.parsing import refusal
from app.request import Request
from app.schemas import LONGEST_SYNC_S, IdempotencyHeaders, known_region
from app.submission import admit, check_worker, dispatch_here, located, turn, verdict
from engines.catalogue import JobType, UnknownModel
from engines.schemas import load_params
from tasks.fleet import WorkerState
from tasks.job import JobState
from tasks.reading import as_mapping
from tasks.routing import PRIORITIES

#: How long a call takes at most where it does not say, as its job would by itself.
TIMEOUT_S = 300.0
#: For how long a call waits for a worker that loads its model, how often it looks, and when to ask again.
LOADING_S = 20.0
LOADING_LOOK_S = 0.5
LOADING_RETRY_S = 10
#: How often a call that waits looks whether its client is still there.
HANG_UP_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """How a client wants its call carried out, by its headers."""

    priority: int
    region: str | None
    #: Seconds that its jobs may wait, and may run.
    timeout_s: float
    idempotency_key: str | None

    def asks(self, job_type: JobType, model: str, params: Mapping[str, Any]) -> Request:
        """The job for validated params. Raises ModelNotFound."""
        any_model = model.casefold() == job_type
        try:
            model_id = None if any_model else dispatch_here().placement.model_id(job_type, model)
        except UnknownModel as error:
            raise ModelNotFound(str(error)) from error
        wanted = Request(
            job_type,
            model_id,
            None if any_model else model,
            params,
            self.priority,
            self.region,
            allow_cross_region=True,
            timeout_seconds=self.timeout_s,
            # What nobody waits for any more is not begun.
            queue_timeout_seconds=self.timeout_s,
        )
        return located(wanted)[0]

    def submit(self, wanted: Request, number: int = 0) -> JobRow:
        """Send the call's job of that number, from 0. Raises Busy, TooMany, Unavailable or IdempotencyConflict."""
        key = self.idempotency_key
        if key and number:
            key = hashlib.sha256(f"{number} {key}".encode()).hexdigest()
        admit()
        return dispatch_here().submit(caller().owner, wanted, idempotency_key=key, must_send=True).row


class CallHeaders(IdempotencyHeaders):
    """How a call is carried out."""

    class Meta:
        unknown = EXCLUDE

    priority = fields.Integer(
        data_key="X-Priority",
        load_default=0,
        validate=validate.Range(min=PRIORITIES[0], max=PRIORITIES[-1]),
        metadata={"description": "Higher is sooner; first in first out within one."},
    )
    region = fields.String(
        data_key="X-Region",
        load_default=None,
        validate=known_region,
        metadata={"example": "asia-east", "description": "Preferred region; left out, the platform chooses."},
    )
    timeout_s = fields.Float(
        data_key="X-Timeout",
        load_default=TIMEOUT_S,
        validate=validate.Range(min=0, min_inclusive=False, max=LONGEST_SYNC_S),
        metadata={"description": "Seconds that the call waits for its answer."},
    )

    @post_load
    def _call(self, data: dict[str, Any], **_: Any) -> Call:
        return Call(**data)


@dataclass(frozen=True, slots=True)
class Done:
    """A completed job and what it gave."""

    row: JobRow
    result: dict[str, Any]


def params_for(job_type: JobType, params: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The params as the job type loads them, without those that are None. Raises Invalid by OpenAI's names.

    names: the fields of the request that params of another name come from.
    """
    try:
        return load_params(job_type, {name: value for name, value in params.items() if value is not None})
    except ValidationError as error:
        raise refusal({(names or {}).get(name, name): text for name, text in as_mapping(error).items()}) from error


def run(call: Call, wanted: Sequence[Request]) -> list[Done]:
    """Run the jobs of one call and wait for all of them.

    Raises NoResult for the first that has none, and cancels the others.
    """
    await_worker(wanted[0])
    dispatch = dispatch_here()
    rows: list[JobRow] = []
    done: list[Done] = []
    end = time.monotonic() + call.timeout_s
    with turn():
        try:
            for number, one in enumerate(wanted):
                rows.append(call.submit(one, number))
            for row in rows:
                done.append(_result(dispatch, _wait(dispatch, row, end), call.timeout_s))
        except Exception:
            for row in rows[len(done) :]:
                # One that timed out goes on, as its answer says: a call of one job names it.
                if len(rows) > 1:
                    dispatch.cancel(row)
            raise
    return done


def job_ids(done: Sequence[Done]) -> dict[str, str]:
    """The header that names the jobs of a call."""
    return {"X-Job-Id": ", ".join(one.row.id for one in done)}


def await_worker(wanted: Request) -> None:
    """Pass if a live worker may take the job, or as soon as one that loads its model can.

    Raises ModelLoading if it takes too long, and Busy at once where nobody will.
    """
    dispatch = dispatch_here()
    end = time.monotonic() + LOADING_S
    while not dispatch.placement.has_worker(wanted):
        node = next(
            (
                card.name
                for card in dispatch.placement.cards()
                if card.state is WorkerState.LOADING
                and wanted.type in card.slots
                and wanted.model in (None, card.models.get(wanted.type))
            ),
            None,
        )
        if node is None:
            check_worker(wanted)
            return
        if hung_up() or time.monotonic() > end:
            raise ModelLoading(wanted.model or str(wanted.type), node=node, retry_after_s=LOADING_RETRY_S)
        time.sleep(LOADING_LOOK_S)


def hung_up() -> bool:
    """Whether the client of this request is gone."""
    look = request.environ.get("waitress.client_disconnected")
    return look is not None and bool(look())


def failure(row: JobRow, timeout_s: float) -> NoResult | None:
    """Why there is no result of a job that was waited for; None if there is."""
    status, detail = verdict(row, timeout_s)
    if detail is None:
        return None
    if row.error_code == "invalid_input":
        # The job's own fault: a prompt beyond the model's context, say.
        status = 400
    return NoResult(status, row.error_code or f"job_{row.status}", detail, row.id)


def _wait(dispatch: Dispatch, row: JobRow, end: float) -> JobRow:
    """The row once its job has ended, or when the call has; cancelled if its client hung up."""
    while not row.ended and (left := end - time.monotonic()) > 0:
        row = dispatch.wait(row, min(left, HANG_UP_LOOK_S))
        if not row.ended and hung_up():
            return dispatch.cancel(row)
    return dispatch.give_up(row) if row.status is JobState.QUEUED else row


def _result(dispatch: Dispatch, row: JobRow, timeout_s: float) -> Done:
    if (problem := failure(row, timeout_s)) is not None:
        raise problem
    result = dispatch.result(row)
    if result is None:
        raise NoResult(500, "result_pruned", "It completed, and its result is no longer kept.", row.id)
    return Done(row, result)


def replaced(wanted: Request, **params: Any) -> Request:
    """The same job with other params."""
    return replace(wanted, params={**wanted.params, **params})
