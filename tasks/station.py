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
from contextlib import AbstractContextManager
from typing import Any

from engines.catalogue import JobType
from engines.contract import (
    Batching,
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
from engines.failure import frames
from engines.schemas import with_defaults
from tasks import logs, routing, tracing
from tasks.duty import Duty
from tasks.fleet import Card, WorkerState
from tasks.job import DirectJob, Envelope, Job, JobError, JobState
from tasks.ledger import Ledger
from tasks.presence import BEAT_S, LEASE_S
from tasks.records import Answer, Claim
from tasks.store import StoreError
from tasks.stream import Feed, Teller

logger = logging.getLogger(__name__)

#: A step may overrun its job's deadline by this much before the process is given up.
HANG_GRACE_S = 10.0
#: Exit code of a process that must be started again: EX_SOFTWARE of sysexits.h.
EXIT_BROKEN = 70
#: How long interrupted jobs may take to be given back before the process exits without them.
FALL_GRACE_S = 3.0
#: The process of a drained worker ends so long after its grace period, or after it closed, whatever hangs.
END_S = 6.0
#: How often the card says anew how much memory is used.
MEASURE_EVERY_S = 5.0
#: While engines load, other threads may not run for a while; no job depends on that lease.
LOADING_LEASE_S = 60.0
_RETRY_S = 0.5
_ABANDON_S = 1.0


class StationClosed(Exception):
    """This worker takes no new jobs now."""


class Run:
    """One attempt that runs here; report() is what its engine calls."""

    def __init__(
        self,
        job: Job,
        timeout_s: float,
        feed: Feed,
        listen: Callable[[Progress | Text], None] | None = None,
        ticket: str = "",
    ) -> None:
        """feed: takes what the engine says to the store.

        listen: hears what the engine says, for the client that brought the job here; None for one of a queue.

        ticket: what the outcome must carry.
        """
        self.job = job
        self.ticket = ticket
        self.timeout_s = timeout_s
        self.feed = feed
        self.listen = listen
        self.began = time.monotonic()
        #: Of the engine's run, where traces are on.
        self.span: Any = None
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
        if self._interruption is not None:
            raise self._interruption
        if time.monotonic() > self.deadline:
            raise JobTimedOut(f"It ran longer than {self.timeout_s:g} s.")
        self.feed.say(event)
        if self.span is not None and isinstance(event, Progress):
            told = {"done": event.done, "unit": event.unit, **({} if event.total is None else {"total": event.total})}
            self.span.add_event("progress", told)
        if self.listen is not None:
            self.listen(event)

    @property
    def cancelled(self) -> bool:
        """Whether its owner said so."""
        return isinstance(self._interruption, JobCancelled)


class Station:
    """The worker process as the ledger sees it; execute() is called from its pool threads."""

    def __init__(
        self,
        card: Card,
        engines: Mapping[JobType, Engine],
        ledger: Ledger,
        *,
        warnings: Mapping[JobType, str] | None = None,
        duty: Duty | None = None,
        leave: Callable[[int], None] = os._exit,
        hang_grace_s: float = HANG_GRACE_S,
        beat_s: float = BEAT_S,
    ) -> None:
        """warnings: what to tell with every answer of a type.

        duty: by default it takes jobs at all times, as many as the card has slots for.
        leave: ends the process at once, whatever its other threads do.
        """
        self._card = card
        self._engines = engines
        self._ledger = ledger
        self._warnings = warnings or {}
        self._duty = duty or Duty(card.slots)
        self._leave = leave
        #: What the card says of memory, as it was measured last.
        self._held_gib: float | None = None
        self._used_gib: float | None = None
        self._hang_grace_s = hang_grace_s
        self._beat_s = beat_s
        self._runs: dict[str, Run] = {}
        self._ghosts: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._opened = False
        #: Two beats at once might hear two orders in the wrong order.
        self._beat_lock = threading.Lock()
        #: Set to beat before it is time.
        self._wake = threading.Event()
        #: Set when the process must end, even if the store has not heard of every outcome.
        self._hurry = threading.Event()
        #: Somebody ordered it to take no new jobs.
        self._drained = False
        self._fallen: str | None = None
        self._beating = threading.Thread(target=self._beat_for_ever, name="beat", daemon=True)
        self._teller = Teller(ledger, card.worker_id)

    @property
    def worker_id(self) -> str:
        """One per process start, so that a restart never takes over an old lease."""
        return self._card.worker_id

    @property
    def card(self) -> Card:
        """What this worker shows, as of now."""
        with self._lock:
            busy = Counter(run.job.type for run in self._runs.values())
        state = self._duty.state if self._opened else self._card.state
        batch = {name: engine.batch for name, engine in self._engines.items() if isinstance(engine, Batching)}
        return dataclasses.replace(
            self._card,
            busy=dict(busy),
            state=state,
            batch=batch,
            engine_memory_gib=self._held_gib,
            gpu_memory_used_gib=self._used_gib,
        )

    @property
    def duty(self) -> Duty:
        """What decides whether one more job is taken."""
        return self._duty

    def announce(self) -> None:
        """Show the card and keep the lease from now on, while the engines are being loaded; waits for nothing."""
        self._wake.set()
        self._beating.start()

    def equip(
        self,
        engines: Mapping[JobType, Engine],
        models: Mapping[JobType, str],
        duty: Duty,
        warnings: Mapping[JobType, str],
        memory: Callable[[], tuple[float, float | None]] | None = None,
    ) -> None:
        """Take what has been loaded; jobs may come from now on, as the duty has it.

        memory: measures what the engines hold and what is used of the GPU, in GiB (engines.loading.memory_used).
        """
        if memory is not None:
            threading.Thread(target=self._measure_for_ever, args=[memory], name="memory", daemon=True).start()
        self._engines, self._warnings, self._duty = engines, warnings, duty
        self._card = dataclasses.replace(self._card, models=models, slots=duty.slots)
        if self._drained:
            duty.drain()

    def open(self) -> None:
        """Show that jobs are taken, and keep the lease from now on."""
        self._opened = True
        self._try_to_beat()
        if not self._beating.is_alive():
            self._beating.start()
        self._teller.start()

    def close(self) -> None:
        """Give back what still runs, and end the lease."""
        self.interrupt_all(JobReleased("The worker is shutting down."))
        self._wait_until_idle(FALL_GRACE_S)
        self._stop.set()
        self._wake.set()
        self._teller.stop()
        if self._beating.is_alive():
            self._beating.join(timeout=2 * BEAT_S)
        try:
            self._ledger.presence.retire(self.worker_id, name=self._card.name)
        except StoreError as error:
            logger.warning("the lease ends by itself; the store is away: %s", error)
        for engine in self._engines.values():
            engine.close()

    def drain(self, grace_s: float | None = None) -> None:
        """Take no new jobs, because the process is about to end.

        grace_s: those that run may take so long; then they are given back, and soon the process ends, even if the
        store is away or an engine hangs. None means as long as they like.
        """
        self._duty.finish()
        # So that the card shows it.
        self._wake.set()
        if grace_s is not None:
            threading.Thread(target=self._end_after, args=[grace_s], name="end", daemon=True).start()

    def _end_after(self, grace_s: float) -> None:
        self._stop.wait(grace_s)
        self._hurry.set()
        self.interrupt_all(JobReleased("The worker is shutting down."))
        time.sleep(END_S)
        logger.error("leaving, although something hangs: %d jobs still run", len(self._runs))
        # In a thread of its own, since a frozen store is waited for.
        abandoning = threading.Thread(target=self._abandon, kwargs={"told": True}, name="abandon", daemon=True)
        abandoning.start()
        abandoning.join(timeout=_ABANDON_S)
        self._leave(0)

    def beat_now(self) -> None:
        """Hear at once what there is to hear."""
        self._wake.set()

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

    def execute(self, job: Job, traceparent: str = "") -> str:
        """Begin, run and finish one attempt; the word says what became of the message, for Flower and logs.

        traceparent: the span that sent it.
        """
        with logs.of_job(job.id), self._span(job, traceparent):
            return self._execute(job)

    def _execute(self, job: Job) -> str:
        with tracing.span("begin"):
            claim = self._begin(job)
        if claim is None or claim.answer is not Answer.RUN:
            word = "released" if claim is None else claim.answer.lower()
            logger.info("job %s attempt %d is not run: %s", job.id, job.attempt, word)
            return word
        run = Run(job, claim.timeout_s, Feed(self._teller, job), ticket=claim.ticket)
        with self._lock:
            self._runs[job.id] = run
        self._teller.open(run.feed)
        try:
            return self._conclude(run, self._outcome(run, claim))
        finally:
            self._forget(run)

    def enter(
        self, job_id: str, direct: DirectJob, listen: Callable[[Progress | Text], None]
    ) -> tuple[Run, float] | None:
        """Begin a job that its client brought here: its run for serve(), and when it began in unix seconds.

        None if the id was used before. Raises StationClosed, and StoreError: what cannot be recorded is not run.
        """
        if self._fallen is not None or self._stop.is_set() or self.card.state is not WorkerState.READY:
            raise StationClosed
        job = Job(job_id, direct.type, 1)
        run = Run(job, direct.timeout_seconds, Feed(self._teller, job), listen, direct.ticket)
        # Before the ledger has it, or a beat in between would call it a ghost.
        with self._lock:
            if job_id in self._runs:
                return None
            self._runs[job_id] = run
        started_at = None
        try:
            started_at = self._ledger.enter(job_id, direct, worker_id=self.worker_id)
        finally:
            if started_at is None:
                with self._lock:
                    self._runs.pop(job_id, None)
        if started_at is None:
            return None
        self._teller.open(run.feed)
        return run, started_at

    def serve(self, run: Run, params: Mapping[str, Any]) -> Envelope:
        """Run what enter() has begun, record what came of it, and say the same to its client."""
        try:
            with logs.of_job(run.job.id), self._span(run.job):
                envelope = self._outcome(run, Claim(Answer.RUN, params, run.timeout_s))
            if envelope is None or self._conclude(run, envelope) == "discarded":
                message = "Its worker cannot go on, or was thought lost; send it again."
                return self._envelope(run, JobState.FAILED, error=JobError("worker_lost", message))
            return envelope
        finally:
            self._forget(run)

    def _forget(self, run: Run) -> None:
        self._teller.close(run.feed)
        with self._lock:
            self._runs.pop(run.job.id, None)

    def _span(self, job: Job, parent: str = "") -> AbstractContextManager[Any]:
        return tracing.span(
            "job",
            parent=parent,
            kind="consumer",
            job_id=job.id,
            type=job.type,
            attempt=job.attempt,
            worker_id=self.worker_id,
            region=self._card.region,
        )

    def _begin(self, job: Job) -> Claim | None:
        token = uuid.uuid4().hex
        while not self._stop.is_set() and not self._hurry.is_set() and self._fallen is None:
            asked = time.monotonic()
            try:
                claim = self._ledger.begin(job, worker_id=self.worker_id, token=token)
            except StoreError as error:
                logger.warning("job %s waits for the store: %s", job.id, error)
                self._stop.wait(_RETRY_S)
                continue
            # A process that was frozen meanwhile may have lost its lease, and others run the job: asked again, the
            # same token hears of it.
            if time.monotonic() - asked < LEASE_S:
                return claim
        return None

    def _outcome(self, run: Run, claim: Claim) -> Envelope | None:
        """What came of the attempt; None if it is given back or left to others."""
        job = run.job
        try:
            engine = self._engines.get(job.type)
            if engine is None:
                raise EngineError(f"This worker runs no {job.type}.", code="no_engine")
            with tracing.span("engine.run", model=self._card.models.get(job.type)) as run.span:
                # An API that is not upgraded yet, or was not when it took the job, knows fewer params.
                result = engine.run(with_defaults(job.type, claim.params), run.report)
            if run.listen is not None and run.cancelled:
                # Its client is answered before the row is written: a cancel that came during the last step must win.
                raise JobCancelled
            if warning := self._warnings.get(job.type):
                result["warnings"] = [warning, *result.get("warnings", [])]
            return self._envelope(run, JobState.COMPLETED, result=result)
        except JobCancelled:
            return self._envelope(run, JobState.CANCELLED)
        except JobTimedOut as error:
            return self._envelope(run, JobState.TIMEOUT, error=JobError("run_timeout", str(error)))
        except JobReleased as error:
            if run.listen is not None:
                return self._envelope(run, JobState.FAILED, error=JobError("worker_stopped", str(error)))
            logger.info("job %s is given back: %s", job.id, error)
            self._patiently(job, lambda: self._ledger.release(job, worker_id=self.worker_id))
            return None
        except EngineBroken as error:
            # Left in our name: when the lease ends with the process, it counts as a lost attempt.
            self.fall(f"the {job.type} engine is broken: {error}")
            return None
        except EngineError as error:
            return self._envelope(run, JobState.FAILED, error=JobError(error.code, error.message))
        except Exception as error:  # noqa: BLE001 - one job's failure, told to its client
            # Where, but not the error's own words: they quote what the client sent.
            logger.error("job %s failed inside the engine: %s", job.id, frames(error))
            message = f"The engine failed with {type(error).__name__}; the worker's log has the details."
            return self._envelope(run, JobState.FAILED, error=JobError("engine_error", message))

    def _conclude(self, run: Run, envelope: Envelope | None) -> str:
        if envelope is None:
            return "released" if self._fallen is None else "abandoned"
        queue = routing.queue_name(self._card.region, run.job.type)
        model_queue = routing.queue_name(self._card.region, run.job.type, self._card.models.get(run.job.type))
        said = self._teller.close(run.feed)
        with tracing.span("finish", outcome=envelope.outcome):
            taken = self._patiently(
                run.job,
                lambda: self._ledger.finish(
                    envelope, queue=queue, name=self._card.name, model_queue=model_queue, said=said
                ),
            )
        word = str(envelope.outcome) if taken else "discarded"
        logger.info("job %s attempt %d: %s after %.3f s", run.job.id, run.job.attempt, word, envelope.run_s)
        return word

    def _patiently(self, job: Job, write: Callable[[], bool]) -> bool:
        """The write's answer, once the store takes it; a store that is away for longer than the process has lost it.

        The attempt then ends with its lease, and the job runs again elsewhere.
        """
        while True:
            try:
                return write()
            except StoreError as error:
                logger.warning("job %s: the store is away: %s", job.id, error)
                if self._hurry.is_set() or self._stop.wait(_RETRY_S):
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
            ticket=run.ticket,
        )

    # The beat

    def _beat_for_ever(self) -> None:
        try:
            while not self._stop.is_set():
                self._wake.wait(self._beat_s)
                self._wake.clear()
                if self._stop.is_set():
                    return
                self._try_to_beat()
                self._watch()
        except Exception as error:  # noqa: BLE001 - logged without its own words
            # Others would take its jobs from it, and it would go on taking new ones.
            logger.error("leaving with exit code %d, since the beat cannot go on: %s", EXIT_BROKEN, frames(error))
            self._leave(EXIT_BROKEN)

    def _try_to_beat(self) -> None:
        try:
            self.beat()
        except StoreError as error:
            logger.warning("beat missed: %s", error)

    def beat(self) -> None:
        """Renew the lease, and do as the answer says. Raises StoreError."""
        with self._beat_lock:
            self._beat()

    def _beat(self) -> None:
        with self._lock:
            running = list(self._runs)
        card = self.card
        lease_s = LOADING_LEASE_S if card.state is WorkerState.LOADING else LEASE_S
        heard = self._ledger.presence.beat(self.worker_id, card.encode(), running, name=card.name, lease_s=lease_s)
        self._heed(heard.drained)
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

    def _heed(self, drained: bool) -> None:
        """Follow the order that stands."""
        if drained != self._drained:
            self._drained = drained
            logger.info("told to %s", "drain: no new jobs are taken" if drained else "resume: jobs are taken again")
            if drained:
                self._duty.drain()
            else:
                self._duty.resume()
            # So that the card shows it.
            self._wake.set()

    def _measure_for_ever(self, memory: Callable[[], tuple[float, float | None]]) -> None:
        """In a thread of its own: a driver that does not answer must hold up neither lease nor progress."""
        while True:
            try:
                held, used = memory()
                self._held_gib, self._used_gib = round(held, 1), None if used is None else round(used, 1)
            except Exception as error:  # noqa: BLE001 - a broken device is found out by the next job
                logger.debug("the memory cannot be measured: %s", frames(error))
                self._held_gib = self._used_gib = None
            if self._stop.wait(MEASURE_EVERY_S):
                return

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
        self._abandon(told=False)
        self._leave(EXIT_BROKEN)

    def _abandon(self, *, told: bool) -> None:
        """Give back what hangs here, and end the lease; whoever waits for a hung engine cannot do so itself."""
        try:
            for run in list(self._runs.values()):
                self._ledger.release(run.job, worker_id=self.worker_id)
            self._ledger.presence.retire(self.worker_id, name=self._card.name, told=told)
        except StoreError as error:
            logger.warning("the lease ends by itself; the store is away: %s", error)

    def fall(self, reason: str) -> None:
        """Take no more jobs and leave at the next beat, so that the process is started again."""
        if self._fallen is None:
            self._fallen = reason
            self._duty.finish()
            logger.error("this worker cannot go on: %s", reason)

    def _wait_until_idle(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while self._runs and time.monotonic() < end:
            time.sleep(0.02)
