"""The ledger against a model of it: whatever the order of calls, an attempt runs once and has one outcome."""

import json
import time
import uuid

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines.catalogue import JobType
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import Ledger
from tasks.presence import LEASE_S
from tasks.records import Answer, Queued, Standing
from tasks.store import StoreError, open_store
from tests.rig import BUSY_S

QUEUE = "asia-east.llm"


@pytest.fixture
def ledger(store_url):
    return Ledger(open_store(store_url, timeout_s=2), waiting=open_store(store_url, timeout_s=2, block_s=6))


def put(ledger, job, **changes):
    return ledger.put(job, **{"queue": QUEUE, "priority": 0, "params": "{}", "timeout_s": 60, **changes})


def begin(ledger, job, worker="w1", token="t"):
    return ledger.begin(job, worker_id=worker, token=token).answer


def outcome(job, worker="w1", state=JobState.COMPLETED, **fields):
    return Envelope(job.id, job.attempt, worker, "asia-east", state, 0.5, **fields)


def new_job(attempt=1):
    return Job(str(uuid.uuid4()), JobType.LLM, attempt)


def test_params_and_timeout_come_with_the_claim_and_nowhere_else(ledger):
    job = new_job()
    put(ledger, job, params='{"messages":["secret"]}', timeout_s=2.5)

    claim = ledger.begin(job, worker_id="w1", token="t")

    assert (claim.answer, claim.params, claim.timeout_s) == (Answer.RUN, {"messages": ["secret"]}, 2.5)
    assert "secret" not in repr(job)


def test_the_same_delivery_may_ask_again_and_another_may_not(ledger):
    job = new_job()
    put(ledger, job)
    ledger.presence.beat("w1", "{}", [])

    assert begin(ledger, job, token="one") is Answer.RUN
    assert begin(ledger, job, token="one") is Answer.RUN
    assert begin(ledger, job, token="two") is Answer.BUSY
    assert begin(ledger, job, worker="w2") is Answer.BUSY


def test_a_dead_workers_attempt_can_be_taken_over_and_its_result_is_refused(ledger):
    job = new_job()
    put(ledger, job)
    assert begin(ledger, job, worker="dead") is Answer.RUN

    assert begin(ledger, job, worker="alive") is Answer.RUN

    assert ledger.finish(outcome(job, "dead"), queue=QUEUE) is False
    assert ledger.finish(outcome(job, "alive"), queue=QUEUE) is True
    assert ledger.look(job.id).outcome.worker_id == "alive"


def test_a_job_delivered_too_often_is_poison(ledger):
    job = new_job()
    put(ledger, job)

    answers = [begin(ledger, job, worker=f"w{n}") for n in range(4)]

    assert answers == [Answer.RUN] * 3 + [Answer.POISON]
    assert ledger.look(job.id).state == "poison"


def test_a_message_of_an_older_attempt_is_stale_and_so_is_one_of_an_emptied_store(ledger):
    job = new_job()
    put(ledger, Job(job.id, job.type, 2))

    assert begin(ledger, job) is Answer.STALE
    assert begin(ledger, new_job()) is Answer.STALE


def test_a_cancel_that_is_faster_than_the_submit_wins(ledger):
    job = new_job()
    ledger.cancel(job.id)

    entered = put(ledger, job)

    assert (entered.state, entered.standing) == ("cancelled", None)
    assert begin(ledger, job) is Answer.CANCELLED
    assert ledger.store.zcard(f"wait:{QUEUE}") == 0


def test_positions_follow_priority_and_then_arrival(ledger):
    jobs = [new_job() for _ in range(4)]
    for job, priority in zip(jobs, (0, 5, 5, 9), strict=True):
        put(ledger, job, priority=priority)

    assert [ledger.position(job.id, QUEUE) for job in jobs] == [4, 2, 3, 1]


