"""How many jobs there are, where, and how long they have waited: for statistics, metrics and whoever routes."""

from collections.abc import Iterable

from sqlalchemy import func, select

from app.job_table import INDEXED_QUEUED, IS_LIVE, JobTable
from app.tables import jobs, now
from engines.catalogue import JobType
from tasks.job import JobState


class Census:
    """Counts of rows. Raises as JobTable does."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    def unsent(self, region: str, most: int) -> int:
        """How many live jobs of the region are not proven to be sent, counted up to `most`; reads as many rows."""
        some = select(jobs.c.id).where(IS_LIVE, jobs.c.region == region, jobs.c.due_at.is_not(None)).limit(most)
        with self._table.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(some.subquery())).scalar_one())

    def movable(self, region: str) -> list[tuple[JobType, str | None]]:
        """Types and models of the region's live jobs that may leave it; reads them all."""
        query = select(jobs.c.type, jobs.c.model).distinct()
        query = query.where(IS_LIVE, jobs.c.region == region, jobs.c.allow_cross_region.is_(True))
        with self._table.engine.connect() as connection:
            return [(JobType(job_type), model) for job_type, model in connection.execute(query)]

    def regions(self) -> list[str]:
        """Every region that live jobs are in; reads an index of them."""
        with self._table.engine.connect() as connection:
            return list(connection.execute(select(jobs.c.region).where(IS_LIVE).distinct()).scalars())

    def oldest_waits(self, regions: Iterable[str]) -> dict[tuple[str, JobType], float]:
        """Seconds that the oldest queued job of each region and type has waited, where any does."""
        queues = [(region, job_type) for region in regions for job_type in JobType]
        waits = [
            select(now() - jobs.c.created_at)
            .where(INDEXED_QUEUED, jobs.c.region == region, jobs.c.type == str(job_type))
            .order_by(jobs.c.created_at)
            .limit(1)
            .scalar_subquery()
            for region, job_type in queues
        ]
        with self._table.engine.connect() as connection:
            found = connection.execute(select(*waits)).one()
        return {queue: wait for queue, wait in zip(queues, found, strict=True) if wait is not None}

    def pulse(self) -> dict[str, float | None]:
        """When a job was last accepted, and when one last ended, unix seconds: as long as both stay, no job is new."""
        newest = select(jobs.c.created_at).order_by(jobs.c.created_at.desc()).limit(1).scalar_subquery()
        ended = select(func.max(jobs.c.completed_at)).where(jobs.c.pruned_at.is_(None)).scalar_subquery()
        with self._table.engine.connect() as connection:
            accepted_at, ended_at = connection.execute(select(newest, ended)).one()
        return {"accepted_at": accepted_at, "ended_at": ended_at}

    def overdue_s(self) -> float:
        """By how many seconds the job that the reconciler has to act on first is overdue; 0 where none is."""
        # Ordered by the index, which min() would not use on every database.
        first = select(now() - jobs.c.due_at).where(jobs.c.due_at.is_not(None)).order_by(jobs.c.due_at).limit(1)
        with self._table.engine.connect() as connection:
            return max(connection.execute(first).scalar() or 0.0, 0.0)

    def live(self, region: str) -> dict[tuple[JobType, JobState], int]:
        """How many live jobs the region has, by type and state; reads them all."""
        query = select(jobs.c.type, jobs.c.status, func.count()).where(IS_LIVE, jobs.c.region == region)
        with self._table.engine.connect() as connection:
            found = connection.execute(query.group_by(jobs.c.type, jobs.c.status))
            return {(JobType(job_type), JobState(status)): count for job_type, status, count in found}
