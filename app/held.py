"""The rows that wait for their key's turn before they are sent (app/turns.py)."""

from sqlalchemy import and_, func, literal, or_, select
from sqlalchemy import update as sql_update

from app.job_table import COLUMNS, INDEXED_QUEUED, IS_HELD, UNPROVEN_S, JobRow, JobTable, row_of
from app.tables import jobs, now


class Held:
    """What is held. Raises as JobTable does."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    def counts(self) -> dict[tuple[str, int, str], int]:
        """How many jobs are held, by queue, priority and owner; reads an index of them."""
        query = select(jobs.c.held_for, jobs.c.priority, jobs.c.owner, func.count()).where(INDEXED_QUEUED, IS_HELD)
        with self._table.engine.connect() as connection:
            found = connection.execute(query.group_by(jobs.c.held_for, jobs.c.priority, jobs.c.owner))
            return {(queue, priority, owner): count for queue, priority, owner, count in found}

    def model(self, queue: str) -> str | None:
        """The model that the jobs name which are held for the queue; None for any."""
        with self._table.engine.connect() as connection:
            query = select(jobs.c.model).where(INDEXED_QUEUED, jobs.c.held_for == queue).limit(1)
            model: str | None = connection.execute(query).scalar()
        return model

    def before(self, row: JobRow, most: int) -> int:
        """How many held jobs of the same owner and queue are released before this one, counted up to `most`."""
        own = (INDEXED_QUEUED, jobs.c.held_for == row.held_for, jobs.c.owner == row.owner)
        earlier = and_(jobs.c.priority == row.priority, jobs.c.created_at < row.created_at)
        some = select(literal(1)).where(*own, or_(jobs.c.priority > row.priority, earlier)).limit(most)
        with self._table.engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(some.subquery())).scalar_one())

    def release(self, queue: str, priority: int, owner: str, limit: int) -> list[JobRow]:
        """Hold the owner's next jobs no longer: those are to be sent now, in this order, and are due if nobody does."""
        held = (
            INDEXED_QUEUED,
            jobs.c.held_for == queue,
            jobs.c.priority == priority,
            jobs.c.owner == owner,
        )
        some = select(jobs.c.id).where(*held).order_by(jobs.c.created_at).limit(limit).scalar_subquery()
        statement = sql_update(jobs).where(jobs.c.id.in_(some), *held)
        statement = statement.values(version=jobs.c.version + 1, held_for=None, due_at=now() + UNPROVEN_S)
        with self._table.writing(durable=False) as connection:
            released = [row_of(found) for found in connection.execute(statement.returning(*COLUMNS))]
        return sorted(released, key=lambda row: row.created_at)
