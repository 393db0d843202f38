"""How many jobs may wait to be sent to a region whose broker or store takes none."""

import threading
import time

from app.rows import Rows

#: Jobs that are kept for a region until it takes them; their inputs lie in SQL or in the blob store meanwhile.
MAX_UNSENT = 10_000
#: How often they are counted; in between each process adds what it has let in itself.
COUNT_EVERY_S = 1.0


class Backlog:
    """Lets jobs in for a region that takes none, up to a bound. Threads may share it.

    Processes do not know of one another's jobs between two counts, so together they may go over the bound by what the
    others take within a second.
    """

    def __init__(self, rows: Rows, most: int) -> None:
        """most: jobs per region."""
        self.most = most
        self._rows = rows
        self._lock = threading.Lock()
        #: By region: jobs, and when they were counted on the monotonic clock.
        self._known: dict[str, tuple[int, float]] = {}

    def admit(self, region: str) -> bool:
        """Whether there is room for one more job, which then counts."""
        with self._lock:
            count, counted_at = self._known.get(region, (0, float("-inf")))
            if time.monotonic() - counted_at >= COUNT_EVERY_S:
                count, counted_at = self._rows.census.unsent(region, self.most), time.monotonic()
            admitted = count < self.most
            self._known[region] = (count + admitted, counted_at)
            return admitted
