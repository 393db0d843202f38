"""Direct mode: the worker's own small HTTP server, for clients that bring a job and a token for it.

It speaks the jobs API's shapes (POST /api/v1/jobs/sync, and /api/v1/jobs/stream for text as it is written). A job that
comes this way takes a slot like any other, is in the ledger while it runs, and gets its row from there; it has no place
in a queue and is never handed to another worker. Its client's hanging up cancels it.

    401 token_required, token_refused, token_expired, token_used      403 token_elsewhere
    400, 413, 415, 422 as the API                                     409 wrong_type, wrong_region, wrong_model
    503 busy, closed, store_unavailable: nothing was run; the queue takes the job
"""

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import waitress
from flask import Flask, Response, g, request
from marshmallow import ValidationError
from waitress import wasyncore
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from engines import catalogue
from engines.catalogue import JobType, UnknownModel
from engines.contract import JobCancelled, Progress, Text
from engines.failure import frames
from tasks import addresses, headers, logs, reading, showing, tokens
from tasks.fleet import WorkerState
from tasks.job import DirectJob, Envelope, JobState
from tasks.ledger import Ledger
from tasks.settings import DirectSettings
from tasks.station import Run, Station, StationClosed
from tasks.store import StoreError
from tasks.tokens import Token, TokenRefused

logger = logging.getLogger(__name__)

#: How often a request that waits for its job looks whether its client is still there.
LOOK_S = 0.1
#: A stream that has nothing to say sends a comment this often, so that no proxy on the way closes it.
COMMENT_EVERY_S = 15.0
#: Threads beyond one for each slot: for health checks and refusals.
SPARE_THREADS = 8
CONNECTION_LIMIT = 1000
#: A connection that is silent for this long is closed.
CHANNEL_TIMEOUT_S = 20
#: waitress refuses larger bodies itself, in plain text; up to there we do, as a problem.
REFUSAL_ROOM_BYTES = 1024 * 1024
#: How long the last answers may take to go out when the server closes.
FLUSH_S = 2.0
BUSY_RETRY_S = 1
#: Of a Redis URL that names none.
STORE_PORT = 6379

_FIELDS = reading.JobFields()
_ANY_HOST = ("", "0.0.0.0", "::", "*")  # noqa: S104 - compared with, not bound
_STATUS = {
    JobState.COMPLETED: HTTPStatus.OK,
    JobState.FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    JobState.CANCELLED: HTTPStatus.CONFLICT,
    JobState.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
}


#: What a job says while it runs, and last what came of it.
Event = Progress | Text | Envelope


