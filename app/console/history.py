"""The last hour by minute: how many jobs ended, and how long they took and waited. Bounded, however many there were."""

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from app.tables import jobs, now
from tasks.job import JobState

MINUTE_S = 60
MINUTES = 60
#: Times are told from so many jobs of a minute, in the order of their ends; the jobs themselves are all counted.
SAMPLE = 1000
#: Of one owner's jobs of the hour, so many, newest first.
MOST_OF_OWNER = 5000
#: A minute that is over for so long does not change any more: an end is written within a second of its time.
SETTLED_S = 30

_ENDED = (jobs.c.pruned_at.is_(None), jobs.c.withdrawn.is_(False))
_TIMES = select(jobs.c.status, jobs.c.created_at, jobs.c.started_at, jobs.c.completed_at)


@dataclass(frozen=True, slots=True)
class Minute:
    """Jobs that ended within one minute."""

    #: Unix seconds of its beginning, by the database's clock.
    at: int
    ended: int
    #: Of those whose times are told from, which are all of them up to SAMPLE.
    completed: int
    otherwise: int
    #: Seconds from accepted to completed, and from accepted to begun; None where no job has them.
    whole_p50_s: float | None
    whole_p95_s: float | None
    queue_p50_s: float | None
    queue_p95_s: float | None


class History:
    """Remembers minutes that are over. Threads share it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = threading.Lock()
        self._settled: dict[int, Minute] = {}

    def everybody(self) -> list[dict[str, Any]]:
        """Every job's, oldest minute first. Jobs that are no longer kept (app/retention.py) are not counted."""
        with self._reading, self._engine.connect() as connection:
            current_s = connection.execute(select(now())).scalar_one()
            wanted = _minutes(current_s)
            found = [self._settled.get(at) or _read(connection, at) for at in wanted]
            self._settled = {minute.at: minute for minute in found if minute.at + MINUTE_S + SETTLED_S < current_s}
        return [asdict(minute) for minute in found]

    def of(self, owner: str) -> list[dict[str, Any]]:
        """The same of an owner's jobs that were accepted within the hour."""
        recent = _TIMES.where(jobs.c.owner == owner, jobs.c.created_at >= now() - MINUTES * MINUTE_S, *_ENDED)
        with self._engine.connect() as connection:
            current_s = connection.execute(select(now())).scalar_one()
            rows = connection.execute(recent.order_by(jobs.c.created_at.desc()).limit(MOST_OF_OWNER)).all()
        by_minute: dict[int, list[Any]] = {at: [] for at in _minutes(current_s)}
        for row in rows:
            if row.completed_at is not None and (at := _minute(row.completed_at)) in by_minute:
                by_minute[at].append(row)
        return [asdict(_told(at, ended, len(ended))) for at, ended in by_minute.items()]


def _minute(moment_s: float) -> int:
    return math.floor(moment_s / MINUTE_S) * MINUTE_S


def _minutes(current_s: float) -> range:
    last = _minute(current_s)
    return range(last - (MINUTES - 1) * MINUTE_S, last + 1, MINUTE_S)


def _read(connection: Connection, at: int) -> Minute:
    within = (jobs.c.completed_at >= at, jobs.c.completed_at < at + MINUTE_S)
    rows = connection.execute(_TIMES.where(*within, *_ENDED).order_by(jobs.c.completed_at).limit(SAMPLE)).all()
    if len(rows) < SAMPLE:
        return _told(at, rows, len(rows))
    # Without `withdrawn`, which does not stand in the index: counting reads no rows then.
    every = select(func.count()).select_from(jobs).where(*within, jobs.c.pruned_at.is_(None))
    return _told(at, rows, connection.execute(every).scalar_one())


def _told(at: int, rows: Sequence[Any], ended: int) -> Minute:
    completed = [row for row in rows if row.status == JobState.COMPLETED]
    whole = sorted(row.completed_at - row.created_at for row in completed)
    queue = sorted(row.started_at - row.created_at for row in rows if row.started_at is not None)
    return Minute(
        at=at,
        ended=ended,
        completed=len(completed),
        otherwise=len(rows) - len(completed),
        whole_p50_s=_at_rank(whole, 0.50),
        whole_p95_s=_at_rank(whole, 0.95),
        queue_p50_s=_at_rank(queue, 0.50),
        queue_p95_s=_at_rank(queue, 0.95),
    )


def _at_rank(ordered: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile, never below 0 (clocks of store and database differ); None of nothing."""
    if not ordered:
        return None
    return round(max(0.0, ordered[math.ceil(share * len(ordered)) - 1]), 4)
