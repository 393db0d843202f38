"""What one worker process holds: its engines, the jobs it runs, and the lease that says it is alive.

Ownership: a Run belongs to the pool thread that executes it; other threads only set its interruption. The beat thread
is the only one that renews the lease, and the only one that ends the process.
"""

import dataclasses
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping

from engines.catalogue import JobType
from engines.contract import (
    Engine,
    EngineBroken,
    EngineError,
    JobCancelled,
    JobInterrupted,
    JobReleased,
    JobTimedOut,
    Progress,
    Text,
)
from tasks import routing
from tasks.fleet import Card, WorkerState
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import BEAT_S, Answer, Claim, Ledger, StoreError

logger = logging.getLogger(__name__)

#: A step may overrun its job's deadline by this much before the process is given up.
HANG_GRACE_S = 10.0
#: Exit code of a process that must be started again: EX_SOFTWARE of sysexits.h.
EXIT_BROKEN = 70
#: How long interrupted jobs may take to be given back before the process exits without them.
FALL_GRACE_S = 3.0
#: How often the progress of running jobs is shown.
TELL_EVERY_S = 0.5
_RETRY_S = 0.5


class Run:
    """One attempt that runs here; report() is what its engine calls."""

    def __init__(self, job: Job, timeout_s: float) -> None:
        self.job = job
        self.timeout_s = timeout_s
        self.began = time.monotonic()
        #: What the engine said last of how far it has come.
        self.progress: Progress | None = None
        self._interruption: JobInterrupted | None = None

    @property
    def deadline(self) -> float:
        """When it times out, on the monotonic clock."""
        return self.began + self.timeout_s

    def interrupt(self, interruption: JobInterrupted) -> None:
        """Make the engine's next report raise this; the first interruption stands."""
        self._interruption = self._interruption or interruption

    def report(self, event: Progress | Text) -> None:
        """Raises JobInterrupted once the job must stop."""
        if isinstance(event, Progress):
            self.progress = event
        if self._interruption is not None:
            raise self._interruption
        if time.monotonic() > self.deadline:
            raise JobTimedOut(f"It ran longer than {self.timeout_s:g} s.")


