"""The reconciler: `python -m app.control`. Makes every job end, whatever was lost on the way.

Any number may run; one leads. Nothing here needs the leader to be alone: every change is a compare-and-set, and every
step can be repeated. Leading only saves work.
"""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from dotenv import find_dotenv, load_dotenv
from sqlalchemy.exc import SQLAlchemyError

from app.audit import Audit
from app.blobs import Blobs
from app.chores import Chore
from app.courier import Courier
from app.deliveries import Deliveries
from app.destinations import Destinations
from app.dispatch import DIRECT_LOST, Dispatch, open_dispatch
from app.ends import Ends
from app.job_table import JobRow
from app.keys import Keys
from app.links import Down, Link, Mailbox, mailboxes
from app.metrics import ControlServer
from app.reroute import Reroute
from app.retention import Retention
from app.settings import Settings
from app.tables import open_database
from app.turns import Turns
from app.usage import Usage
from engines.failure import frames
from tasks import logs, memory, routing, tracing
from tasks.job import LIVE, MAX_ATTEMPTS, JobError, JobState
from tasks.records import Queued
from tasks.settings import SettingsError

logger = logging.getLogger(__name__)

TICK_S = 0.25
LEAD_S = 5.0
BATCH = 200
#: Sends to a region that cannot be reached are tried again after this long.
POSTPONE_S = 2.0
#: How often the broker's queues are compared with the ledger's.
COMPARE_EVERY_S = 5.0
#: When a message may be thought lost at the earliest, and at which age the tries stop becoming rarer.
RESEND_FIRST_S = 10.0
RESEND_MOST_S = 900.0
#: For so long after a store's restart its records are looked for: notes of what was sent before are written late.
RESTARTED_S = 15.0


