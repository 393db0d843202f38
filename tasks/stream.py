"""Both ends of what a running job says: the worker writes it into its region's store, whoever listens reads it there.

A run's entries are numbered, and carry the moment the run began: a write that is repeated adds nothing, and what a
worker says that has lost its job is dropped (tasks/lua/tell.lua). All of a run that waits to be written is joined into
one entry. Everything is written, whether somebody listens or not: docs/streams.md has what it costs.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from engines.contract import Progress, Text
from tasks.job import Job
from tasks.ledger import Ledger
from tasks.records import Said
from tasks.store import StoreError

logger = logging.getLogger(__name__)

#: Two entries of one run are at least so far apart, but for its first text, which waits for nothing.
GAP_S = 0.02
#: After so many entries of a run the gap doubles, so that the longest answer fits into a stream of MOST_ENTRIES.
DOUBLE_EVERY = 1000
#: How often the progress of running jobs is shown.
TELL_EVERY_S = 0.5
#: Of a run's text may wait while the store is away, in characters; what comes then is in its result only.
MOST_WAITING = 1024 * 1024
#: How long the end of a run waits for a write that is under way.
CLOSE_S = 3.0
#: Entries of one read.
READ_COUNT = 500


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a job's stream."""

    #: When the run began that says it, in unix milliseconds by the store's clock: later runs have larger ones.
    run: int
    number: int
    attempt: int
    said: Sequence[Text | Progress]
    #: Nothing follows of this run, and the job's record or row says more.
    last: bool