class Station:
    """The worker process as the ledger sees it; execute() is called from its pool threads."""

    def __init__(
        self,
        card: Card,
        engines: Mapping[JobType, Engine],
        ledger: Ledger,
        *,
        warnings: Mapping[JobType, str] | None = None,
        leave: Callable[[int], None] = os._exit,
        hang_grace_s: float = HANG_GRACE_S,
    ) -> None:
        """warnings: what to tell with every answer of a type.

        leave: ends the process at once, whatever its other threads do.
        """
        self._card = card
        self._engines = engines
        self._ledger = ledger
        self._warnings = warnings or {}
        self._leave = leave
        self._hang_grace_s = hang_grace_s
        self._runs: dict[str, Run] = {}
        self._ghosts: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._fallen: str | None = None
        self._beating = threading.Thread(target=self._beat_for_ever, name="beat", daemon=True)
        self._telling = threading.Thread(target=self._tell_for_ever, name="progress", daemon=True)

    @property
    def worker_id(self) -> str:
        """One per process start, so that a restart never takes over an old lease."""
        return self._card.worker_id

    @property
    def card(self) -> Card:
        """What this worker shows, as of now."""
        with self._lock:
            busy = Counter(run.job.type for run in self._runs.values())
        return dataclasses.replace(self._card, busy=dict(busy))

    def open(self) -> None:
        """Show the card and keep the lease from now on."""
        self._try_to_beat()
        self._beating.start()
        self._telling.start()

    def close(self) -> None:
        """Give back what still runs, and end the lease."""
        self.interrupt_all(JobReleased("The worker is shutting down."))
        self._wait_until_idle(FALL_GRACE_S)
        self._stop.set()
        if self._beating.is_alive():
            self._beating.join(timeout=2 * BEAT_S)
        try:
            self._ledger.retire(self.worker_id)
        except StoreError as error:
            logger.warning("the lease ends by itself; the store is away: %s", error)
        for engine in self._engines.values():
            engine.close()

    def drain(self) -> None:
        """Show that no new jobs are taken."""
        self._card = dataclasses.replace(self._card, state=WorkerState.DRAINING)

    def interrupt(self, job_id: str, interruption: JobInterrupted) -> None:
        """Stop one job at its next step, if it runs here."""
        with self._lock:
            run = self._runs.get(job_id)
        if run is not None:
            run.interrupt(interruption)

    def interrupt_all(self, interruption: JobInterrupted) -> None:
        """Stop every job at its next step."""
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.interrupt(interruption)

    def execute(self, job: Job) -> str:
        """Begin, run and finish one attempt; the word says what became of the message, for Flower and logs."""
        claim = self._begin(job)
        if claim is None or claim.answer is not Answer.RUN:
            word = "released" if claim is None else claim.answer.lower()
            logger.info("job %s attempt %d is not run: %s", job.id, job.attempt, word)
            return word
        run = Run(job, claim.timeout_s)
        with self._lock:
            self._runs[job.id] = run
        try:
            return self._conclude(run, self._outcome(run, claim))
        finally:
            with self._lock:
                self._runs.pop(job.id, None)

    def _begin(self, job: Job) -> Claim | None:
        token = uuid.uuid4().hex
        while not self._stop.is_set() and self._fallen is None:
            try:
                return self._ledger.begin(job, worker_id=self.worker_id, token=token)
            except StoreError as error:
                logger.warning("job %s waits for the store: %s", job.id, error)
                self._stop.wait(_RETRY_S)
        return None

    def _outcome(self, run: Run, claim: Claim) -> Envelope | None:
        """What came of the attempt; None if it is given back or left to others."""
        job = run.job
        try:
            engine = self._engines.get(job.type)
            if engine is None:
                raise EngineError(f"This worker runs no {job.type}.", code="no_engine")
            result = engine.run(claim.params, run.report)
            if warning := self._warnings.get(job.type):
                result["warnings"] = [warning, *result.get("warnings", [])]
            return self._envelope(run, JobState.COMPLETED, result=result)
        except JobCancelled:
            return self._envelope(run, JobState.CANCELLED)
        except JobTimedOut as error:
            return self._envelope(run, JobState.TIMEOUT, error=JobError("run_timeout", str(error)))
        except JobReleased as error:
            logger.info("job %s is given back: %s", job.id, error)
            self._patiently(job, lambda: self._ledger.release(job, worker_id=self.worker_id))
            return None
        except EngineBroken as error:
            # Left in our name: when the lease ends with the process, it counts as a lost attempt.
            self.fall(f"the {job.type} engine is broken: {error}")
            return None
        except EngineError as error:
            return self._envelope(run, JobState.FAILED, error=JobError(error.code, error.message))
        except Exception as error:
            logger.exception("job %s failed inside the engine", job.id)
            message = f"The engine failed with {type(error).__name__}; the worker's log has the details."
            return self._envelope(run, JobState.FAILED, error=JobError("engine_error", message))

    def _conclude(self, run: Run, envelope: Envelope | None) -> str:
        if envelope is None:
            return "released" if self._fallen is None else "abandoned"
        queue = routing.queue_name(self._card.region, run.job.type)
        taken = self._patiently(run.job, lambda: self._ledger.finish(envelope, queue=queue))
        word = str(envelope.outcome) if taken else "discarded"
        logger.info("job %s attempt %d: %s after %.3f s", run.job.id, run.job.attempt, word, envelope.run_s)
        return word

    def _patiently(self, job: Job, write: Callable[[], bool]) -> bool:
        """The write's answer, once the store takes it; a store that is away for longer than the process has lost it."""
        while True:
            try:
                return write()
            except StoreError as error:
                logger.warning("job %s: the store is away: %s", job.id, error)
                if self._stop.wait(_RETRY_S):
                    return False

    def _envelope(
        self, run: Run, outcome: JobState, *, result: Mapping[str, object] | None = None, error: JobError | None = None
    ) -> Envelope:
        return Envelope(
            job_id=run.job.id,
            attempt=run.job.attempt,
            worker_id=self.worker_id,
            region=self._card.region,
            outcome=outcome,
            run_s=time.monotonic() - run.began,
            result=result,
            error=error,
        )

    # The beat

    def _beat_for_ever(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._try_to_beat()
            self._watch()

    def _try_to_beat(self) -> None:
        try:
            self._beat()
        except StoreError as error:
            logger.warning("beat missed: %s", error)

    def _beat(self) -> None:
        with self._lock:
            running = list(self._runs)
        heard = self._ledger.beat(self.worker_id, self.card.encode(), running)
        for job_id in heard.cancelled:
            self.interrupt(job_id, JobCancelled())
        for job_id in heard.lost:
            self.interrupt(job_id, JobReleased("Another worker has it."))
        # Begun in our name, but the answer never reached us. Twice in a row, since a begin may be under way right now.
        ghosts = set(heard.ghosts) - self._runs.keys()
        for job_id in ghosts & self._ghosts:
            record = self._ledger.look(job_id)
            if record is not None:
                logger.warning("job %s was begun for this worker, which never heard of it; given back", job_id)
                # The type plays no part in the fence.
                self._ledger.release(Job(job_id, JobType.LLM, record.attempt), worker_id=self.worker_id)
        self._ghosts = ghosts

    def _tell_for_ever(self) -> None:
        """Show progress from a thread of its own: the engine's must not wait for the store, nor must the lease."""
        told: dict[str, Progress] = {}
        while not self._stop.wait(TELL_EVERY_S):
            with self._lock:
                now = {job_id: run.progress for job_id, run in self._runs.items() if run.progress is not None}
            news = {job_id: progress for job_id, progress in now.items() if told.get(job_id) != progress}
            try:
                if news:
                    self._ledger.tell(self.worker_id, news)
                told = now
            except StoreError as error:
                logger.debug("progress is not shown; the store is away: %s", error)

    def _watch(self) -> None:
        """Give the process up if a step hangs past its job's deadline; nothing else frees the device."""
        if self._fallen is None:
            now = time.monotonic()
            with self._lock:
                hung = [run for run in self._runs.values() if now > run.deadline + self._hang_grace_s]
            if not hung:
                return
            for run in hung:
                message = f"It ran longer than {run.timeout_s:g} s, and its engine did not stop."
                self._conclude(run, self._envelope(run, JobState.TIMEOUT, error=JobError("run_timeout", message)))
                with self._lock:
                    self._runs.pop(run.job.id, None)
            self.fall(f"job {hung[0].job.id} hangs in its engine")
        self.interrupt_all(JobReleased("The worker has to be started again."))
        self._wait_until_idle(FALL_GRACE_S)
        logger.error("leaving with exit code %d: %s", EXIT_BROKEN, self._fallen)
        try:
            # Whoever waits for the same hung engine cannot give its job back itself.
            for run in list(self._runs.values()):
                self._ledger.release(run.job, worker_id=self.worker_id)
            self._ledger.retire(self.worker_id)
        except StoreError as error:
            logger.warning("the lease ends by itself; the store is away: %s", error)
        self._leave(EXIT_BROKEN)

    def fall(self, reason: str) -> None:
        """Take no more jobs and leave at the next beat, so that the process is started again."""
        if self._fallen is None:
            self._fallen = reason
            logger.error("this worker cannot go on: %s", reason)

    def _wait_until_idle(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while self._runs and time.monotonic() < end:
            time.sleep(0.02)
