"""What a job says while it runs, as events that a client can follow: GET /jobs/{id}/events, POST /jobs/stream.

    status    what the job is now; `running` begins an answer, so what was heard of an earlier attempt counts no more
    progress  how far it has come
    token     text that was added to its answer
    result    the job, completed; the last event
    error     the job, ended otherwise; the last event

An event's id says where the client is: what it waits for, the entry of the store's stream, or the end. docs/streams.md.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Response, current_app, request
from sqlalchemy.exc import SQLAlchemyError

from app.dispatch import Dispatch, Unavailable
from app.job_table import JobRow
from app.links import Down
from app.schemas import JobView, ProgressView, Shown
from app.waiting import Place
from engines.contract import Text
from tasks import stream
from tasks.job import JobState
from tasks.stream import Entry

logger = logging.getLogger(__name__)

#: One wait for what the store has to say; between two, the job's record is looked at and so is whether the client is
#: there.
LOOK_S = 2.0
#: A stream that has nothing to say sends a comment this often, so that no proxy on the way closes it.
PING_S = 15.0
#: While a store is away the row is read, less and less often.
AWAY_S = (0.5, 1.0, 2.0, 5.0)
#: The row is read this often even if the store knows of no change.
ROW_S = 30.0
#: What a client that is cut off by a restart waits before it comes again, in milliseconds.
RECONNECT_MS = 1000
#: The id of the last event.
END = "end"
#: The names of all events.
NAMES = ("status", "progress", "token", "result", "error")

_RUN_ID = re.compile(r"(\d{1,9})-(\d{1,15})-(\d{1,15})-(\d{1,6})", re.ASCII)
_VIEW = JobView()
_PROGRESS = ProgressView()


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job."""

    id: str
    #: One of NAMES.
    name: str
    data: dict[str, Any]


class Streams:
    """Follows jobs, for as many clients at once as there are threads. Threads may share it."""

    def __init__(self, dispatch: Dispatch, *, look_s: float = LOOK_S) -> None:
        """look_s: how often a job that says nothing is looked at."""
        self._dispatch = dispatch
        self._look_s = look_s
        #: Set when the server stops: every stream ends at its next look.
        self.stopping = threading.Event()

    def follow(self, row: JobRow, after: str | None = None) -> Iterator[Event | None]:
        """The job's events from now on, ending with its last; None when there was none for a moment.

        after: the id of the last event that the client has. What it does not know is said from the start of the present
        attempt. While the server stops it ends before the last event.
        """
        return iter(Follower(self._dispatch, row, after, self._look_s, self.stopping))


