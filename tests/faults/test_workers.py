"""Workers that die, freeze, hang and are told to go: no job is lost, none ends twice."""

import signal

from tasks.job import Job, JobState
from tasks.records import Answer


def test_a_job_goes_the_whole_way(platform):
    worker = platform.start_worker()

    row = platform.ended(platform.submit("hello there"))

    assert row.status is JobState.COMPLETED
    assert '"response":"hello there"' in row.result
    assert row.worker_id == worker.id
    assert row.region == "asia-east"
    assert row.created_at <= row.started_at <= row.completed_at


def test_a_killed_workers_job_completes_on_another_within_15_seconds(platform):
    for _ in range(2):
        platform.start_worker(wait=False)
    platform.until(lambda: all(worker.id for worker in platform.workers), 60)
    workers = {worker.id: worker for worker in platform.workers}
    row = platform.submit("sleep 2")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)
    killed = platform.row(row).worker_id

    workers[killed].signal(signal.SIGKILL)
    row = platform.ended(row, 15)

    assert row.status is JobState.COMPLETED
    assert row.worker_id in workers.keys() - {killed}
    assert row.attempt == 2


def test_a_job_that_kills_its_workers_fails_after_three_of_them(platform):
    for _ in range(3):
        platform.start_worker(wait=False)
    platform.until(lambda: all(worker.id for worker in platform.workers), 60)

    row = platform.ended(platform.submit("die"), 60)

    assert row.status is JobState.FAILED
    assert row.error_code == "worker_lost"
    assert [worker.process.wait(5) for worker in platform.workers] == [9, 9, 9]


def test_a_frozen_worker_that_comes_back_changes_nothing(platform):
    zombie = platform.start_worker()
    row = platform.submit("sleep 1")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)
    zombie.signal(signal.SIGSTOP)
    other = platform.start_worker()
    row = platform.ended(row, 20)
    assert row.worker_id == other.id

    zombie.signal(signal.SIGCONT)
    platform.until(lambda: "discarded" in zombie.log.read_text() or "given back" in zombie.log.read_text())

    assert platform.row(row) == row
    # It is a worker like any other again.
    platform.until(lambda: len(platform.dispatch.links["asia-east"].cards()) == 2)


def test_a_worker_told_to_stop_lets_its_job_end(platform):
    worker = platform.start_worker()
    row = platform.submit("sleep 2")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)

    worker.signal(signal.SIGTERM)
    row = platform.ended(row)

    assert (row.status, row.attempt, row.worker_id) == (JobState.COMPLETED, 1, worker.id)
    assert worker.process.wait(10) == 0


def test_a_worker_that_must_stop_gives_its_job_back_uncounted(platform):
    worker = platform.start_worker(GPU_DRAIN_GRACE_SECONDS="0.5")
    row = platform.submit("sleep 3")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)

    worker.signal(signal.SIGTERM)
    assert worker.process.wait(10) == 0
    other = platform.start_worker()
    row = platform.ended(row, 15)

    assert (row.status, row.attempt) == (JobState.COMPLETED, 1)
    # Shown as running all the while, so the row names the worker that ended it.
    assert row.worker_id == other.id


def test_a_step_that_hangs_past_its_deadline_costs_the_process_and_nobody_else(platform):
    worker = platform.start_worker()
    hung = platform.submit("hang 60", timeout_seconds=1)
    beside = platform.submit("sleep 25")
    platform.until(lambda: platform.status(beside) is JobState.RUNNING)
    other = platform.start_worker()

    hung = platform.ended(hung, 20)
    assert worker.process.wait(10) == 70
    platform.until(lambda: platform.row(beside).worker_id is not None)
    platform.dispatch.cancel(platform.row(beside))

    assert (hung.status, hung.error_code) == (JobState.TIMEOUT, "run_timeout")
    assert platform.row(beside).attempt == 1
    assert other.process.poll() is None


def test_a_broken_engine_sends_its_jobs_elsewhere_and_the_worker_away(platform):
    platform.start_worker()
    row = platform.submit("broken")
    platform.until(lambda: platform.workers[0].process.poll() == 70, 15)

    platform.start_worker()
    platform.until(lambda: platform.row(row).attempt == 2, 15)

    assert platform.status(row) in (JobState.RUNNING, JobState.QUEUED, JobState.FAILED)


def test_failed_and_out_of_memory_jobs_leave_the_worker_alive(platform):
    worker = platform.start_worker()

    failed = platform.ended(platform.submit("fail"))
    oom = platform.ended(platform.submit("oom"))
    after = platform.ended(platform.submit("still here"))

    assert (failed.status, failed.error_code) == (JobState.FAILED, "engine_error")
    assert (oom.status, oom.error_code) == (JobState.FAILED, "out_of_memory")
    assert (after.status, after.worker_id) == (JobState.COMPLETED, worker.id)


def test_two_workers_given_the_same_message_run_it_once(platform):
    platform.start_worker()
    platform.start_worker()
    link = platform.dispatch.links["asia-east"]

    row = platform.submit("sleep 1")
    for _ in range(5):
        link.broker.publisher.publish(Job(row.id, row.type, 1), queue="asia-east.llm", priority=0)
    row = platform.ended(row, 15)

    assert (row.status, row.attempt) == (JobState.COMPLETED, 1)
    platform.until(lambda: link.broker.publisher.depths(["asia-east.llm"])["asia-east.llm"] == 0)
    platform.until(lambda: sum(_answers(worker) for worker in platform.workers) >= 5)
    assert sum(worker.log.read_text().count(f"{row.id} attempt 1: completed") for worker in platform.workers) == 1


def test_a_late_result_of_a_worker_given_up_for_dead_is_dropped(platform):
    ledger = platform.dispatch.links["asia-east"].mailbox.ledger
    row = platform.submit("whoever")
    platform.until(lambda: ledger.position(row.id, "asia-east.llm"))
    claim = ledger.begin(Job(row.id, row.type, 1), worker_id="ghost", token="t")
    assert claim.answer is Answer.RUN
    # A worker that never beats is dead from the start.
    ledger.store.zadd("workers", {"ghost": 0})
    platform.start_worker()
    row = platform.ended(row, 15)

    from tasks.job import Envelope

    late = Envelope(row.id, 1, "ghost", "asia-east", JobState.FAILED, 1.0)

    assert ledger.finish(late, queue="asia-east.llm") is False
    assert platform.dispatch.rows.end_with(late, started_at=None) is None
    assert platform.row(row).status is JobState.COMPLETED


def _answers(worker) -> int:
    return worker.log.read_text().count("is not run")