class Feed:
    """What one run says, on its way to the store; say() is called by the engine and waits for nothing."""

    def __init__(self, teller: "Teller", job: Job) -> None:
        self.job = job
        #: What the engine said last of how far it has come, and what of it was shown.
        self.progress: Progress | None = None
        self.shown: Progress | None = None
        #: The number of the last entry, and when it was sent on the monotonic clock.
        self.number = 0
        self.sent_at = float("-inf")
        #: The entry that is being written, until the store has it.
        self.entry: str | None = None
        self._teller = teller
        self._texts: deque[Text] = deque()
        self._spoke = False
        self._joined: dict[int, tuple[list[str], list[object]]] = {}
        self._waiting = 0

    def say(self, event: Progress | Text) -> None:
        """Take a report of the engine's; from any thread."""
        if isinstance(event, Progress):
            self.progress = event
            return
        self._texts.append(event)
        self._teller.rouse(first=not self._spoke)
        self._spoke = True

    @property
    def due_at(self) -> float:
        """When its next entry may be sent, on the monotonic clock."""
        return self.sent_at + GAP_S * 2.0 ** (self.number // DOUBLE_EVERY)

    def gather(self) -> bool:
        """Join what was said since the last entry; whether there is anything. By one thread at a time."""
        while self._texts:
            text = self._texts.popleft()
            if self._waiting >= MOST_WAITING:
                continue
            self._waiting += len(text.delta)
            deltas, logprobs = self._joined.setdefault(text.choice, ([], []))
            deltas.append(text.delta)
            logprobs.extend(text.logprobs)
        return bool(self._joined)

    def next_entry(self, progress: Progress | None) -> str:
        """The next entry, or the one that the store may not have. By one thread at a time."""
        if self.entry is None:
            texts = [
                [choice, "".join(deltas), *([logprobs] if logprobs else [])]
                for choice, (deltas, logprobs) in self._joined.items()
            ]
            self._joined = {}
            self._waiting = 0
            said: dict[str, object] = {"text": texts} if texts else {}
            if progress is not None:
                said["progress"] = [progress.done, progress.total, progress.unit]
            self.number += 1
            self.entry = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
        return self.entry


class Teller:
    """Writes what the runs of one worker say, from a thread of its own: neither an engine nor the lease waits for it.

    While the store is slow or away what is said is joined, up to MOST_WAITING characters of a run.
    """

    def __init__(self, ledger: Ledger, worker_id: str) -> None:
        self._ledger = ledger
        self._worker_id = worker_id
        self._feeds: dict[str, Feed] = {}
        self._lock = threading.Lock()
        #: Held while the store is being written to.
        self._writing = threading.Lock()
        #: Set when somebody said something; and when it must not wait for the gap.
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._stopped = False
        self._told_at = float("-inf")
        self._thread = threading.Thread(target=self._work, name="teller", daemon=True)

    def start(self) -> None:
        """Write from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Write nothing more."""
        self._stopped = True
        self.rouse(first=True)

    def open(self, feed: Feed) -> None:
        """Write what a run says, which has begun; its first entry says that it has."""
        with self._lock:
            self._feeds[feed.job.id] = feed
        self.rouse(first=False)

    def close(self, feed: Feed) -> list[tuple[int, str]]:
        """Write nothing more of a run; what the store has not got of it, by number, for the one who ends it."""
        with self._lock:
            if self._feeds.get(feed.job.id) is feed:
                del self._feeds[feed.job.id]
        # An entry on its way must not arrive after the end. A store that is away holds up the end itself, too.
        if not self._writing.acquire(timeout=CLOSE_S):
            return []
        try:
            left = [] if feed.entry is None else [(feed.number, feed.entry)]
            feed.entry = None
            if feed.gather():
                entry = feed.next_entry(None)
                left.append((feed.number, entry))
            feed.entry = None
            return left
        finally:
            self._writing.release()

    def rouse(self, *, first: bool) -> None:
        """Somebody said something; first: what must not wait for the gap."""
        if first:
            self._urgent.set()
        if not self._wake.is_set():
            self._wake.set()

    def _work(self) -> None:
        waits = False
        while not self._stopped:
            self._wake.wait(GAP_S if waits else TELL_EVERY_S)
            self._wake.clear()
            waits = self._tell()
            self._urgent.wait(GAP_S)
            self._urgent.clear()

    def _tell(self) -> bool:
        """Write what is due; whether something waits that is not yet."""
        now = time.monotonic()
        shows = now - self._told_at >= TELL_EVERY_S
        with self._lock:
            feeds = list(self._feeds.values())
        if not feeds:
            return False
        waits = False
        with self._writing:
            told: list[tuple[Feed, Said]] = []
            for feed in feeds:
                if self._feeds.get(feed.job.id) is not feed:
                    continue
                progress = feed.progress if shows and feed.progress != feed.shown else None
                some = feed.gather() or feed.entry is not None or feed.number == 0
                if progress is None and (not some or now < feed.due_at):
                    waits = waits or some
                    continue
                entry = feed.next_entry(progress)
                told.append((feed, Said(feed.job.id, feed.job.attempt, progress, feed.number, entry)))
            if shows:
                self._told_at = now
            if not told:
                return waits
            try:
                self._ledger.tell(self._worker_id, [said for _, said in told])
            except StoreError as error:
                logger.debug("what jobs say waits; the store is away: %s", error)
                return True
            for feed, said in told:
                feed.entry = None
                feed.sent_at = now
                feed.shown = said.progress or feed.shown
        return waits


def hear(ledger: Ledger, job_id: str, after: tuple[int, int], wait_s: float) -> list[Entry]:
    """The next entries of a job's stream, waited for; [] if none came.

    after: run and number of the last one that was heard, and it is left out; (0, 0) begins with the last run there is.
    Raises StoreError.
    """
    return [_entry(*found) for found in ledger.hear(job_id, after, wait_s, READ_COUNT)]


def _entry(entry_id: str, fields: dict[str, str]) -> Entry:
    run, _, number = entry_id.partition("-")
    attempt = int(fields.get("attempt") or 0)
    said: list[Text | Progress] = []
    if text := fields.get("said"):
        known = json.loads(text)
        said += [Text(piece[1], piece[0], *piece[2:]) for piece in known.get("text", ())]
        if progress := known.get("progress"):
            said.append(Progress(*progress))
    return Entry(int(run), int(number), attempt, said, last="said" not in fields)