class Follower:
    """One client's view of one job."""

    def __init__(
        self, dispatch: Dispatch, row: JobRow, after: str | None, look_s: float, stopping: threading.Event
    ) -> None:
        self._dispatch = dispatch
        self._row = row
        self._look_s = look_s
        self._stopping = stopping
        known = _RUN_ID.fullmatch(after or "")
        #: The attempt, the run and the number of the last entry that was heard, and how many of its events were.
        self._attempt, run, number, self._said = map(int, known.groups()) if known else (0, 0, 0, 0)
        self._at = run, number
        #: Where to read on: the entry of which the client may lack the rest is read again.
        self._cursor = run, max(number - 1, 0)
        #: The id of the last status that was said.
        self._status = after or ""
        #: The attempt that was said to run, and of which nothing has been said since.
        self._bare = row.attempt if after == f"running-{row.attempt}" else 0
        self._away = 0
        self._read_at = time.monotonic()

    def __iter__(self) -> Iterator[Event | None]:
        while not self._row.ended and not self._stopping.is_set():
            yield from self._present()
            try:
                entries = self._hear(self._look_s)
                self._away = 0
            except Down:
                self._stopping.wait(AWAY_S[min(self._away, len(AWAY_S) - 1)])
                self._away += 1
                self._look()
                yield None
                continue
            for entry in entries:
                yield from self._of(entry)
            if any(entry.last for entry in entries):
                self._look()
            elif not entries:
                self._check()
                yield None
        if self._row.ended and self._status != END:
            yield from self._rest()
            yield from self._outcome()

    def _present(self) -> Iterator[Event]:
        """The status, where it is not what was said last."""
        row = self._row
        heard = max(self._attempt, self._bare)
        # Of an attempt that has begun the row may still say for a moment that it waits.
        if row.status is JobState.QUEUED and heard < row.attempt:
            place = self._dispatch.placement.place(row)
            status = f"queued-{row.attempt}-{place.position or ''}"
            if status != self._status:
                self._status = status
                yield Event(status, "status", _waits(row, place))
        elif row.status is JobState.RUNNING and heard < row.attempt:
            yield self._runs(f"running-{row.attempt}", row.attempt)

    def _runs(self, event_id: str, attempt: int) -> Event:
        self._status = event_id
        self._bare = attempt
        return Event(event_id, "status", {"status": str(JobState.RUNNING), "attempt": attempt})

    def _of(self, entry: Entry) -> Iterator[Event]:
        """What an entry says that has not been said."""
        self._cursor = entry.run, entry.number
        if entry.attempt < max(self._row.attempt, self._attempt):
            return
        if entry.run != self._at[0]:
            self._attempt, self._at, self._said = entry.attempt, (entry.run, 0), 0
            if self._bare != entry.attempt:
                yield self._runs(f"{entry.attempt}-{entry.run}-0-0", entry.attempt)
        if entry.last:
            return
        skip = self._said if self._at == self._cursor else 0
        self._at = self._cursor
        for count, said in enumerate(entry.said[skip:], skip + 1):
            self._said, self._bare = count, 0
            event_id = f"{entry.attempt}-{entry.run}-{entry.number}-{count}"
            if isinstance(said, Text):
                data: dict[str, Any] = {"delta": said.delta, "choice": said.choice, "attempt": entry.attempt}
                if said.logprobs:
                    data["logprobs"] = list(said.logprobs)
                yield Event(event_id, "token", data)
            else:
                yield Event(event_id, "progress", dict(_PROGRESS.dump(said)))

    def _hear(self, wait_s: float) -> list[Entry]:
        """The next entries of the job's stream, waited for. Raises Down."""
        link = self._dispatch.links.get(self._row.region)
        if link is None:
            raise Down(f"Region {self._row.region} is not configured.")
        with link.mailbox.breaker:
            return stream.hear(link.mailbox.ledger, self._row.id, self._cursor, wait_s)

    def _check(self) -> None:
        """Read the row where the store knows of something that it does not say, and now and then in any case."""
        row = self._row
        link = self._dispatch.links.get(row.region)
        if link is not None and time.monotonic() - self._read_at < ROW_S:
            try:
                with link.mailbox.breaker:
                    record = link.mailbox.ledger.look(row.id)
            except Down:
                return
            if record is not None and (record.state, record.attempt) == (str(row.status), row.attempt):
                return
        self._look()

    def _look(self) -> None:
        before = self._row
        self._read_at = time.monotonic()
        try:
            self._row = self._dispatch.look(before.id) or before
        except SQLAlchemyError as error:
            # The store may still have something to say, and the database is usually back soon.
            logger.warning("job %s is followed without its row: %s", before.id, type(error).__name__)
            return
        if self._row.region != before.region:
            # Its new store's stream begins anew.
            self._cursor = 0, 0

    def _rest(self) -> Iterator[Event]:
        """What was said before the end and has not been heard, to a client that heard the beginning."""
        run = self._cursor[0]
        try:
            while run and (entries := self._hear(0.0)):
                for entry in entries:
                    if entry.run == run:
                        yield from self._of(entry)
                if entries[-1].last or entries[-1].run != run:
                    return
        except Down:
            return

    def _outcome(self) -> Iterator[Event]:
        row = self._row
        self._status = END
        yield Event(f"ended-{row.attempt}", "status", {"status": str(row.status), "attempt": row.attempt})
        name, detail, result = "result" if row.status is JobState.COMPLETED else "error", None, None
        try:
            result = self._dispatch.result(row)
        except Unavailable as error:
            name, detail = "error", f"{error.message} The job completed; GET /api/v1/jobs/{row.id} has its result."
        data = dict(_VIEW.dump(Shown(row, Place(), result=result)))
        yield Event(END, name, {**data, "detail": detail} if detail else data)


def sse(
    events: Iterable[Event | str | None],
    *,
    on_hang_up: Callable[[], object] | None = None,
    on_close: Callable[[], object] | None = None,
    headers: Mapping[str, str] | None = None,
    ping_s: float = PING_S,
) -> Response:
    """Answer with server-sent events, each sent at once.

    events: an Event with its id and name; a str is the data of an event without a name; None is a moment in which there
    was nothing, for pings and to see whether the client is there. Whatever it is iterated from is closed.
    on_hang_up: called once if the client went before the last event. on_close: called once at the end, in any case,
    even if nothing was sent, as for HEAD.
    """
    gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    body = _body(events, gone, streams_here().stopping, on_hang_up, ping_s)
    response = Response(body, mimetype="text/event-stream")
    # X-Accel-Buffering: nginx would keep the events back.
    response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
    if on_close is not None:
        response.call_on_close(on_close)
    return response


def _body(
    events: Iterable[Event | str | None],
    gone: Callable[[], bool],
    stopping: threading.Event,
    on_hang_up: Callable[[], object] | None,
    ping_s: float,
) -> Iterator[str]:
    there = False
    sent_at = time.monotonic()
    try:
        for event in events:
            if event is not None:
                yield encode(event)
                sent_at = time.monotonic()
            elif gone():
                return
            elif time.monotonic() - sent_at >= ping_s:
                yield ": ping\n\n"
                sent_at = time.monotonic()
        there = True
        if stopping.is_set():
            yield f": the server stops; come again with Last-Event-ID\nretry: {RECONNECT_MS}\n\n"
    finally:
        # Also where the server closes this generator because nobody takes what it yields.
        if close := getattr(events, "close", None):
            close()
        if not there and on_hang_up is not None and not stopping.is_set():
            on_hang_up()


def streams_here() -> Streams:
    """The app's Streams."""
    streams: Streams = current_app.extensions["streams"]
    return streams


def encode(event: Event | str) -> str:
    """An event as text/event-stream has it."""
    if isinstance(event, str):
        return f"data: {event}\n\n"
    data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {event.id}\nevent: {event.name}\ndata: {data}\n\n"


def _waits(row: JobRow, place: Place) -> dict[str, Any]:
    return {
        "status": str(row.status),
        "attempt": row.attempt,
        "queue_position": place.position,
        "estimated_wait_seconds": place.estimated_wait_s,
        "queued_reason": place.reason,
    }
