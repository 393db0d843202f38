"""What each owner used, by day, type and model: each job that has ended counts once, on the day of its end.

As a job's row takes its outcome, it takes what the job used with it (Meter), for the outcome itself may lie elsewhere
or be pruned before it is counted. Counting is an account of app/ends.py: one transaction with the mark that the end is
dealt with. Rows are kept until that has happened (app/retention.py).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from sqlalchemy import Connection, Engine, Row, case, delete, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite

from app.job_table import JobRow
from app.tables import api_keys, jobs, now, usage
from engines.catalogue import JobType
from tasks.job import LIVE, Envelope, JobState

DAY_S = 86_400
#: What day 0 of the table is.
FIRST_DAY = date(1970, 1, 1).toordinal()
_MOST = 1e12
#: What is added up, by its column.
SUMS = tuple(column.name for column in usage.c if not column.primary_key)


@dataclass(frozen=True, slots=True)
class Meter:
    """What one attempt used, as its worker said."""

    #: The model that ran; None where the outcome does not say.
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0
    #: Seconds of sound that were read.
    audio_s: float = 0.0
    #: Seconds for which it ran.
    run_s: float = 0.0

    def encode(self) -> str:
        """As JSON text, without what is nothing."""
        return json.dumps({name: value for name, value in asdict(self).items() if value})


def read_meter(outcome: Envelope, job_type: JobType) -> Meter:
    """What the outcome says that its attempt used."""
    result: Mapping[str, Any] = outcome.result or {}
    tokens = result.get("usage") or {}
    model = result.get("model")
    return Meter(
        model=model[:255] if isinstance(model, str) else None,
        prompt_tokens=int(_number(tokens.get("prompt_tokens"))),
        completion_tokens=int(_number(tokens.get("completion_tokens"))),
        images=int(job_type is JobType.IMAGE_GEN and outcome.outcome is JobState.COMPLETED),
        audio_s=_number(result.get("duration")) if job_type is JobType.WHISPER else 0.0,
        run_s=round(_number(outcome.run_s), 3),
    )


def _number(said: object) -> float:
    """What a worker said, as far as it can be added up: one that cannot would hold up all the others."""
    return said if isinstance(said, (int, float)) and 0 <= said < _MOST else 0


@dataclass(frozen=True, slots=True)
class Spent:
    """What an owner has used of its quotas."""

    #: The database's clock, in unix seconds.
    at: float
    #: By the names of keys.Quotas. Jobs count from when they are accepted, the rest when the job has ended.
    used: Mapping[str, float]


class Usage:
    """The usage table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def count(self, connection: Connection, ended: Sequence[JobRow]) -> None:
        """Add jobs that have just ended: an account of app/ends.py."""
        sums: dict[tuple[str, int, str, str], dict[str, float]] = {}
        for row in ended:
            if row.completed_at is None:
                continue
            meter = Meter(**json.loads(row.meter)) if row.meter else None
            key = (row.owner, int(row.completed_at // DAY_S), str(row.type), (meter and meter.model) or row.model or "")
            added = sums.setdefault(key, dict.fromkeys(SUMS, 0))
            added[str(row.status)] += 1
            added["gpu_s"] += _gpu_s(row, meter)
            if meter is not None:
                for name in ("prompt_tokens", "completion_tokens", "images", "audio_s"):
                    added[name] += getattr(meter, name)
        insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert
        # In order: two processes that believe that they lead do not wait for one another in a circle.
        for (owner, day, job_type, model), added in sorted(sums.items()):
            new = insert(usage).values(owner=owner, day=day, type=job_type, model=model, **added)
            grown = {name: usage.c[name] + new.excluded[name] for name in SUMS}
            connection.execute(new.on_conflict_do_update(index_elements=list(usage.primary_key), set_=grown))

    def spent(self, owner: str, most_jobs: int) -> Spent:
        """What the owner has used today and this month. most_jobs: of its live jobs, count up to so many."""
        uncounted = select(literal(1)).where(jobs.c.owner == owner, jobs.c.noted_at.is_(None)).limit(most_jobs)
        clock = select(now(), select(func.count()).select_from(uncounted.subquery()).scalar_subquery())
        with self._engine.connect() as connection:
            at, waiting = connection.execute(clock).one()
            today = date.fromordinal(FIRST_DAY + int(at // DAY_S))
            first, last = day_of(today.replace(day=1)), day_of(today)
            ended = usage.c.completed + usage.c.failed + usage.c.cancelled + usage.c.timeout
            each = {"jobs": ended, "tokens": usage.c.prompt_tokens + usage.c.completion_tokens}
            each["gpu_seconds"] = usage.c.gpu_s
            sums = [
                func.coalesce(func.sum(value if of_month else case((usage.c.day == last, value), else_=0)), 0)
                for value in each.values()
                for of_month in (False, True)
            ]
            found = connection.execute(select(*sums).where(usage.c.owner == owner, usage.c.day.between(first, last)))
            names = [f"{name}_per_{period}" for name in each for period in ("day", "month")]
            used = {name: float(value) for name, value in zip(names, found.one(), strict=True)}
        return Spent(at, {name: value + (waiting if name.startswith("jobs") else 0) for name, value in used.items()})

    def report(self, owner: str | None, first: date, last: date, by: Collection[str], limit: int) -> Sequence[Row[Any]]:
        """Sums over days of UTC, one row for each combination of the columns in `by`; owner None is everybody's."""
        groups = [usage.c[name] for name in by]
        query = select(*groups, *(func.coalesce(func.sum(usage.c[name]), 0).label(name) for name in SUMS))
        query = query.where(usage.c.day.between(day_of(first), day_of(last)))
        if owner is not None:
            query = query.where(usage.c.owner == owner)
        with self._engine.connect() as connection:
            return connection.execute(query.group_by(*groups).order_by(*groups).limit(limit)).all()

    def owner_of(self, key_id: str) -> str | None:
        """Whose jobs the key makes; an owner's own name is known as long as it has used anything. None if unknown."""
        with self._engine.connect() as connection:
            query = select(api_keys.c.owner).where(api_keys.c.id == key_id)
            found = connection.execute(query.union(select(usage.c.owner).where(usage.c.owner == key_id))).first()
        return found[0] if found else None

    def prune(self, days: int) -> int:
        """Delete the days that lie further back; how many rows there were."""
        with self._engine.connect() as connection:
            old = usage.c.day < func.floor(now() / DAY_S) - days
            return connection.execute(delete(usage).where(old)).rowcount


def day_of(day: date) -> int:
    """As the table has it."""
    return day.toordinal() - FIRST_DAY


def _gpu_s(row: JobRow, meter: Meter | None) -> float:
    """Seconds for which it held a slot."""
    if meter is not None:
        return meter.run_s
    if row.status in LIVE or row.error_code == "worker_lost" or row.started_at is None or row.completed_at is None:
        # Nobody knows for how long a lost worker ran it, and its owner is not to blame.
        return 0.0
    # It was ended while it ran, and what its worker said afterwards came too late.
    return max(row.completed_at - row.started_at, 0.0)