def test_a_job_given_back_returns_to_its_old_place_uncounted(ledger):
    first, second = new_job(), new_job()
    put(ledger, first)
    put(ledger, second)

    for n in range(5):
        assert begin(ledger, first, worker=f"w{n}") is Answer.RUN
        assert ledger.release(first, worker_id=f"w{n}") is True

    assert ledger.position(first.id, QUEUE) == 1
    assert begin(ledger, first) is Answer.RUN


def test_an_outcome_is_taken_once_and_a_repeated_hand_in_is_no_failure(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job)

    assert ledger.finish(outcome(job), queue=QUEUE) is True
    assert ledger.finish(outcome(job), queue=QUEUE) is True
    assert begin(ledger, job, worker="w2") is Answer.DONE
    assert put(ledger, job).state == "ended"


def test_an_outcome_for_a_store_that_was_emptied_is_kept_for_the_row_to_judge(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job)
    ledger.store.flushdb()

    assert ledger.finish(outcome(job), queue=QUEUE) is True
    assert ledger.look(job.id).outcome == outcome(job)


def test_an_outcome_that_no_worker_wrote_is_ignored(ledger):
    job = new_job()
    put(ledger, job)
    for garbage in ("{", "[]", '{"outcome": "splendid"}', "null"):
        ledger.store.hset(f"job:{job.id}", "outcome", garbage)

        assert ledger.look(job.id).outcome is None
        assert ledger.look_all([job.id])[job.id].outcome is None


def test_waiters_wake_with_the_outcome_however_many_there_are(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job)
    assert ledger.wait(job.id, 0.05) is None

    ledger.finish(outcome(job), queue=QUEUE)

    heard = [ledger.wait(job.id, 5) for _ in range(3)]
    assert heard == [ledger.look(job.id)] * 3
    assert heard[0].outcome == outcome(job)


@pytest.mark.parametrize(
    ("state", "error", "word"),
    [
        (JobState.COMPLETED, None, "SUCCESS"),
        (JobState.FAILED, JobError("out_of_memory", "no"), "FAILURE"),
        (JobState.CANCELLED, None, "REVOKED"),
    ],
)
def test_celerys_own_result_agrees_and_never_holds_the_answer(ledger, valkey, state, error, word):
    from celery import Celery
    from celery.result import AsyncResult

    job = new_job()
    put(ledger, job)
    begin(ledger, job)
    ledger.finish(outcome(job, state=state, error=error, result={"response": "secret"}), queue=QUEUE)

    app = Celery("reader", backend=f"{valkey.url}/1", set_as_current=False)
    app.config_from_object({})
    read = AsyncResult(job.id, app=app)

    assert read.state == word
    assert "secret" not in repr(read.result)
    if word == "SUCCESS":
        assert read.get(timeout=2) == {"job_id": job.id, "status": "completed"}


def test_the_beat_tells_of_cancels_of_takeovers_and_of_jobs_the_worker_never_heard_of(ledger):
    mine, cancelled, taken, ghost = (new_job() for _ in range(4))
    for job in (mine, cancelled, taken, ghost):
        put(ledger, job)
        begin(ledger, job)
    ledger.cancel(cancelled.id)
    begin(ledger, taken, worker="other")

    heard = ledger.presence.beat("w1", "{}", [mine.id, cancelled.id, taken.id])

    assert (heard.cancelled, heard.lost, heard.ghosts) == ([cancelled.id], [taken.id], [ghost.id])


def test_orphans_are_the_jobs_of_workers_without_a_lease(ledger):
    held, lost = new_job(), new_job()
    for job, worker in ((held, "alive"), (lost, "dead")):
        put(ledger, job)
        ledger.presence.beat(worker, "{}", [])
        begin(ledger, job, worker=worker)

    ledger.presence.retire("dead")

    assert ledger.orphans() == [("dead", lost.id)]
    assert ledger.presence.cards() == ["{}"]


