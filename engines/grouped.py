"""Dynamic batching: waiting jobs that can share a pass are computed together, for every engine but the LLM's."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from engines.contract import Progress
from engines.failure import frames
from engines.request import Request
from engines.thread import is_broken, is_out_of_memory

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Request)

#: Full passes that must fit before a limit that memory set is tried again at twice its size.
FORGIVE_AFTER = 32


class Abandoned(Exception):
    """Nobody wants the present pass any more: its jobs were stopped, or the engine ends. A pass lets it through."""


class Step(Protocol):
    """What a pass calls at every step. Raises Abandoned to end the pass."""

    def __call__(self, done: int | None = None, total: int | None = None) -> None:
        """Tell every job of the batch that done of total units are computed; total None where it is not known.

        Without arguments each tells how far it is by itself (Request.poll): for a pass whose jobs are not equally far.
        """


class Limit:
    """How much one pass may hold, learned from passes that ran out of memory."""

    def __init__(self, most: int) -> None:
        #: What may be tried now.
        self.now = most
        self._most = most
        #: Full passes since the limit was set.
        self._full = 0

    def halve(self, tried: int) -> None:
        """A pass over `tried` ran out of memory."""
        self.now = max(1, tried // 2)
        self._full = 0

    def fitted(self, size: int) -> None:
        """A pass over `size` went through; the FORGIVE_AFTER-th that was more than half full doubles the limit."""
        if self.now < self._most and size * 2 > self.now:
            self._full += 1
            if self._full == FORGIVE_AFTER:
                self.now = min(self.now * 2, self._most)
                self._full = 0


class Work(Protocol[R]):
    """A loaded model as the engine thread uses it."""

    #: What steps count: "step", "token", "second", "text".
    unit: str

    def key(self, request: R) -> Hashable:
        """Requests of equal keys can share a pass."""

    def pick(self, alike: Sequence[R]) -> Sequence[R]:
        """Which of the waiting requests of one key to compute together; oldest first, and the oldest is among them."""

    def compute(self, batch: Sequence[R], step: Step) -> None:
        """One pass: finish() or end() each request; one that is left unfinished waits again, behind all others."""


class Grouped(Generic[R]):
    """One pass after another, each over requests of one key. Used by the engine thread alone.

    A pass that runs out of memory is tried again with half as many; one that fails otherwise, with each alone.
    """

    def __init__(self, work: Work[R], between_steps: Callable[[], bool]) -> None:
        """between_steps: looks after the requests that wait meanwhile; false when the engine is to end."""
        self.rows: list[R] = []
        self.stepping: Sequence[R] = ()
        self._work = work
        self._between_steps = between_steps
        #: How many requests of a key fit one pass, for those keys that have run out of memory.
        self._limits: dict[Hashable, Limit] = {}

    def turn(self, waiting: deque[R]) -> None:
        """Compute the oldest waiting request and those that can share its pass.

        Raises what compute() raises where that is for the engine thread to judge.
        """
        # Until the batch is known: what a request makes key() or pick() raise is its own failure.
        self.stepping = [waiting[0]]
        key = self._work.key(waiting[0])
        batch, rest = self._take(waiting, key), []
        self.rows = self.stepping = batch
        try:
            self._work.compute(batch, self._step)
            rest = self._unended()
        except Abandoned:
            rest = self._unended()
        except Exception as error:
            left = self._unended()
            # A lone request that has ended meanwhile leaves nobody to fail: a library may wrap Abandoned into its own.
            if is_out_of_memory(error) or is_broken(error) or len(batch) == len(left) == 1:
                raise
            logger.error("a pass over %d jobs failed; each that is left is tried alone: %s", len(batch), frames(error))
            for request in left:
                request.alone = True
            waiting.extendleft(reversed(left))
        else:
            if key in self._limits:
                self._limits[key].fitted(len(batch))
        waiting.extend(rest)
        self._rest()

    def make_room(self) -> Sequence[R]:
        """Everything of the present pass, to be computed half as many at a time; nothing if there was only one."""
        together, left = len(self.rows), self._unended()
        if together == 1:
            return []
        self._limits.setdefault(self._work.key(self.rows[0]), Limit(sys.maxsize)).halve(together)
        self._rest()
        return left

    def reap(self) -> None:
        """Take out the requests that have ended."""
        self.rows = self._unended()
        self.stepping = self.rows

    def _rest(self) -> None:
        """Hold nothing of a pass that is over: its requests have their files and results."""
        self.rows, self.stepping = [], ()

    def _take(self, waiting: deque[R], key: Hashable) -> list[R]:
        batch = [waiting[0]]
        if not waiting[0].alone:
            alike = [request for request in waiting if not request.alone and self._work.key(request) == key]
            batch = list(self._work.pick(alike))
            if key in self._limits:
                batch = batch[: self._limits[key].now]
        for request in batch:
            waiting.remove(request)
        return batch

    def _step(self, done: int | None = None, total: int | None = None) -> None:
        for request in self.stepping:
            if done is None:
                request.poll()
            else:
                request.tell(Progress(done, total, self._work.unit))
        if not self._between_steps() or not self._unended():
            raise Abandoned

    def _unended(self) -> list[R]:
        return [request for request in self.rows if not request.ended.is_set()]
