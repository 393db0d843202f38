"""A job's row and its live record together, against a small model of what a client may see.

Two regions with a store each, two workers, and any order of what clients, workers, the reconciler and bad luck do. The
rules of section 4.1 of the specification stand in `promises`: nothing is lost, states climb only, one outcome, and it
is one that a worker handed in or that the platform gave. At the end of every run all that is still open must end.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete

from app.control import Reconciler
from app.dispatch import Dispatch, open_dispatch
from app.job_table import JobRow
from app.request import Request
from app.tables import jobs, open_database
from engines.catalogue import JobType
from tasks import routing
from tasks.fleet import Card
from tasks.job import Envelope, Job, JobError, JobState
from tasks.records import Answer
from tasks.settings import load_regions

REGIONS = ("asia-east", "europe-west")
WORKERS = st.sampled_from(["a", "b"])
#: Which of the jobs; there are as many as were submitted.
PICKS = st.integers(0, 20)
OUTCOMES = st.sampled_from([JobState.COMPLETED, JobState.FAILED, JobState.TIMEOUT])
MOST_JOBS = 3
#: Rounds in which all that is open must end: each job may lose its worker three times, and move.
MOST_ROUNDS = 12
RANKS = {JobState.QUEUED: 0, JobState.RUNNING: 1}
ENDED = 2


@dataclass(frozen=True)
class Held:
    """An attempt that a worker was told to run."""

    job_id: str
    attempt: int
    region: str
    worker: str
    ticket: str


@dataclass
class Known:
    """What the model knows of a job."""

    key: str
    #: The row as it was last seen; once it has ended it stays so.
    seen: JobRow
    cancelled: bool = False
    #: Results that a worker was told have been taken.
    handed: list[Any] = field(default_factory=list)


class RowAndLedger(RuleBasedStateMachine):
    """Subclasses state `dispatch`."""

    dispatch: Dispatch

    @initialize()
    def begin_anew(self) -> None:
        """An empty platform; connections are those of the run before."""
        self.rows = self.dispatch.rows
        with self.rows.together() as connection:
            connection.execute(delete(jobs))
        for region in REGIONS:
            self.ledger(region).store.flushdb()
        self.reconciler = Reconciler(self.dispatch)
        self.jobs: dict[str, Known] = {}
        self.held: list[Held] = []

    def ledger(self, region: str) -> Any:
        return self.dispatch.links[region].mailbox.ledger

    def pick(self, pick: int) -> Known:
        return list(self.jobs.values())[pick % len(self.jobs)]

    # What clients do

    @precondition(lambda self: len(self.jobs) < MOST_JOBS)
    @rule(region=st.sampled_from(REGIONS), brief=st.booleans(), pinned=st.booleans())
    def submit(self, region: str, brief: bool, pinned: bool) -> None:
        """brief: its queue time-out is over at once."""
        key = uuid.uuid4().hex
        row = self._submit(key, region, brief, pinned)
        self.jobs[row.id] = Known(key, row)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def submit_again(self, pick: int) -> None:
        """The same idempotency key gives the same job, whatever became of it."""
        known = self.pick(pick)
        row = known.seen
        brief = row.queue_deadline is not None
        assert self._submit(known.key, str(row.region_wanted), brief, not row.allow_cross_region).id == row.id

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def look(self, pick: int) -> None:
        """A client asks, which folds."""
        row = self.dispatch.look(self.pick(pick).seen.id)
        assert row is not None
        self._see(row)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS)
    def cancel(self, pick: int) -> None:
        """A client cancels; whether it came in time, the answer says."""
        known = self.pick(pick)
        before = known.seen
        row = self.dispatch.cancel(before)
        known.cancelled = known.cancelled or row.status is JobState.CANCELLED
        self._see(row)
        assert row.ended

    # What workers do

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, worker=WORKERS, region=st.sampled_from(REGIONS), behind=st.integers(0, 1))
    def begin(self, pick: int, worker: str, region: str, behind: int) -> None:
        """A message is delivered, perhaps late, or twice, or where the job no longer is."""
        row = self._row(self.pick(pick))
        attempt = max(row.attempt - behind, 1)
        before = self.ledger(region).look(row.id)
        claim = self.ledger(region).begin(Job(row.id, row.type, attempt), worker_id=worker, token=uuid.uuid4().hex)
        if claim.answer is not Answer.RUN:
            return
        assert claim.params == {"messages": []}
        assert before.state in ("queued", "running")
        if before.state == "running":
            assert not self.ledger(region).store.exists(f"lease:{before.worker_id}")
        if region == row.region:
            assert attempt == row.attempt
            assert not row.ended
        self.held.append(Held(row.id, attempt, region, worker, claim.ticket))

    @rule(pick=PICKS, outcome=OUTCOMES)
    def finish(self, pick: int, outcome: JobState) -> None:
        """Whoever was once told to run it hands in an outcome, however late."""
        # No precondition: who was told depends on the clock, and hypothesis wants the same choices each time.
        if not self.held:
            return
        held = self.held[pick % len(self.held)]
        error = None if outcome is JobState.COMPLETED else JobError("engine_error", uuid.uuid4().hex)
        result = None if error else {"response": uuid.uuid4().hex}
        self._finish(held, outcome, result, error)

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, worker=WORKERS)
    def forge(self, pick: int, worker: str) -> None:
        """Somebody who is no worker of ours writes an outcome."""
        row = self._row(self.pick(pick))
        made_up = Envelope(
            row.id, row.attempt, worker, row.region, JobState.COMPLETED, 0.1, result={"response": "forged"}
        )
        self.ledger(row.region).finish(made_up, queue=routing.queue_name(row.region, row.type))

    @rule(pick=PICKS)
    def give_back(self, pick: int) -> None:
        """A worker that drains gives an attempt back."""
        if not self.held:
            return
        held = self.held[pick % len(self.held)]
        self.ledger(held.region).release(Job(held.job_id, JobType.LLM, held.attempt), worker_id=held.worker)

    @rule(worker=WORKERS, region=st.sampled_from(REGIONS))
    def beat(self, worker: str, region: str) -> None:
        """A worker is alive; of what it is told it drops nothing, as one that hangs would."""
        self.ledger(region).presence.beat(worker, _card(worker, region), [])

    @rule(worker=WORKERS, region=st.sampled_from(REGIONS))
    def die(self, worker: str, region: str) -> None:
        """A worker's lease ends."""
        self.ledger(region).presence.retire(worker, told=False)

    # What the reconciler does, and bad luck

    @rule()
    def reconcile(self) -> None:
        """One tick: fold, expire, take from the dead, refill, send."""
        self.reconciler.tick()

    @precondition(lambda self: self.jobs)
    @rule(pick=PICKS, running=st.booleans(), told=st.booleans())
    def move(self, pick: int, running: bool, told: bool) -> None:
        """A region's jobs leave it; told: the store that they leave answers, so they are withdrawn from it."""
        region = self._row(self.pick(pick)).region
        to = next(name for name in REGIONS if name != region)
        moved = self.rows.move(region, JobType.LLM, None, to=to, running=running, limit=10)
        if told:
            self.ledger(region).withdraw((row.id, row.attempt) for row in moved)

    @rule(region=st.sampled_from(REGIONS))
    def empty(self, region: str) -> None:
        """A store is started again, and has lost everything."""
        self.ledger(region).store.flushdb()

    @rule()
    def restart(self) -> None:
        """Another control leads: it knows nothing of what the last one saw."""
        self.reconciler = Reconciler(self.dispatch)

    # What must hold

    @invariant()
    def promises(self) -> None:
        """Every job that was accepted is there, and as it was or further."""
        if not hasattr(self, "jobs"):
            return
        for known in self.jobs.values():
            self._see(self._row(known))

    def teardown(self) -> None:
        """With a healthy worker everything ends, once."""
        if not hasattr(self, "jobs"):
            return
        for region in REGIONS:
            for worker in ("a", "b"):
                self.ledger(region).presence.retire(worker, told=False)
        for _ in range(MOST_ROUNDS):
            self.reconciler.tick()
            self.promises()
            open_rows = [known.seen for known in self.jobs.values() if not known.seen.ended]
            if not open_rows:
                return
            for row in open_rows:
                worker = uuid.uuid4().hex
                self.ledger(row.region).presence.beat(worker, _card(worker, row.region), [])
                claim = self.ledger(row.region).begin(Job(row.id, row.type, row.attempt), worker_id=worker, token="t")
                if claim.answer is Answer.RUN:
                    held = Held(row.id, row.attempt, row.region, worker, claim.ticket)
                    self._finish(held, JobState.COMPLETED, {"response": worker}, None)
        raise AssertionError(f"stuck: {[(row.id, row.status, row.attempt) for row in open_rows]}")

    def _submit(self, key: str, region: str, brief: bool, pinned: bool) -> JobRow:
        request = Request(JobType.LLM, None, None, {"messages": []}, 0, region, not pinned, 60, 1e-6 if brief else None)
        row = self.dispatch.submit("owner", request, idempotency_key=key).row
        self.dispatch.flush()
        return row

    def _finish(self, held: Held, outcome: JobState, result: Any, error: JobError | None) -> None:
        envelope = Envelope(
            *(held.job_id, held.attempt, held.worker, held.region, outcome, 0.1),
            result=result,
            error=error,
            ticket=held.ticket,
        )
        if self.ledger(held.region).finish(envelope, queue=routing.queue_name(held.region, JobType.LLM)):
            self.jobs[held.job_id].handed.append((outcome, _said(result, error)))

    def _row(self, known: Known) -> JobRow:
        row = self.rows.get(known.seen.id)
        assert row is not None, "an accepted job is lost"
        return row

    def _see(self, row: JobRow) -> None:
        known = self.jobs[row.id]
        before, known.seen = known.seen, row
        if before.ended:
            assert _outcome(row) == _outcome(before), "an outcome changed"
            return
        assert RANKS.get(row.status, ENDED) >= RANKS[before.status], "a state went back"
        assert row.attempt >= before.attempt
        assert row.version >= before.version
        match row.status:
            case JobState.COMPLETED:
                assert (row.status, row.result) in known.handed
            case JobState.CANCELLED:
                assert known.cancelled
            case JobState.TIMEOUT if row.error_code == "queue_timeout":
                assert row.queue_deadline is not None
            case JobState.FAILED | JobState.TIMEOUT if row.error_code == "engine_error":
                assert (row.status, row.error_message) in known.handed
            case JobState.FAILED:
                assert row.error_code == "worker_lost"


