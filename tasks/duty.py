"""When a worker takes one more job: free slots, working hours, its share, and what it was told.

Thread safe. The consumer asks in the main thread, direct mode in its own; whoever took a slot gives it back from the
thread that ran the job. A slot is taken when the message is delivered, not when a thread gets to it, so no two takers
can have the same one.
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo

from engines.catalogue import JobType
from tasks.fleet import WorkerState


@dataclass(frozen=True, slots=True)
class Hours:
    """From one whole hour to another by the clock on the wall, over midnight if the end is not after the start.

    Equal hours are the whole day. An hour that a clock change skips is not worked that day, one that comes twice is
    worked twice.
    """

    #: 0 to 23.
    start: int
    end: int
    #: None means the host's.
    zone: tzinfo | None = None

    def cover(self, unix_s: float) -> bool:
        """Whether that moment lies within them."""
        hour = datetime.fromtimestamp(unix_s, self.zone).hour
        if self.start < self.end:
            return self.start <= hour < self.end
        return hour >= self.start or hour < self.end


class Duty:
    """The slots of one worker process, and whether they may be filled."""

    def __init__(
        self,
        slots: Mapping[JobType, int],
        *,
        max_jobs: int | None = None,
        hours: Hours | None = None,
        acceptance_rate: float = 1.0,
        poll_s: float = 2.0,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """max_jobs: of all types together; None means as many as there are slots.

        acceptance_rate: the share of its capacity that the worker gives, 0 to 1. After a job of d seconds its slot
        rests for d * (1 - rate) / rate; at 0 nothing is taken at all.
        poll_s: between two looks at the hours.
        """
        self._slots = dict(slots)
        self._max_jobs = sum(self._slots.values()) if max_jobs is None else max_jobs
        self._hours = hours
        self._rate = acceptance_rate
        self._poll_s = poll_s
        self._monotonic = monotonic
        self._now = now
        self._busy: Counter[JobType] = Counter()
        #: Slots that rest, by the end of their rest on the monotonic clock.
        self._rests: list[tuple[float, JobType]] = []
        self._resting: Counter[JobType] = Counter()
        self._drained = False
        self._over = False
        self._within = True
        self._look_again = float("-inf")
        self._listener: Callable[[float], None] | None = None
        # Reentrant: a slot whose message was dropped is given back by the garbage collector, which may run in here.
        self._lock = threading.RLock()

    @property
    def slots(self) -> Mapping[JobType, int]:
        """Jobs it may run at once, by type."""
        return self._slots

    @property
    def state(self) -> WorkerState:
        """What the card says about new jobs."""
        with self._lock:
            if self._drained or self._over:
                return WorkerState.DRAINING
            return WorkerState.READY if self._rate > 0 and self._on_time() else WorkerState.OFF_DUTY

    def room(self, job_type: JobType) -> int:
        """How many more jobs of a type may be taken now."""
        with self._lock:
            if self.state is not WorkerState.READY:
                return 0
            self._wake_rested()
            used = self._busy[job_type] + self._resting[job_type]
            everywhere = self._busy.total() + self._resting.total()
            return max(0, min(self._slots.get(job_type, 0) - used, self._max_jobs - everywhere))

    def open_for(self, job_type: JobType) -> bool:
        """Whether one more job of a type may be taken now."""
        return self.room(job_type) > 0

    def try_take(self, job_type: JobType) -> bool:
        """Take a slot if one may be taken; the answer is whether it is yours, to be given back by done()."""
        with self._lock:
            if not self.open_for(job_type):
                return False
            self._busy[job_type] += 1
            return True

    def done(self, job_type: JobType, ran_s: float) -> None:
        """Give a slot back after so many seconds; it rests first if the worker gives only a share."""
        with self._lock:
            self._busy[job_type] -= 1
            rest_s = ran_s * (1 - self._rate) / self._rate if 0 < self._rate < 1 else 0.0
            if rest_s > 0:
                heapq.heappush(self._rests, (self._monotonic() + rest_s, job_type))
                self._resting[job_type] += 1
        self._tell(rest_s)

    def drain(self) -> None:
        """Take nothing more until resume(); what runs may end."""
        self._drained = True
        self._tell(0)

    def resume(self) -> None:
        """Take jobs again, as hours and share allow."""
        self._drained = False
        self._tell(0)

    def finish(self) -> None:
        """Take nothing more, whatever is ordered later: the process is about to end."""
        self._over = True
        self._tell(0)

    def listen(self, listener: Callable[[float], None]) -> None:
        """Call this in so many seconds' notice of a slot that becomes free, from whichever thread: 0 means now."""
        self._listener = listener

    def _on_time(self) -> bool:
        if self._hours is not None and self._monotonic() >= self._look_again:
            self._within = self._hours.cover(self._now())
            self._look_again = self._monotonic() + self._poll_s
        return self._within

    def _wake_rested(self) -> None:
        now = self._monotonic()
        while self._rests and self._rests[0][0] <= now:
            _, job_type = heapq.heappop(self._rests)
            self._resting[job_type] -= 1

    def _tell(self, after_s: float) -> None:
        if self._listener is not None:
            self._listener(after_s)