class Reconciler:
    """One look at everything that may have got stuck, and the mending of it, at every tick()."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._rows = dispatch.rows
        self._reroute = Reroute(dispatch)
        self._compared_at = float("-inf")
        #: Messages that each queue seemed to lack at the last comparison.
        self._lacking: dict[str, int] = {}
        #: The run of each mailbox's server, and since when it is known.
        self._servers: dict[int, tuple[str, float]] = {}

    def tick(self) -> None:
        """Raises SQLAlchemyError while the database is away; a region that is away is passed over."""
        for mailbox in mailboxes(self._dispatch.links):
            regions = [name for name, link in self._dispatch.links.items() if link.mailbox is mailbox]
            try:
                self.fold_news(mailbox)
                self.retry_lost(mailbox)
                self.refill(mailbox, regions)
            except Down as down:
                logger.debug("%s", down)
        self.expire()
        self._reroute.look()
        self.send_due()
        if time.monotonic() - self._compared_at >= COMPARE_EVERY_S:
            self._compared_at = time.monotonic()
            self.reenter()
            self.resend_missing()

    def fold_news(self, mailbox: Mailbox) -> None:
        """Copy into the rows what workers have begun, finished and given back."""
        while True:
            with mailbox.breaker:
                job_ids, mark = mailbox.ledger.news(BATCH)
                if not job_ids:
                    return
                rows = self._rows.get_all(job_ids)
                open_ids = [job_id for job_id in job_ids if job_id not in rows or not rows[job_id].ended]
                records = mailbox.ledger.look_all(open_ids)
            strays: set[str] = set()
            for job_id, record in records.items():
                known = rows.get(job_id) or self._dispatch.adopt(job_id, record)
                if known is None:
                    if record.state in LIVE:
                        # Of a row that is gone, as after an older backup was restored: nobody waits for it.
                        strays.add(job_id)
                    continue
                row = self._dispatch.fold(known, record, mailbox)
                rows[job_id] = row
                if record.state == "queued" and not row.ended and record.attempt == row.attempt:
                    given_back = row.status is JobState.RUNNING and self._rows.given_back(row)
                    if not given_back:
                        self._rows.send_again(job_id)
            with mailbox.breaker:
                for job_id in strays:
                    mailbox.ledger.cancel(job_id)
                ended = {job_id for job_id in job_ids if job_id not in rows or rows[job_id].ended}
                mailbox.ledger.forget(ended - strays)
                mailbox.ledger.settle(mark)
            if len(job_ids) < BATCH:
                return

    def retry_lost(self, mailbox: Mailbox) -> None:
        """Take jobs from workers whose lease has ended: the next attempt, or the end if there were enough."""
        with mailbox.breaker:
            orphans = mailbox.ledger.orphans()
            records = mailbox.ledger.look_all([job_id for _, job_id in orphans])
        if not orphans:
            return
        rows = self._rows.get_all([job_id for _, job_id in orphans])
        for worker_id, job_id in orphans:
            row, record = rows.get(job_id), records.get(job_id)
            held = record is not None and record.state == "running" and record.worker_id == worker_id
            if held and record is not None and record.direct is not None:
                if row is None:
                    # The news of it is still to be read, and makes its row.
                    continue
                self._dispatch.end(row, JobState.FAILED, DIRECT_LOST)
                with mailbox.breaker:
                    mailbox.ledger.forget([job_id])
            elif row is not None and not row.ended and held and record is not None and record.attempt == row.attempt:
                row = self._lose(row, worker_id)
            with mailbox.breaker:
                mailbox.ledger.bury(worker_id, job_id)
                if held and (row is None or row.ended):
                    # Nobody would hand in an outcome with which it goes.
                    mailbox.ledger.forget([job_id])

    def refill(self, mailbox: Mailbox, regions: Iterable[str]) -> None:
        """After a store came back empty: everything that it held is due again."""
        with mailbox.breaker:
            epoch = mailbox.ledger.epoch()
            server = mailbox.ledger.server()
        if server != self._servers.get(id(mailbox), ("", 0.0))[0]:
            self._servers[id(mailbox)] = server, time.monotonic()
            # Now, and again for a while.
            self._compared_at = float("-inf")
        for region in regions:
            # All of them: a job that runs in the rows' eyes would else be ended for the time that has passed.
            while rows := self._rows.of_other_epochs(region, epoch, BATCH):
                for row in rows:
                    self._enter_again(row)
                logger.warning("the store of %s is in a new life; %d jobs are sent again", region, len(rows))

    def reenter(self) -> None:
        """After a store was restarted: what was entered last may be lost, although it came back with its files."""
        for mailbox in mailboxes(self._dispatch.links):
            _, since = self._servers.get(id(mailbox), ("", float("-inf")))
            if time.monotonic() - since > RESTARTED_S:
                continue
            for region in (name for name, link in self._dispatch.links.items() if link.mailbox is mailbox):
                try:
                    self._look_for_records(region, mailbox)
                except Down as down:
                    logger.debug("%s", down)

    def _look_for_records(self, region: str, mailbox: Mailbox) -> None:
        with mailbox.breaker:
            epoch = mailbox.ledger.epoch()
        last = ""
        while rows := self._rows.entered(region, epoch, after=last, limit=BATCH):
            last = rows[-1].id
            with mailbox.breaker:
                records = mailbox.ledger.look_all([row.id for row in rows])
            for row in rows:
                record = records.get(row.id)
                if record is None or record.attempt < row.attempt:
                    logger.warning("the restarted store of %s lacks job %s; it is sent again", region, row.id)
                    self._enter_again(row)

    def _enter_again(self, row: JobRow) -> None:
        if row.status is JobState.RUNNING:
            # Whoever runs it may not know yet; the new attempt fences it.
            self._rows.next_attempt(row.id, attempt=row.attempt, lost=False)
        else:
            self._rows.send_again(row.id)

    def expire(self) -> None:
        """End jobs that waited or ran for too long."""
        for row in self._rows.waited_too_long(BATCH):
            self._dispatch.give_up(row)
        for row in self._rows.ran_too_long(BATCH):
            known = self._dispatch.look(row.id)
            if known is not None and known.status is JobState.RUNNING:
                message = f"It ran longer than {row.timeout_seconds:g} s, and its worker did not say so."
                self._dispatch.end(known, JobState.TIMEOUT, JobError("run_timeout", message))

    def send_due(self) -> None:
        """Publish what is not proven to be published; tell the ledger of ends it has not heard of."""
        down: set[str] = set()
        while True:
            rows = self._rows.due(BATCH)
            for row in rows:
                if row.region in down:
                    continue
                try:
                    if row.ended:
                        self._dispatch.tell(row)
                    else:
                        self._dispatch.send(row)
                except Down as error:
                    logger.debug("%s", error)
                    down.add(row.region)
            # Marked here and not by the batching thread, or the same rows would be due again at once.
            self._dispatch.flush()
            if any(row.region in down for row in rows):
                # All of them at once: thousands may be held, and to look at each would hold up the other regions.
                self._rows.postpone(down, POSTPONE_S)
            if len(rows) < BATCH:
                return

    def resend_missing(self) -> None:
        """Send again what waits in the ledger while the broker holds fewer messages than that, twice in a row."""
        lacking: dict[str, int] = {}
        models: dict[str, str | None] = {}
        for link in self._dispatch.links.values():
            try:
                queues = link.queues()
                lacking.update(self._compare(link, queues))
                models.update({name: queued.model for name, queued in queues.items()})
            except Down as down:
                logger.debug("%s", down)
        for name, missing in lacking.items():
            both = min(missing, self._lacking.get(name, 0))
            if both <= 0:
                continue
            region, job_type = routing.split_queue(name)
            rows = self._rows.long_unbegun(
                region, job_type, models[name], first_s=RESEND_FIRST_S, most_s=RESEND_MOST_S, limit=min(both, BATCH)
            )
            for row in rows:
                self._rows.send_again(row.id)
            if rows:
                logger.warning("queue %s lacks %d messages; %d jobs are sent again", name, both, len(rows))
        self._lacking = lacking

    def _compare(self, link: Link, queues: Mapping[str, Queued]) -> dict[str, int]:
        """By queue: jobs that wait in the ledger less messages that wait in the broker."""
        names = [name for name, queued in queues.items() if queued.depth]
        if not names:
            return {}
        pinned = {name: f"{name}.local" for name in names}
        with link.broker.breaker:
            held = link.broker.publisher.depths([*names, *pinned.values()])
        return {name: queues[name].depth - held[name] - held[pinned[name]] for name in names}

    def _lose(self, row: JobRow, worker_id: str) -> JobRow:
        """The row as it is then."""
        if row.losses + 1 >= MAX_ATTEMPTS:
            message = f"It was tried {MAX_ATTEMPTS} times, and each time its worker was lost."
            self._dispatch.metering.lost(row)
            return self._dispatch.end(row, JobState.FAILED, JobError("worker_lost", message))
        changed = self._rows.next_attempt(row.id, attempt=row.attempt)
        if changed is not None:
            self._dispatch.metering.lost(row)
            with logs.of_job(row.id):
                logger.warning("worker %s is lost; job %s goes into attempt %d", worker_id, row.id, row.attempt + 1)
        return changed or row


class Copies:
    """Finds out that the database is an older copy of the one that led before: a restored backup, or a late replica.

    Each store remembers until when the database said that control leads. A database that says less does not know of
    everything that the store has seen. The store then begins another life, as if it had come back empty: every job
    that the copy takes for live is sent again.
    """

    def __init__(self, dispatch: Dispatch, led_until: float | None) -> None:
        """led_until: what the database said before this process led, in unix seconds."""
        self._links = dispatch.links
        self._rows = dispatch.rows
        self._led_until = led_until
        self._compared: set[int] = set()

    def look(self, led_until: float) -> None:
        """Compare with the stores that were not compared yet, and let all remember; led_until: as it is now."""
        for mailbox in mailboxes(self._links):
            with suppress(Down), mailbox.breaker:
                if id(mailbox) not in self._compared and mailbox.ledger.renew_epoch(self._led_until):
                    logger.warning("the database is an older copy: what it takes for live is sent again")
                    # At once: for the time that has passed since, they would be ended as having run for too long.
                    self._rows.run_again(name for name, link in self._links.items() if link.mailbox is mailbox)
                self._compared.add(id(mailbox))
                mailbox.ledger.led(led_until)


def run(
    dispatch: Dispatch, stopped: threading.Event, *, holder: str | None = None, chores: Sequence[Chore] = ()
) -> None:
    """Reconcile while we lead, until stopped is set. A database that is away is waited for."""
    me = holder or uuid.uuid4().hex
    leads = threading.Event()
    for chore in chores:
        # A thread of its own: a blob store that is slow to delete, or a webhook that hangs, holds up no job.
        threading.Thread(target=chore.run, args=(leads, stopped), name=type(chore).__name__, daemon=True).start()
    reconciler = Reconciler(dispatch)
    copies = Copies(dispatch, None)
    leading = False
    lead_until = 0.0
    while not stopped.wait(TICK_S):
        try:
            if time.monotonic() > lead_until - LEAD_S / 2:
                before = dispatch.rows.leadership.until()
                led, leading = leading, dispatch.rows.leadership.take(me, LEAD_S)
                lead_until = time.monotonic() + LEAD_S
                (leads.set if leading else leads.clear)()
                if leading and not led:
                    logger.info("control %s leads", me[:8])
                    # What it knew is of the time when it led before.
                    reconciler = Reconciler(dispatch)
                    copies = Copies(dispatch, before)
                if leading:
                    copies.look(dispatch.rows.leadership.until() or 0.0)
            if leading:
                began = time.monotonic()
                reconciler.tick()
                dispatch.metering.ticked(time.monotonic() - began)
        except SQLAlchemyError as error:
            logger.error("the database is away: %s", error)
            lead_until = 0.0
            stopped.wait(1.0)
        except Exception as error:  # noqa: BLE001 - logged without its own words
            # One tick that fails must not end what makes every job end.
            logger.error("a tick failed: %s", frames(error))
            stopped.wait(1.0)


def main() -> None:
    """Entry of `python -m app.control`; ends on SIGINT and SIGTERM."""
    load_dotenv(find_dotenv(usecwd=True))
    try:
        logs.set_up(logging.INFO, os.environ)
        settings = Settings.from_environ(os.environ)
        memory.check(settings.regions.values())
        tracing.start("control", os.environ)
    except SettingsError as error:
        sys.exit(f"control does not start: {error}")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    database = open_database(settings.database_url)
    dispatch = open_dispatch(
        database,
        settings.regions,
        settings.default_region,
        settings.blobs_url,
        fair_window=settings.fair_window,
    )
    logger.info("control is up")
    usage = Usage(database)
    retention = Retention(
        dispatch.rows,
        dispatch.links,
        Blobs(settings.blobs_url),
        result_hours=settings.result_retention_hours,
        row_days=settings.row_retention_days,
        others=_too_old(usage, Audit(database), settings),
    )
    deliveries = Deliveries(database, public_url=settings.public_url)
    courier = Courier(
        deliveries,
        Destinations(settings.webhook_networks, http=settings.webhook_http),
        disable_days=settings.webhook_disable_days,
        log_days=settings.row_retention_days,
    )
    turns = Turns(dispatch, Keys(database), settings.fair_window)
    dispatch.metering.follow(courier.outcomes)
    # The last of the accounts: what it counts is not taken back with the transaction.
    ends = Ends(dispatch.rows, [usage.count, deliveries.enter, dispatch.metering.account])
    run(dispatch, stopped, chores=[turns, retention, ends, courier, *_metrics(dispatch, Keys(database), settings)])
    dispatch.close()
    tracing.stop()


def _too_old(usage: Usage, audit: Audit, settings: Settings) -> dict[str, Callable[[], int]]:
    """What retention deletes beside jobs."""
    found: dict[str, Callable[[], int]] = {"days of usage": partial(usage.prune, settings.usage_retention_days)}
    if settings.audit_retention_days:
        found["rows of the audit log"] = partial(audit.prune, settings.audit_retention_days, BATCH)
    return found


def _metrics(dispatch: Dispatch, keys: Keys, settings: Settings) -> list[ControlServer]:
    """The port on which this process shows its metrics; none where the settings have none, or it cannot be had."""
    if not settings.control_metrics_port:
        return []
    try:
        return [ControlServer(dispatch, keys, settings)]
    except OSError as error:
        # No reason to leave jobs without a reconciler.
        where = f"{settings.control_metrics_host}, CONTROL_METRICS_PORT={settings.control_metrics_port}"
        logger.warning("no metrics are shown at CONTROL_METRICS_HOST=%s: %s", where, error.strerror or error)
        return []


if __name__ == "__main__":
    main()