def test_an_attempt_that_is_to_be_taken_from_the_dead_is_begun_by_nobody(ledger):
    job = new_job()
    put(ledger, job)
    ledger.presence.beat("dead", "{}", [])
    begin(ledger, job, worker="dead", token="one")
    ledger.presence.retire("dead")
    assert ledger.orphans() == [("dead", job.id)]

    # The broker hands the message out again, or a frozen worker wakes; the next attempt is still on its way.
    assert begin(ledger, job, worker="alive") is Answer.STALE
    assert begin(ledger, job, worker="dead", token="one") is Answer.STALE
    assert ledger.orphans() == [("dead", job.id)]
    ledger.bury("dead", job.id)
    assert begin(ledger, job, worker="alive") is Answer.STALE

    put(ledger, following := Job(job.id, job.type, 2))
    assert begin(ledger, following, worker="alive") is Answer.RUN


def test_what_the_dead_computed_counts_while_nobody_else_has_begun(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job, worker="frozen")
    ledger.presence.retire("frozen")
    ledger.orphans()

    assert ledger.finish(outcome(job, "frozen"), queue=QUEUE) is True


def test_a_job_that_another_worker_took_over_is_not_taken_from_it(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job, worker="dead")
    ledger.presence.retire("dead")
    assert begin(ledger, job, worker="alive", token="two") is Answer.RUN
    # As a record that a store lost with its last writes: the dead worker's set still names the job.
    ledger.store.sadd("running:dead", job.id)

    assert ledger.orphans() == [("dead", job.id)]

    assert begin(ledger, job, worker="alive", token="two") is Answer.RUN


def test_a_worker_that_dies_between_an_emptied_store_and_its_next_beat_leaves_orphans(ledger):
    job = new_job()
    put(ledger, job)
    begin(ledger, job, worker="w1")
    assert ledger.orphans() == []

    # As if its lease had passed without a beat.
    ledger.store.zadd("workers", {"w1": -LEASE_S}, xx=True, incr=True)

    assert ledger.orphans() == [("w1", job.id)]


def test_a_worker_that_begins_before_its_first_beat_comes_with_that(ledger):
    ledger.presence.order("host-1", [], drain=True)
    job = new_job()
    put(ledger, job)
    begin(ledger, job, worker="w1")

    assert ledger.presence.beat("w1", "{}", [job.id], name="host-1").drained

    assert ledger.store.hget("names", "host-1") == "w1"


def test_news_that_came_after_they_were_read_stay(ledger):
    first, second = new_job(), new_job()
    for job in (first, second):
        put(ledger, job)
        begin(ledger, job)
    ids, mark = ledger.news(10)
    assert ids == [first.id, second.id]

    ledger.finish(outcome(first), queue=QUEUE)
    ledger.settle(mark)

    assert ledger.news(10)[0] == [first.id]


def test_the_mean_of_the_seconds_follows_the_jobs(ledger):
    for _ in range(10):
        job = new_job()
        put(ledger, job)
        begin(ledger, job)
        ledger.finish(outcome(job), queue=QUEUE)

    speeds = {queue: traffic.mean_s for queue, traffic in ledger.traffic([QUEUE, "asia-east.vision"]).items()}
    assert speeds == {QUEUE: pytest.approx(0.5), "asia-east.vision": None}


def test_a_job_stands_behind_all_that_wait_for_the_same_workers(ledger):
    first, second, mine, urgent = (new_job() for _ in range(4))
    put(ledger, first)
    put(ledger, second, queue=f"{QUEUE}@m")
    begin(ledger, first)

    entered = put(ledger, mine, beside=[f"{QUEUE}@m"])
    assert entered.standing == Standing(before=0, before_beside=1, running=1, running_beside=0)
    put(ledger, urgent, queue=f"{QUEUE}@m", priority=1)

    assert ledger.standing(mine.id, QUEUE, [f"{QUEUE}@m"]) == Standing(0, 2, 1, 0)
    assert ledger.standing(second.id, f"{QUEUE}@m", [QUEUE]) == Standing(1, 0, 0, 1)
    assert ledger.standing(first.id, QUEUE) is None


