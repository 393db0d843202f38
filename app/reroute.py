"""Queued work leaves a region that cannot serve it, for the nearest that can; pinned jobs stay.

A move is one compare-and-set on the rows: another region, and the next attempt as the fence. What the job left behind
is dropped then, or as soon as its old store answers again; until that has happened a worker there that cannot be
reached may run it too, and the first outcome counts. Nothing else ever runs a job twice at once.
"""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress

from app.dispatch import Dispatch
from app.job_table import JobRow
from app.links import Down, Link, Mailbox, mailboxes, nearest
from engines.catalogue import JobType
from tasks import fleet, routing
from tasks.fleet import WorkerState
from tasks.presence import LEASE_S

logger = logging.getLogger(__name__)

EVERY_S = 0.5
#: Jobs leave this long after the last worker that took them did. A worker that is started again at once is back by
#: then, and a connection that broke is open again, so that neither scatters a region's queue over the others.
GRACE_S = 5.0
#: The same while a worker that will take them loads its models.
LOADING_GRACE_S = 30.0
#: Jobs that wait leave a region whose store or broker has not answered for this long.
UNREACHABLE_S = 15.0
#: Jobs that run leave a region whose store has not answered for this long: their workers may be alive and have as long
#: as this to hand in what they have.
UNREACHABLE_RUNNING_S = LEASE_S + 30.0
#: How often jobs are looked for in regions that are not among the settings any more.
UNKNOWN_EVERY_S = 5.0
#: Jobs moved by one statement.
BATCH = 500

#: A region's jobs of a type, or of those that name the model.
Kind = tuple[str, JobType, str | None]


class Reroute:
    """Watches which regions can serve what waits in them, and moves what cannot be served."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._rows = dispatch.rows
        self._links = dispatch.links
        self._looked_at = self._looked_for_unknown_at = float("-inf")
        #: Since when, on the monotonic clock, nobody takes these jobs.
        self._unserved: dict[Kind, float] = {}
        #: Regions of live jobs that are not among the settings, and since when that is known.
        self._unknown: dict[str, float] = {}
        # By id(): stores that may hold what jobs left behind. All of them at first: whoever led before may have died
        # between a move and the rest of it.
        self._unswept = {id(mailbox): mailbox for mailbox in mailboxes(self._links)}

    def look(self) -> None:
        """Move what has to move, every EVERY_S; a region that is away is passed over."""
        now = time.monotonic()
        if now - self._looked_at < EVERY_S:
            return
        self._looked_at = now
        for mailbox in mailboxes(self._links):
            try:
                self._leave_unserved(mailbox, now)
            except Down:
                self._unswept[id(mailbox)] = mailbox
                for kind in [kind for kind in self._unserved if self._links[kind[0]].mailbox is mailbox]:
                    del self._unserved[kind]
        self._leave_unreachable(now)
        for mailbox in list(self._unswept.values()):
            with suppress(Down):
                self._sweep(mailbox)

    def _leave_unserved(self, mailbox: Mailbox, now: float) -> None:
        """Raises Down."""
        with mailbox.breaker:
            queues = mailbox.ledger.queues()
        for name, queued in queues.items():
            region, job_type = routing.split_queue(name)
            if region not in self._links or self._links[region].mailbox is not mailbox:
                continue
            kind = (region, job_type, queued.model)
            if self._serves(self._links[region], job_type, queued.model):
                self._unserved.pop(kind, None)
                continue
            since = self._unserved.setdefault(kind, now)
            grace_s = LOADING_GRACE_S if self._will_serve(self._links[region], job_type, queued.model) else GRACE_S
            if queued.depth and now - since >= grace_s:
                self._move(kind, f"no live worker takes them for {now - since:.0f} s")

    def _leave_unreachable(self, now: float) -> None:
        for broker in {
            id(link.broker): link.broker for link in self._links.values() if link.broker.breaker.tripped
        }.values():
            # Only a publish would find out whether it is back, and there may be nothing to publish.
            with suppress(Down), broker.breaker:
                broker.publisher.depths([routing.queue_name(next(iter(self._links)), JobType.LLM)])
        for name, link in self._links.items():
            store_s, broker_s = link.mailbox.breaker.failing_s, link.broker.breaker.failing_s
            if max(store_s, broker_s) >= UNREACHABLE_S:
                which = "store" if store_s >= broker_s else "broker"
                why = f"its {which} has not answered for {max(store_s, broker_s):.0f} s"
                self._move_all(name, why, running=store_s >= UNREACHABLE_RUNNING_S)
        if now - self._looked_for_unknown_at >= UNKNOWN_EVERY_S:
            self._looked_for_unknown_at = now
            unknown = set(self._rows.census.regions()) - self._links.keys()
            self._unknown = {name: self._unknown.get(name, now) for name in unknown}
            for name, since in self._unknown.items():
                why = "it is not among the settings"
                self._move_all(name, why, running=now - since >= UNREACHABLE_RUNNING_S)

    def _move_all(self, region: str, why: str, *, running: bool) -> None:
        for job_type, model in self._rows.census.movable(region):
            self._move((region, job_type, model), why)
            if running:
                self._move((region, job_type, model), why, running=True)

    def _move(self, kind: Kind, why: str, *, running: bool = False) -> None:
        region, job_type, model = kind
        to = nearest(self._links, region, lambda link: self._serves(link, job_type, model))
        while to is not None:
            moved = self._rows.move(region, job_type, model, to=to, running=running, limit=BATCH)
            if moved:
                state = "running" if running else "waiting"
                logger.warning("%d %s %s jobs move from %s to %s: %s", len(moved), state, job_type, region, to, why)
                self._withdraw(region, moved)
            if len(moved) < BATCH:
                return

    def _withdraw(self, region: str, moved: Iterable[JobRow]) -> None:
        """Drop what the jobs left behind. Within one store their next entry there does it."""
        left = self._links.get(region)
        if left is None:
            return
        gone = [(row.id, row.attempt) for row in moved if self._links[row.region].mailbox is not left.mailbox]
        try:
            with left.mailbox.breaker:
                left.mailbox.ledger.withdraw(gone)
        except Down:
            self._unswept[id(left.mailbox)] = left.mailbox

    def _sweep(self, mailbox: Mailbox) -> None:
        """Drop what jobs left behind in a store that did not answer when they moved. Raises Down."""
        with mailbox.breaker:
            for job_ids in mailbox.ledger.entered():
                rows = self._rows.get_all(job_ids)
                mailbox.ledger.withdraw(
                    (row.id, row.attempt) for row in rows.values() if not self._lives_in(row, mailbox)
                )
        del self._unswept[id(mailbox)]

    def _lives_in(self, row: JobRow, mailbox: Mailbox) -> bool:
        link = self._links.get(row.region)
        return link is not None and link.mailbox is mailbox

    def _serves(self, link: Link, job_type: JobType, model: str | None) -> bool:
        """Whether a live worker takes such jobs there. Raises Down.

        A worker that was killed is live until its lease ends, but the connection on which it hears of cancels is
        closed at once. That is no proof, and need not be one: a job that has not begun may move at any time.
        """
        takers = fleet.able(link.cards(), job_type, model)
        if not takers:
            return False
        with link.mailbox.breaker:
            return link.mailbox.ledger.presence.anyone_listens([card.worker_id for card in takers])

    def _will_serve(self, link: Link, job_type: JobType, model: str | None) -> bool:
        return any(
            card.state is WorkerState.LOADING and job_type in card.slots and model in (None, card.models.get(job_type))
            for card in link.cards()
        )
