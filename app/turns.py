"""Within one priority of one queue, keys take turns by weight, so that nobody waits for another's thousand jobs.

A broker hands jobs out in the order in which they came. So only a window of a queue's jobs is sent to it; those that
come while the window is full stay in their rows, held for the queue, until the leading control process releases them:
as workers begin what was sent, the next ones in the order of turns. Between two keys whose jobs are held, weights of 3
and 1 are three jobs to one; within a key, the order of arrival stays. A more urgent job is not held for less urgent
ones. A held job is a queued row like any other, which nobody has sent yet: it is cancelled, expires and moves as such.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from app.chores import while_leading
from app.job_table import JobRow
from app.keys import Keys
from app.links import Down, Link
from app.rows import Rows
from engines.catalogue import JobType
from tasks import routing
from tasks.routing import Load

if TYPE_CHECKING:
    from app.dispatch import Dispatch

logger = logging.getLogger(__name__)

#: Jobs for each slot that are sent ahead, and what workers could begin in so many seconds at their best: between two
#: looks of control none shall lack work.
PER_SLOT = 4
AHEAD_S = 0.5
#: What a job costs a slot beside its own seconds, at the least.
OVERHEAD_S = 0.02
#: How often control looks for turns.
TURN_S = 0.1
#: With many held jobs, to count them takes a while: at most this part of the time goes into it. But control looks again
#: before workers may have begun all the urgent ones that were sent ahead, and go on to others.
MOST_OF_TIME = 0.1
LONGEST_S = 0.4
#: Jobs of one look and one queue; the next look comes at once.
BATCH = 500
#: How long a count of held jobs serves the API; what a process holds itself it adds at once.
FRESH_S = 0.5
#: Weights that an operator has changed hold after this long.
WEIGHTS_FRESH_S = 1.0
_MOST_BEFORE = 10_000

#: Held jobs by queue, priority and owner.
Counts = Mapping[tuple[str, int, str], int]


def window(least: int, load: Load) -> int:
    """How many jobs of a queue may be in its broker before others are held."""
    per_s = 0.0 if load.service_s is None else load.slots / (load.service_s + OVERHEAD_S)
    return max(least, PER_SLOT * load.slots, round(AHEAD_S * per_s))


class HeldBack:
    """The API's side: which jobs are held, and how many are. Threads may share it."""

    def __init__(self, rows: Rows, least: int) -> None:
        """least: the smallest window; with 0 nothing is held."""
        self._rows = rows
        self._least = least
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._queues: set[tuple[str, int]] = set()
        self._until = float("-inf")

    def queue_for(self, link: Link, job_type: JobType, model: str | None, priority: int) -> str | None:
        """The queue that a new job has to be held for; None if it is sent now."""
        if not self._least or link.away() is not None:
            return None
        queue = routing.queue_name(link.region.name, job_type, model)
        try:
            waiting = link.mailbox.ahead[priority].get().get(queue, 0)
            most = window(self._least, link.load(job_type, model))
        except Down:
            return None
        self.counts()
        return queue if waiting >= most or (queue, priority) in self._queues else None

    def add(self, row: JobRow) -> None:
        """Count a row that was just held."""
        if row.held_for is not None:
            with self._lock:
                self._counts[row.held_for, row.priority, row.owner] += 1
                self._queues.add((row.held_for, row.priority))

    def counts(self) -> Counts:
        """How many are held, at most FRESH_S old."""
        if not self._least:
            return {}
        with self._lock:
            if time.monotonic() >= self._until:
                self._counts = Counter(self._rows.held.counts())
                self._queues = {(queue, priority) for queue, priority, _ in self._counts}
                self._until = time.monotonic() + FRESH_S
            return dict(self._counts)

    def before(self, queue: str, priority: int, owner: str | None, own: int | None = None) -> int:
        """About how many held jobs of the queue have their turn before another one of this owner.

        own: how many of the owner's own, if that is known; otherwise all of them. Weights are left out of account.
        """
        own = own if own is not None else self._own(queue, priority, owner)
        others = 0
        for (name, other, who), count in self.counts().items():
            if name == queue and other >= priority and who != owner:
                others += count if other > priority else min(count, own + 1)
        return own + others

    def more_urgent(self, queue: str, priority: int) -> int:
        """How many held jobs of the queue are released before any of this priority."""
        return sum(count for (name, other, _), count in self.counts().items() if name == queue and other > priority)

    def own_before(self, row: JobRow, *, newest: bool = False) -> int:
        """How many of its owner's held jobs have their turn before this one.

        newest: it has just come, so that is all of them, which need not be counted again for each.
        """
        if newest and row.held_for is not None:
            return max(self._own(row.held_for, row.priority, row.owner) - 1, 0)
        return self._rows.held.before(row, _MOST_BEFORE)

    def _own(self, queue: str, priority: int, owner: str | None) -> int:
        counts = self.counts().items()
        return sum(count for (name, other, who), count in counts if (name, who) == (queue, owner) and other >= priority)