@pytest.mark.parametrize("way", ["finish", "release", "lost", "poison"])
def test_what_no_longer_runs_is_not_counted_as_running(ledger, way):
    job = new_job()
    put(ledger, job)
    begin(ledger, job)
    assert ledger.queues()[QUEUE].running == 1
    assert 0 <= ledger.traffic([])[QUEUE].elapsed_s[0] < 5

    match way:
        case "finish":
            ledger.finish(outcome(job), queue=QUEUE)
        case "release":
            ledger.release(job, worker_id="w1")
        case "lost":
            ledger.bury("w1", job.id)
        case _:
            for n in range(3):
                begin(ledger, job, worker=f"other{n}")

    assert ledger.queues()[QUEUE].running == 0


@pytest.mark.parametrize("began", [False, True], ids=["waits", "runs"])
def test_a_job_that_left_the_region_leaves_nothing_that_could_run(ledger, began):
    job = new_job()
    put(ledger, job, params='{"messages":["secret"]}')
    ledger.presence.beat("w1", "{}", [])
    if began:
        begin(ledger, job)

    ledger.withdraw([(job.id, 2)])

    assert ledger.queues()[QUEUE] == Queued(0, None, 0)
    assert "secret" not in str(ledger.store.hgetall(f"job:{job.id}"))
    assert begin(ledger, job, worker="w2") is Answer.STALE
    assert begin(ledger, Job(job.id, job.type, 2), worker="w2") is Answer.STALE
    # Whoever waits looks at the row, and a worker hears that it is no longer his.
    assert ledger.wait(job.id, 1) is None
    assert ledger.presence.beat("w1", "{}", [job.id]).lost == [job.id]
    assert ledger.finish(outcome(job), queue=QUEUE) is False
    # It may come back.
    assert put(ledger, new_attempt := Job(job.id, job.type, 3)).state == "queued"
    assert begin(ledger, new_attempt) is Answer.RUN


def test_a_withdrawal_leaves_outcomes_and_the_present_attempt_alone(ledger):
    ended, present = new_job(), new_job(attempt=2)
    put(ledger, ended)
    begin(ledger, ended)
    ledger.finish(outcome(ended), queue=QUEUE)
    put(ledger, present)

    ledger.withdraw([(ended.id, 2), (present.id, 2), ("unknown", 2)])

    assert ledger.look(ended.id).outcome == outcome(ended)
    assert begin(ledger, present) is Answer.RUN


def test_a_job_that_moves_within_one_store_leaves_its_old_queue_and_keeps_its_turn(ledger):
    mover, other = new_job(), new_job()
    put(ledger, mover)
    put(ledger, other, queue="europe-west.llm")

    entered = put(ledger, Job(mover.id, mover.type, 2), queue="europe-west.llm")

    assert (entered.standing.before, ledger.queues()[QUEUE].depth) == (0, 0)
    assert begin(ledger, mover) is Answer.STALE


def test_everything_that_waits_or_runs_is_listed(ledger):
    jobs = [new_job() for _ in range(5)]
    for job in jobs:
        put(ledger, job)
    begin(ledger, jobs[0])

    assert {job_id for some in ledger.entered() for job_id in some} == {job.id for job in jobs}


def test_position_and_depth_cost_the_same_with_a_hundred_thousand_jobs(ledger):
    pipe = ledger.store.pipeline(transaction=False)
    pipe.zadd(f"wait:{QUEUE}", {str(n): n for n in range(100_000)})
    pipe.execute()
    job = new_job()

    put(ledger, job, priority=0)

    before = ledger.store.info("commandstats")
    assert ledger.position(job.id, QUEUE) is not None
    assert ledger.queues()[QUEUE].depth == 100_001
    after = ledger.store.info("commandstats")
    used = {name for name in after if after[name]["calls"] != before.get(name, {"calls": 0})["calls"]}
    assert used <= {"cmdstat_zrank", "cmdstat_zcard", "cmdstat_hgetall", "cmdstat_info"}