class Refusal(Exception):
    """One request that is not served."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        errors: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """errors: messages by dotted field path. extra: further members of the body."""
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.extra = dict(extra or {})
        self.headers: dict[str, str] = {}
        if status is HTTPStatus.UNAUTHORIZED:
            self.headers["WWW-Authenticate"] = "Bearer"
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)


class Brought:
    """A job that was let in: what the engine says of it arrives here, from its threads, and last what came of it."""

    def __init__(self, token: Token, direct: DirectJob, params: Mapping[str, Any]) -> None:
        self.id = token.job_id
        self.direct = direct
        self.params = params
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        #: Unix seconds by the store's clock, once it has begun.
        self.started_at = 0.0

    def view(self, worker_id: str, envelope: Envelope | None = None) -> dict[str, Any]:
        """The job as the API shows one; running without an envelope."""
        direct, error = self.direct, envelope.error if envelope else None
        result = envelope.result if envelope else None
        return {
            "job_id": self.id,
            "status": str(envelope.outcome if envelope else JobState.RUNNING),
            "created_at": showing.rfc3339(self.started_at),
            "queue_position": None,
            "estimated_wait_seconds": None,
            "type": str(direct.type),
            "model": direct.model,
            "requested_model": direct.requested_model,
            "region": direct.region,
            "worker_id": worker_id,
            "started_at": showing.rfc3339(self.started_at),
            "completed_at": showing.rfc3339(self.started_at + envelope.run_s) if envelope else None,
            "priority": direct.priority,
            "timeout_seconds": direct.timeout_seconds,
            "attempt": 1,
            "retry_of": None,
            "error": {"code": error.code, "message": error.message} if error else None,
            "queued_reason": None,
            "progress": None,
            "warnings": showing.warnings(direct.type, direct.model, direct.requested_model, result),
            "result": result,
            "result_pruned_at": None,
        }


class DirectServer:
    """Serves between start() and close(), what the station's duty has slots for."""

    def __init__(self, station: Station, ledger: Ledger, door: socket.socket) -> None:
        """door: a socket that bind() gave."""
        self._station = station
        self._ledger = ledger
        self._duty = station.duty
        self._closed = threading.Event()
        self._busy = 0
        self._lock = threading.Lock()
        self._map: dict[int, Any] = {}
        self._server = waitress.create_server(
            self._application(),
            map=self._map,
            sockets=[door],
            threads=sum(station.card.slots.values()) + SPARE_THREADS,
            connection_limit=CONNECTION_LIMIT,
            channel_timeout=CHANNEL_TIMEOUT_S,
            max_request_body_size=reading.MOST_BODY_BYTES + REFUSAL_ROOM_BYTES,
            # Without reading ahead waitress does not notice that a client has hung up.
            channel_request_lookahead=1,
            ident=None,
            # A proxy on this host says for whom it speaks; _address() decides whom to believe.
            clear_untrusted_proxy_headers=False,
        )
        self._thread = threading.Thread(target=self._loop, name="direct", daemon=True)

    def start(self) -> None:
        """Serve, from a thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Serve nobody any more; jobs that run may take so long to end and be answered."""
        end = time.monotonic() + timeout_s
        while self._busy and time.monotonic() < end:
            time.sleep(LOOK_S)
        # Its threads end with the answers they are at.
        self._server.task_dispatcher.shutdown(timeout=FLUSH_S)
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        # waitress's own run() ends by an exception in the main thread only.
        while not self._closed.is_set():
            wasyncore.loop(timeout=LOOK_S, map=self._map, use_poll=True, count=1)
        end = time.monotonic() + FLUSH_S
        while time.monotonic() < end and any(getattr(each, "total_outbufs_len", 0) for each in [*self._map.values()]):
            wasyncore.loop(timeout=LOOK_S, map=self._map, use_poll=True, count=1)
        wasyncore.close_all(self._map)

    def _application(self) -> Flask:
        app = Flask("direct", static_folder=None)
        app.config["MAX_CONTENT_LENGTH"] = reading.MOST_BODY_BYTES
        app.post("/api/v1/jobs/sync")(self._sync)
        app.post("/api/v1/jobs/stream")(self._stream)
        app.get("/health")(self._health)
        app.register_error_handler(Refusal, _answer)
        app.register_error_handler(HTTPException, _http)
        app.register_error_handler(StoreError, _store_away)
        app.register_error_handler(Exception, _unexpected)
        app.before_request(lambda: logs.of_request(_request_id()))
        app.after_request(_complete)
        return app

    def _health(self) -> Response:
        state = self._station.card.state
        return _json({"status": "ok" if state is WorkerState.READY else str(state)})

    def _sync(self) -> Response:
        """Run the job and answer with it."""
        job = self._begin()
        gone = _gone()
        while True:
            if gone():
                self._station.interrupt(job.id, JobCancelled())
            with contextlib.suppress(queue.Empty):
                event = job.events.get(timeout=LOOK_S)
                if event is None or isinstance(event, Envelope):
                    break
        if event is None:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "The worker failed; its log has details.")
        body = job.view(self._station.worker_id, event)
        headers = {"X-Job-Id": job.id}
        if event.outcome is not JobState.COMPLETED:
            # OpenAI's clients would send a job that failed or takes long twice more.
            headers["x-should-retry"] = "false"
            body["detail"] = event.error.message if event.error else "The job was cancelled."
        return _json(body, _STATUS[event.outcome], headers)

    def _stream(self) -> Response:
        """Run the job and tell of it as it goes: events begun, text, progress, ended."""
        job = self._begin()
        headers = {"X-Job-Id": job.id, "X-Accel-Buffering": "no"}
        return Response(self._events(job, _gone()), mimetype="text/event-stream", headers=headers)

    def _events(self, job: Brought, gone: Callable[[], bool]) -> Iterator[str]:
        ended = False
        said_at = time.monotonic()
        try:
            yield _event("begun", job.view(self._station.worker_id))
            while not ended:
                try:
                    event = job.events.get(timeout=LOOK_S)
                except queue.Empty:
                    if gone():
                        return
                    if time.monotonic() - said_at >= COMMENT_EVERY_S:
                        yield ": the job goes on\n\n"
                        said_at = time.monotonic()
                    continue
                if isinstance(event, Text):
                    yield _event("text", {"delta": event.delta})
                elif isinstance(event, Progress):
                    yield _event("progress", {"done": int(event.done), "total": event.total, "unit": event.unit})
                else:
                    ended = True
                    if event is not None:
                        yield _event("ended", job.view(self._station.worker_id, event))
                said_at = time.monotonic()
        finally:
            # Also where waitress closes this generator because nobody takes what it yields.
            if not ended:
                self._station.interrupt(job.id, JobCancelled())

    def _begin(self) -> Brought:
        """Let the request's job in and begin it. Raises Refusal and StoreError."""
        token = self._admit()
        job = self._read(token)
        job_type = token.type
        if not self._duty.try_take(job_type):
            if self._station.card.state is not WorkerState.READY:
                raise _closed()
            detail = f"All slots for {job_type} are taken; nothing was run."
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "busy", detail, retry_after_s=BUSY_RETRY_S)
        try:
            entered = self._station.enter(job.id, job.direct, job.events.put)
            if entered is None:
                detail = "This token has let its job in already; ask for the nearest worker again."
                raise Refusal(HTTPStatus.UNAUTHORIZED, "token_used", detail)
        except StationClosed:
            self._duty.done(job_type, 0.0)
            raise _closed() from None
        except BaseException:
            self._duty.done(job_type, 0.0)
            raise
        run, job.started_at = entered
        with self._lock:
            self._busy += 1
        threading.Thread(target=self._work, args=[run, job], name=f"direct-{job.id[:8]}", daemon=True).start()
        return job

    def _work(self, run: Run, job: Brought) -> None:
        envelope: Envelope | None = None
        try:
            envelope = self._station.serve(run, job.params)
        finally:
            self._duty.done(run.job.type, time.monotonic() - run.began)
            with self._lock:
                self._busy -= 1
            job.events.put(envelope)

    def _admit(self) -> Token:
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            detail = "Send the token of /api/v1/jobs/direct/nearest as Authorization: Bearer <token>."
            raise Refusal(HTTPStatus.UNAUTHORIZED, "token_required", detail)
        secret = self._ledger.direct_secret()
        address = _address()
        try:
            return tokens.verify(text.strip(), secret, worker_id=self._station.worker_id, address=address)
        except TokenRefused as refused:
            if refused.elsewhere:
                # With it the client can ask for a token that is good from there; without its key nobody can.
                extra = {"client_address": address}
                raise Refusal(HTTPStatus.FORBIDDEN, refused.code, str(refused), extra=extra) from None
            raise Refusal(HTTPStatus.UNAUTHORIZED, refused.code, str(refused)) from None

    def _read(self, token: Token) -> Brought:
        """The request's job, if it is the token's and this worker's. Raises Refusal."""
        if request.mimetype and not request.is_json:
            detail = f"The body must be JSON: send Content-Type: application/json, not {request.mimetype[:64]!r}."
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_json", detail)
        try:
            wanted: dict[str, Any] = _FIELDS.load(reading.parse_object(request.get_data(cache=False)))
        except reading.NotAnObject as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "malformed_body", str(error)) from None
        except ValidationError as error:
            errors, left_out = reading.by_path(reading.hinted(reading.as_mapping(error), _FIELDS))
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            raise Refusal(status, "validation_failed", reading.summary(errors, left_out), errors=errors) from None
        card = self._station.card
        if wanted["type"] != token.type:
            raise Refusal(HTTPStatus.CONFLICT, "wrong_type", f"This token is for {token.type}, not {wanted['type']}.")
        if wanted["region"] not in (None, card.region) and not wanted["allow_cross_region"]:
            detail = f"This worker is in {card.region}, and the job may run in {wanted['region']} only."
            raise Refusal(HTTPStatus.CONFLICT, "wrong_region", detail)
        direct = DirectJob(
            owner=token.owner,
            type=token.type,
            model=_model(token.type, wanted["model"], card.models[token.type]),
            requested_model=wanted["model"],
            priority=wanted["priority"],
            region=card.region,
            region_wanted=wanted["region"] or card.region,
            allow_cross_region=wanted["allow_cross_region"],
            timeout_seconds=wanted["timeout_seconds"],
            ticket=token.ticket,
        )
        return Brought(token, direct, wanted["params"])


