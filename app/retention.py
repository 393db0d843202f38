"""What goes when its time has come, so that nothing grows without limit; the leading control process does it.

    params and results   RESULT_RETENTION_HOURS after their job ended; GET then shows the job without its result
    rows                 ROW_RETENTION_DAYS after it; with the row goes its Idempotency-Key
    usage of keys        after USAGE_RETENTION_DAYS
    the audit log        AUDIT_RETENTION_DAYS after each of its rows was written, hourly; 0 keeps it for ever
    blobs                with what held them; those that no row came to hold, after a day
    the store            what it holds of jobs that have ended or have no row, hourly; the rest has a time to live
    the broker           messages of queues in which no job waits, hourly, where nobody takes them

Work is done in batches of one statement each, with a pause between two, so that nobody waits for it. All of it can be
repeated, and done by two at once. The row changes first: what is left over when this process dies in between are blobs
without a row, which go within a day.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from app.blobs import FOLDERS, Blobs
from app.chores import while_leading
from app.links import Down, Link, Mailbox, mailboxes
from app.remains import Traces
from app.rows import Rows
from tasks.job import LIVE

logger = logging.getLogger(__name__)

#: Rows of one statement; SQLite lets nobody else write for the few milliseconds that one takes.
BATCH = 200
#: Between two full batches, and between two looks when there was less to do.
PAUSE_S = 0.2
EVERY_S = 30.0
SWEEP_EVERY_S = 3600.0
#: One of the blob store's 256 folders at a time: each is looked at once in 21 hours.
FOLDER_EVERY_S = 300.0
#: Far more than a submit takes from writing its blob to writing its row.
ORPHAN_S = 24 * 3600.0
#: Messages for which no job waits are left to the workers up to here: to drop a few saves nothing, and a job that is
#: sent at the same moment would have to be sent again.
STALE_MESSAGES = 1000


class Retention:
    """Deletes what is too old. Threads and processes may do it at once."""

    def __init__(
        self,
        rows: Rows,
        links: Mapping[str, Link],
        blobs: Blobs,
        *,
        result_hours: float,
        row_days: float,
        others: Mapping[str, Callable[[], int]] | None = None,
    ) -> None:
        """others: delete a batch of what else is too old, by what that is, and say how many there were."""
        self._rows = rows
        self._links = links
        self._blobs = blobs
        self._result_s = result_hours * 3600.0
        self._row_s = row_days * 86_400.0
        self._others = others or {}
        self._folder = ""

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Delete what is too old for as long as this process leads, until stopped is set."""
        swept_at = float("-inf")

        def turn() -> float:
            nonlocal swept_at
            if self.prune() + self.delete() > 0:
                return PAUSE_S
            self.sweep_folder(time.time())
            if time.monotonic() - swept_at >= SWEEP_EVERY_S:
                swept_at = time.monotonic()
                self.sweep_stores()
                self.purge_queues()
                self.prune_others(stopped)
            return EVERY_S

        while_leading(
            turn,
            leads,
            stopped,
            pause_s=PAUSE_S,
            away="nothing is pruned while the database is away",
            failed="retention failed and is tried again",
            away_s=EVERY_S,
            failed_s=EVERY_S,
        )

    def prune(self) -> int:
        """Delete the params and results of one batch of old jobs; how many there were."""
        return self._let_go(
            self._rows.remains.prunable(self._result_s, BATCH), self._rows.remains.prune, "results are pruned"
        )

    def delete(self) -> int:
        """Delete one batch of old rows; how many there were."""
        return self._let_go(
            self._rows.remains.outdated(self._row_s, BATCH), self._rows.remains.delete, "rows are deleted"
        )

    def prune_others(self, stopped: threading.Event) -> None:
        """Delete what else is too old, in batches, until stopped is set."""
        for what, prune in self._others.items():
            total = count = prune()
            while count >= BATCH and not stopped.wait(PAUSE_S):
                total += (count := prune())
            if total:
                logger.info("%d %s are deleted", total, what)

    def _let_go(self, old: list[Traces], change: Callable[[list[str]], None], what: str) -> int:
        if old:
            change([traces.job_id for traces in old])
            for traces in old:
                for blob in traces.blobs:
                    self._blobs.drop(blob)
            logger.info("%d %s", len(old), what)
        return len(old)

    def sweep_folder(self, now: float) -> None:
        """Delete what no row holds in the blob store's folder whose turn it is; now: unix seconds."""
        # By the clock: a process that is started again each day would never come to the last folder.
        folder = FOLDERS[int(now / FOLDER_EVERY_S) % len(FOLDERS)]
        if folder != self._folder:
            self._folder = folder
            self.sweep_blobs([folder], now)

    def sweep_blobs(self, folders: Iterable[str], now: float) -> int:
        """Delete what has lain in these folders of the blob store for a day and no row holds; how many there were."""
        dropped = 0
        for folder in folders:
            try:
                aged = list(self._blobs.aged(folder, now - ORPHAN_S).items())
            except OSError as error:
                logger.warning("the blob store cannot be listed: %s", type(error).__name__)
                return dropped
            for some in (aged[start : start + BATCH] for start in range(0, len(aged), BATCH)):
                known = self._rows.remains.traces([job_id for _, job_id in some])
                orphans = [blob for blob, job_id in some if job_id not in known or blob not in known[job_id].blobs]
                for blob in orphans:
                    self._blobs.drop(blob)
                dropped += len(orphans)
        if dropped:
            logger.info("%d blobs that no row holds are deleted", dropped)
        return dropped

    def sweep_stores(self) -> None:
        """Drop what the stores hold of jobs that have ended or have no row, and orders to workers that are gone."""
        for mailbox in mailboxes(self._links):
            with suppress(Down), mailbox.breaker:
                for job_ids in mailbox.ledger.entered():
                    self._sweep(mailbox, job_ids)
                if dropped := mailbox.ledger.presence.drop_old_orders(time.time()):
                    logger.warning("orders to drain are dropped, their workers are gone: %s", ", ".join(dropped))

    def _sweep(self, mailbox: Mailbox, job_ids: list[str]) -> None:
        known = self._rows.remains.traces(job_ids)
        dead = [job_id for job_id in job_ids if job_id not in known or not known[job_id].live]
        records = mailbox.ledger.look_all(dead)
        for job_id, record in records.items():
            # A direct job's row may still be to come: it is made of its record.
            if record.state in LIVE and (job_id in known or record.direct is None):
                mailbox.ledger.cancel(job_id)
        mailbox.ledger.drop_places(job_id for job_id in dead if job_id not in records)

    def purge_queues(self) -> None:
        """Drop the messages of queues that hold many and in which no job waits: their jobs have ended meanwhile.

        Workers drop such messages as they come to them; a queue that nobody serves would keep them for ever.
        """
        for link in self._links.values():
            with suppress(Down):
                idle = [name for name, queued in link.queues().items() if not queued.depth]
                names = [name for queue in idle for name in (queue, f"{queue}.local")]
                with link.broker.breaker:
                    held = link.broker.publisher.depths(names)
                    for name in (name for name in names if held[name] >= STALE_MESSAGES):
                        link.broker.publisher.purge(name)
                        logger.warning("queue %s held %d messages of jobs that have ended", name, held[name])