def test_a_frozen_store_is_given_up_in_time(store_url, valkey):
    ledger = Ledger(open_store(store_url, timeout_s=0.5))
    put(ledger, new_job())
    valkey.stop()

    began = time.monotonic()
    with pytest.raises(StoreError):
        put(ledger, new_job())

    assert time.monotonic() - began < 1.5 + BUSY_S


class LedgerMachine(RuleBasedStateMachine):
    """One job, two workers, any order of events; at the end of every step the fence has held."""

    url = ""

    @initialize()
    def enter(self):
        self.ledger = Ledger(open_store(self.url, timeout_s=2))
        self.id = str(uuid.uuid4())
        self.attempt = 1
        self.holder = None
        self.lost = False
        self.cancelled = False
        self.outcomes = []
        put(self.ledger, self.job())

    def job(self, attempt=None):
        return Job(self.id, JobType.LLM, attempt or self.attempt)

    @rule(worker=st.sampled_from(["a", "b"]), behind=st.integers(0, 1))
    def deliver(self, worker, behind):
        attempt = max(self.attempt - behind, 1)
        answer = begin(self.ledger, self.job(attempt), worker=worker, token=uuid.uuid4().hex)
        if answer is Answer.RUN:
            assert attempt == self.attempt
            assert not self.outcomes
            assert not self.cancelled
            assert not self.lost
            assert self.holder is None or not self.ledger.store.exists(f"lease:{self.holder}")
            self.holder = worker

    @rule(worker=st.sampled_from(["a", "b"]), behind=st.integers(0, 1))
    def hand_in(self, worker, behind):
        attempt = max(self.attempt - behind, 1)
        envelope = Envelope(self.id, attempt, worker, "asia-east", JobState.COMPLETED, 0.1)
        taken = self.ledger.finish(envelope, queue=QUEUE)
        mine = attempt == self.attempt and worker == self.holder
        if taken:
            assert mine
        if taken and envelope not in self.outcomes:
            self.outcomes.append(envelope)

    @rule(worker=st.sampled_from(["a", "b"]))
    def beat(self, worker):
        self.ledger.presence.beat(worker, "{}", [])

    @rule(worker=st.sampled_from(["a", "b"]))
    def die(self, worker):
        self.ledger.presence.retire(worker)

    @rule()
    def look(self):
        """The reconciler asks whose jobs it must take."""
        self.lost = self.lost or (self.holder, self.id) in self.ledger.orphans()

    @rule()
    def lose(self):
        """The reconciler sends the next attempt."""
        if put(self.ledger, self.job(self.attempt + 1)).state == "queued":
            self.attempt += 1
            self.holder = None
            self.lost = False

    @rule(worker=st.sampled_from(["a", "b"]))
    def give_back(self, worker):
        if self.ledger.release(self.job(), worker_id=worker):
            assert worker == self.holder
            self.holder = None

    @rule()
    def cancel(self):
        self.ledger.cancel(self.id)
        self.cancelled = True

    @invariant()
    def there_is_at_most_one_outcome(self):
        assert len(self.outcomes) <= 1

    @invariant()
    def the_index_and_the_record_agree(self):
        record = self.ledger.look(self.id)
        waits = self.ledger.position(self.id, QUEUE) is not None
        assert waits == (record is not None and record.state == "queued")

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.store.flushdb()


def test_no_order_of_events_gives_a_job_two_holders_or_two_outcomes(store_url):
    machine = type("Machine", (LedgerMachine,), {"url": store_url})

    machine.TestCase.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase("runTest").runTest()


def test_an_envelope_survives_its_way(ledger):
    job = new_job()
    sent = outcome(job, result={"response": "你好"}, error=JobError("code", "message"))

    assert Envelope.decode(sent.encode()) == sent
    assert json.loads(sent.encode())["outcome"] == "completed"