def bind(listen: DirectSettings) -> socket.socket:
    """A socket at the address that the settings name, which accepts nothing yet. Raises OSError."""
    host = "0.0.0.0" if listen.host == "*" else listen.host  # noqa: S104 - as configured
    kind, _, _, _, address = socket.getaddrinfo(host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    door = socket.socket(kind, socket.SOCK_STREAM)
    try:
        # Otherwise a worker that is started again waits for the connections of the one before to be forgotten.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError:
        door.close()
        raise
    return door


def public_url(listen: DirectSettings, store: str) -> str:
    """Where clients reach the server: what the settings say, else this host's address on its way to the store."""
    if listen.public_url:
        return listen.public_url.rstrip("/")
    host = listen.host
    if host in _ANY_HOST:
        url = urlsplit(store)
        host = addresses.own_address(url.hostname, url.port or STORE_PORT)
    return f"http://{f'[{host}]' if ':' in host else host}:{listen.port}"


def _model(job_type: JobType, name: str | None, loaded: str) -> str | None:
    """The id of the model that a client names, if it is the one that is loaded. Raises Refusal."""
    if name is None:
        return None
    try:
        known = catalogue.find(job_type, name).id
    except UnknownModel:
        known = name
    if loaded.casefold() not in (name.casefold(), known.casefold()):
        raise Refusal(HTTPStatus.CONFLICT, "wrong_model", f"This worker runs {loaded} for {job_type}.")
    return loaded


def _address() -> str:
    """The client's address: the connection's, or what a proxy on this host says of it."""
    address = addresses.plain_address(request.remote_addr or "::")
    forwarded = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()
    if forwarded and addresses.is_loopback(address):
        try:
            return addresses.plain_address(forwarded)
        except ValueError:
            return address
    return address


def _closed() -> Refusal:
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "closed", "This worker takes no new jobs now; nothing was run.")


