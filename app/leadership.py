"""Which control process leads: one row, taken for some seconds at a time by the database's clock."""

from sqlalchemy import insert as sql_insert
from sqlalchemy import or_, select
from sqlalchemy import update as sql_update
from sqlalchemy.exc import IntegrityError

from app.job_table import JobTable
from app.tables import leadership, now


class Leadership:
    """Who leads. Raises as JobTable does."""

    def __init__(self, table: JobTable) -> None:
        self._table = table

    def until(self) -> float | None:
        """Until when whoever led last was to lead, in unix seconds; None if nobody ever did."""
        with self._table.engine.connect() as connection:
            until: float | None = connection.execute(select(leadership.c.until)).scalar()
        return until

    def take(self, holder: str, seconds: float) -> bool:
        """Whether `holder` leads for the next seconds: it did before, or nobody does."""
        until = now() + seconds
        free = or_(leadership.c.holder == holder, leadership.c.until < now())
        if self._table.write(
            sql_update(leadership).where(leadership.c.id == 1, free).values(holder=holder, until=until)
        ):
            return True
        try:
            self._table.write(sql_insert(leadership).values(id=1, holder=holder, until=until))
        except IntegrityError:
            return False
        return True
