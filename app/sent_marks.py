"""Marks in the rows that their messages are out, many in one write."""

import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from app.job_table import JobRow
from app.rows import Rows

logger = logging.getLogger(__name__)

#: Sent jobs are marked in their rows this often.
MARK_EVERY_S = 0.05


class SentMarks:
    """Marks jobs as sent, many at once, after their clients have been answered.

    A mark that is lost with the process costs a second message, which the ledger answers with BUSY or DONE.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sent: list[tuple[JobRow, str]] = []
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sent-marks", daemon=True)
        self._thread.start()

    def add(self, row: JobRow, epoch: str) -> None:
        """The row's attempt has been sent."""
        with self._lock:
            self._sent.append((row, epoch))
        self._some.set()

    def flush(self) -> None:
        """Write what has been added until now. Raises SQLAlchemyError; what was not written stays due."""
        with self._lock:
            sent, self._sent = self._sent, []
        by_epoch: dict[str, list[tuple[str, int]]] = {}
        for row, epoch in sent:
            by_epoch.setdefault(epoch, []).append((row.id, row.attempt))
        for epoch, jobs_sent in by_epoch.items():
            self._rows.sent(jobs_sent, epoch=epoch)

    def close(self) -> None:
        """Write what is left."""
        self._stop.set()
        self._some.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._some.wait()
            self._some.clear()
            self._stop.wait(MARK_EVERY_S)
            try:
                self.flush()
            except SQLAlchemyError as error:
                logger.warning("some sent jobs stay due and will be sent twice: %s", error)