def _gone() -> Callable[[], bool]:
    """Tells whether the request's client has hung up."""
    gone: Callable[[], bool] = request.environ["waitress.client_disconnected"]
    return gone


def _event(name: str, body: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _json(
    body: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return Response(text, status.value, dict(headers or {}), content_type="application/json")


def _answer(refusal: Refusal) -> Response:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": refusal.status.phrase,
        "status": refusal.status.value,
        "detail": refusal.detail,
        "code": refusal.code,
        "request_id": _request_id(),
        **refusal.extra,
    }
    if refusal.errors is not None:
        body["errors"] = refusal.errors
    # ASCII: a field's name may hold a lone surrogate, which UTF-8 cannot carry.
    return Response(json.dumps(body), refusal.status.value, refusal.headers, content_type="application/problem+json")


def _http(error: HTTPException) -> Response:
    status = HTTPStatus(error.code or 500)
    if isinstance(error, RequestEntityTooLarge):
        return _answer(Refusal(status, "body_too_large", f"The body may have at most {reading.MOST_BODY_BYTES} bytes."))
    detail = f"There is no {request.method} {request.path[:200]!r} here: this is one worker, not the API."
    code = status.name.lower()
    return _answer(Refusal(status, code, detail if status in (404, 405) else error.description or status.phrase))


def _store_away(error: StoreError) -> Response:
    logger.warning("a direct job is refused, the store is away: %s", error)
    detail = "This region's store does not answer; nothing was run."
    return _answer(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "store_unavailable", detail, retry_after_s=BUSY_RETRY_S))


def _unexpected(error: Exception) -> Response:
    logger.error("a direct request failed: %s", frames(error))
    return _answer(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "The worker failed; its log has more."))


def _complete(response: Response) -> Response:
    response.headers["X-Request-ID"] = _request_id()
    response.headers.update(headers.FIXED)
    for name, value in headers.DEFAULTS.items():
        response.headers.setdefault(name, value)
    return response


def _request_id() -> str:
    """This request's id."""
    known: str | None = g.get("request_id")
    if known is None:
        known = g.request_id = headers.request_id(request.headers.get("X-Request-ID", ""))
    return known
