"""What jobs that have ended leave behind, and how it is deleted (app/retention.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, select
from sqlalchemy import delete as sql_delete
from sqlalchemy import update as sql_update

from app.blobs import MARK
from app.job_table import IS_LIVE, JobTable
from app.tables import jobs, now
from tasks.job import LIVE, JobState

# Texts that lie elsewhere, without reading those that do not.
_TRACES = [
    jobs.c.id,
    jobs.c.status,
    *(case((column.startswith(MARK), column)) for column in (jobs.c.params, jobs.c.result)),
]


@dataclass(frozen=True, slots=True)
class Traces:
    """What a job has elsewhere than in its row."""

    job_id: str
    live: bool
    #: What its row holds in place of texts that lie in the blob store.
    blobs: Sequence[str]


class Remains:
    """Rows of the past. Raises as JobTable does."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    def prunable(self, older_than_s: float, limit: int) -> list[Traces]:
        """Jobs that ended so long ago and still hold params or a result, oldest first."""
        old = jobs.c.completed_at <= now() - older_than_s
        return self._traces(
            select(*_TRACES).where(jobs.c.pruned_at.is_(None), old).order_by(jobs.c.completed_at), limit
        )

    def prune(self, job_ids: Sequence[str]) -> None:
        """Delete the params and results of jobs that have ended; the rest of the row stays."""
        ended = (jobs.c.id.in_(job_ids), ~IS_LIVE, jobs.c.pruned_at.is_(None))
        self._table.write(sql_update(jobs).where(*ended).values(params="{}", result=None, pruned_at=now()))

    def outdated(self, older_than_s: float, limit: int) -> list[Traces]:
        """Jobs that ended so long ago and whose end was noted (app/ends.py), oldest first."""
        # No job ends before it is made, so the index of the newest jobs finds them.
        ended_before = jobs.c.completed_at <= now() - older_than_s
        old = (jobs.c.created_at <= now() - older_than_s, ended_before, jobs.c.noted_at.is_not(None))
        return self._traces(select(*_TRACES).where(*old).order_by(jobs.c.created_at, jobs.c.id), limit)

    def delete(self, job_ids: Sequence[str]) -> None:
        """Delete jobs that have ended."""
        self._table.write(sql_delete(jobs).where(jobs.c.id.in_(job_ids), ~IS_LIVE))

    def traces(self, job_ids: Sequence[str]) -> dict[str, Traces]:
        """What is left of these jobs elsewhere, by id; jobs that have no row are left out."""
        found = self._traces(select(*_TRACES).where(jobs.c.id.in_(job_ids)), len(job_ids))
        return {traces.job_id: traces for traces in found}

    def _traces(self, query: Any, limit: int) -> list[Traces]:
        with self._table.engine.connect() as connection:
            found = connection.execute(query.limit(limit))
            return [
                Traces(job_id, JobState(status) in LIVE, tuple(filter(None, kept))) for job_id, status, *kept in found
            ]