def _said(result: Any, error: JobError | None) -> str:
    return error.message if error else f'{{"response":"{result["response"]}"}}'


def _outcome(row: JobRow) -> tuple[Any, ...]:
    return (row.status, row.result, row.error_code, row.error_message, row.worker_id, row.attempt, row.completed_at)


def _card(worker: str, region: str) -> str:
    return Card(worker, worker, region, "host", "cpu", {JobType.LLM: "echo"}, {JobType.LLM: 1}, 0.0).encode()


@contextmanager
def platform(valkey_url: str, database_url: str, blobs: str) -> Iterator[Dispatch]:
    """The API's side of two regions that have a store each, on one empty server."""
    environ = {"GPU_STORE_URL": f"{valkey_url}/1", "GPU_BROKER_URL": f"{valkey_url}/0"}
    known = load_regions(environ)
    regions = {name: replace(known[name], store=f"{valkey_url}/{1 + at}") for at, name in enumerate(REGIONS)}
    engine = open_database(database_url)
    dispatch = open_dispatch(engine, regions, REGIONS[0], blobs)
    try:
        yield dispatch
    finally:
        dispatch.close()
        engine.dispose()


def run(dispatch: Dispatch, *, runs: int, steps: int, number: int | None = None) -> int:
    """So many runs of so many steps; the same number makes the same ones. How many steps there were in all.

    Raises what the first run that broke a promise raises, with the shortest way there.
    """
    counted = 0

    class Machine(RowAndLedger):
        def check_invariants(self, *args: Any, **kwargs: Any) -> None:
            nonlocal counted
            counted += 1
            super().check_invariants(*args, **kwargs)

    Machine.dispatch = dispatch
    profile = settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine if number is None else seed(number)(Machine), settings=profile)
    return counted