class Turns:
    """Control's side: releases held jobs as workers begin what was sent before, owners taking turns by weight."""

    def __init__(self, dispatch: "Dispatch", keys: Keys, least: int) -> None:
        """least: the smallest window; with 0 everything that is still held is released."""
        self._dispatch = dispatch
        self._rows = dispatch.rows
        self._keys = keys
        self._least = least
        self._weights: Mapping[str, int] = {}
        self._weights_until = float("-inf")
        self._counting_s = 0.0
        self._models: dict[str, str | None] = {}
        #: By queue and priority: how many turns each owner has had, in turns of weight 1, and the queue's own count.
        self._had: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        self._now: dict[tuple[str, int], float] = defaultdict(float)

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Release what has its turn for as long as this process leads, until stopped is set."""

        def turn() -> float:
            self.release()
            return self.pause_s

        while_leading(
            turn,
            leads,
            stopped,
            pause_s=TURN_S,
            away="held jobs wait until the database is back",
            failed="held jobs could not be released; it is tried again",
            failed_s=1.0,
        )

    @property
    def pause_s(self) -> float:
        """How long to wait after the last release(); by what it counted, however long it took to send."""
        return max(TURN_S, min(self._counting_s / MOST_OF_TIME, LONGEST_S))

    def release(self) -> int:
        """Send what has its turn now; how many jobs those were. A region that is away is passed over."""
        began = time.monotonic()
        held: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
        for (queue, priority, owner), count in self._rows.held.counts().items():
            held[queue, priority][owner] = count
        self._counting_s = time.monotonic() - began
        for known in [key for key in self._had if key not in held]:
            # Nobody waits there any more: all begin anew.
            del self._had[known], self._now[known]
        released = 0
        # The most urgent first: what they fill the window with holds up the others.
        for queue, priority in sorted(held, key=lambda key: -key[1]):
            try:
                released += self._release(queue, priority, held[queue, priority])
            except Down as down:
                logger.debug("%s", down)
        return released

    def _release(self, queue: str, priority: int, counts: Mapping[str, int]) -> int:
        """Raises Down."""
        region, job_type = routing.split_queue(queue)
        link = self._dispatch.links.get(region)
        if link is None or link.away() is not None:
            return 0
        with link.mailbox.breaker:
            waiting = link.mailbox.ledger.waiting(queue, priority)
        room = BATCH
        if self._least:
            if queue not in self._models:
                self._models[queue] = self._rows.held.model(queue)
            room = min(window(self._least, link.load(job_type, self._models[queue])) - waiting, BATCH)
        order = list(self._take_turns((queue, priority), counts, room))
        ready = {
            owner: iter(self._rows.held.release(queue, priority, owner, times))
            for owner, times in Counter(order).items()
        }
        sent = 0
        for owner in order:
            if (row := next(ready[owner], None)) is not None:
                # If this fails, it and the rest are due like any other.
                self._dispatch.send(row)
                sent += 1
        return sent

    def _take_turns(self, key: tuple[str, int], counts: Mapping[str, int], room: int) -> Iterator[str]:
        """Owners in the order of their turns, each as often as it has jobs, for as much as there is room."""
        weights, had = self._current_weights(), self._had[key]
        left = dict(counts)
        for owner in left:
            # Whoever was not here has not saved up turns.
            had[owner] = max(had.get(owner, 0.0), self._now[key])
        for _ in range(room):
            if not left:
                return
            owner = min(left, key=lambda one: (had[one] + 1 / weights.get(one, 1), one))
            self._now[key] = had[owner]
            had[owner] += 1 / weights.get(owner, 1)
            left[owner] -= 1
            if not left[owner]:
                del left[owner]
            yield owner

    def _current_weights(self) -> Mapping[str, int]:
        if time.monotonic() >= self._weights_until:
            self._weights = self._keys.weights()
            self._weights_until = time.monotonic() + WEIGHTS_FRESH_S
        return self._weights


def by_queue(counts: Counts) -> Sequence[tuple[str, int]]:
    """How many are held, by queue."""
    summed: Counter[str] = Counter()
    for (queue, _, _), count in counts.items():
        summed[queue] += count
    return list(summed.items())
