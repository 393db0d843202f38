"""The ends of jobs, each handed once to everybody who keeps account of them: usage per key, webhooks.

Whoever folds an end writes the job's row and nothing else. The leading control process looks for ended rows that are
not noted yet, marks them and lets the accounts write what they make of them, in one transaction: whatever dies in
between, and however many processes believe that they lead, each end is counted and told exactly once.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from sqlalchemy import Connection

from app.chores import while_leading
from app.job_table import JobRow
from app.rows import Rows

logger = logging.getLogger(__name__)

#: Ends of one transaction; SQLite lets nobody else write for the few milliseconds that one takes.
BATCH = 200
#: Between two looks when there was less to do.
EVERY_S = 0.25

#: Writes, on this connection and nowhere else, what it makes of jobs that have just ended. It may be called again for
#: the same ones if the transaction comes to nothing.
Account = Callable[[Connection, Sequence[JobRow]], None]


class Ends:
    """Hands on the ends of jobs. Threads and processes may do it at once."""

    def __init__(self, rows: Rows, accounts: Sequence[Account]) -> None:
        self._rows = rows
        self._accounts = accounts

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Hand on what ends for as long as this process leads, until stopped is set."""
        while_leading(
            lambda: 0.01 if self.hand_on() == BATCH else EVERY_S,
            leads,
            stopped,
            pause_s=EVERY_S,
            away="ends are handed on later, the database is away",
            failed="ends could not be handed on; it is tried again",
        )

    def hand_on(self) -> int:
        """Hand on one batch; how many there were. Raises SQLAlchemyError, or what an account raises."""
        with self._rows.together() as connection:
            ended = self._rows.note(connection, BATCH)
            # A withdrawn job is one that nobody was told of.
            told = [row for row in ended if not row.withdrawn]
            if told:
                for account in self._accounts:
                    account(connection, told)
        return len(ended)
