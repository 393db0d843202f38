"""Broker, store, API and reconciler that go away: what was accepted is kept, what is refused leaves nothing behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.dispatch import Unavailable
from engines.catalogue import JobType
from tasks.job import JobState
from tests.rig import BUSY_S, READY_S

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_job_submitted_while_the_broker_is_frozen_is_held_and_runs_when_it_is_back(platform, valkey):
    platform.start_worker()
    platform.ended(platform.submit("warm"))
    valkey.stop()

    began = time.monotonic()
    row = platform.submit("held")
    took = time.monotonic() - began
    assert took < 2 + BUSY_S
    assert platform.status(row) is JobState.QUEUED
    assert platform.dispatch.placement.place(row).reason.startswith("Region asia-east cannot be reached")

    valkey.cont()
    row = platform.ended(row, 20)
    assert row.status is JobState.COMPLETED


def test_a_job_submitted_while_the_broker_is_gone_is_held_and_runs_when_it_is_back(platform, valkey):
    platform.start_worker()
    platform.ended(platform.submit("warm"))
    valkey.kill()

    began = time.monotonic()
    row = platform.submit("held")
    assert time.monotonic() - began < 2 + BUSY_S

    valkey.start()
    row = platform.ended(row, 30)
    assert row.status is JobState.COMPLETED


@pytest.mark.parametrize("fault", ["stop", "kill"])
def test_a_job_that_must_be_sent_is_refused_at_once_and_leaves_nothing_behind(platform, valkey, fault):
    getattr(valkey, fault)()

    began = time.monotonic()
    with pytest.raises(Unavailable) as refused:
        platform.submit("now or never", must_send=True)
    assert time.monotonic() - began < 2 + BUSY_S
    assert refused.value.retry_after_s > 0
    assert platform.dispatch.rows.page("tester") == []

    valkey.cont()
    valkey.start()
    worker = platform.start_worker()
    after = platform.ended(platform.submit("after"), 20)
    assert after.status is JobState.COMPLETED
    assert worker.log.read_text().count("completed after") == 1
    platform.until(lambda: platform.dispatch.statistics(None).total_queued == 0)
    platform.until(lambda: _count_rows(platform) == 1)


def test_a_store_that_comes_back_empty_loses_no_queued_and_no_running_job(platform, valkey):
    platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    running = platform.submit("sleep 3")
    platform.until(lambda: platform.status(running) is JobState.RUNNING)
    queued = [platform.submit(f"number {n}") for n in range(20)]

    valkey.flush()

    for row in [running, *queued]:
        assert platform.ended(row, 40).status is JobState.COMPLETED
    assert [platform.row(row).attempt for row in queued] == [1] * 20


def test_a_worker_outlives_a_server_that_goes_away_while_it_runs_a_job(platform, valkey):
    worker = platform.start_worker()
    row = platform.submit("sleep 4")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)

    valkey.kill()
    platform.until(lambda: "beat missed" in worker.log.read_text())
    valkey.start()
    row = platform.ended(row, 40)
    after = platform.ended(platform.submit("after"), 20)

    assert row.status is JobState.COMPLETED
    assert (after.status, after.worker_id) == (JobState.COMPLETED, worker.id)
    assert worker.process.poll() is None


def test_a_broker_that_comes_back_empty_loses_no_queued_job(platform, valkey):
    rows = [platform.submit(f"number {n}") for n in range(10)]
    platform.until(lambda: valkey.client(0).dbsize() > 0)

    # The store keeps what it has, so nothing but the missing messages can be the evidence.
    valkey.client(0).flushdb()
    platform.start_worker()

    for row in rows:
        assert platform.ended(row, 60).status is JobState.COMPLETED


def test_a_job_whose_api_process_dies_between_commit_and_publish_runs(platform):
    platform.start_worker()
    program = """
import os, signal, tempfile
from app.blobs import Blobs
from app.dispatch import Dispatch
from app.request import Request
from app.links import open_links
from app.rows import Rows
from app.tables import open_database
from app.tickets import Tickets
from engines.catalogue import JobType
from tasks import settings

class Dies(Dispatch):
    def send(self, row, params):
        print(row.id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

engine = open_database(os.environ["DATABASE_URL"])
rows = Rows(engine)
params = {"messages": [{"role": "user", "content": "orphan"}], "max_tokens": 5}
request = Request(JobType.LLM, None, None, params, 0, None, True, 60, None)
links = open_links(settings.load_regions(os.environ))
Dies(rows, links, "asia-east", Blobs(tempfile.gettempdir()), Tickets(engine)).submit("tester", request)
"""
    died = subprocess.run(
        [sys.executable, "-c", program], env=platform.environ, cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    assert died.returncode == -signal.SIGKILL
    job_id = died.stdout.decode().strip()

    row = platform.ended(platform.dispatch.rows.get(job_id))

    assert row.status is JobState.COMPLETED


def test_nothing_needs_the_reconciler_while_nothing_breaks(platform):
    platform.stop_control()
    platform.start_worker()

    row = platform.ended(platform.submit("alone"))

    assert row.status is JobState.COMPLETED


def test_two_reconcilers_change_nothing_twice(platform):
    program = [sys.executable, "-m", "app.control"]
    logs = [platform.folder / f"control{number}.log" for number in range(2)]
    others = []
    for log in logs:
        with log.open("wb") as out:
            others.append(subprocess.Popen(program, env=platform.environ, cwd=ROOT, stderr=out))
    try:
        platform.until(lambda: all("control is up" in log.read_text() for log in logs), READY_S)
        platform.start_worker()
        rows = [platform.submit(f"number {n}") for n in range(50)]
        ended = [platform.ended(row, 20) for row in rows]
    finally:
        for other in others:
            other.send_signal(signal.SIGTERM)
        codes = [other.wait(10) for other in others]

    assert {row.status for row in ended} == {JobState.COMPLETED}
    # Created, begun, ended: three writes at the most besides the mark of the send, which does not count as one.
    assert all(row.version <= 3 for row in ended)
    assert codes == [0, 0]


def test_a_job_nobody_takes_times_out_of_its_queue(platform):
    row = platform.ended(platform.submit("too late", queue_timeout_seconds=0.5))

    assert (row.status, row.error_code) == (JobState.TIMEOUT, "queue_timeout")
    platform.start_worker()
    platform.ended(platform.submit("after"))
    assert platform.row(row).status is JobState.TIMEOUT


def test_a_job_that_runs_too_long_times_out(platform):
    platform.start_worker()

    row = platform.ended(platform.submit("sleep 30", timeout_seconds=1))

    assert (row.status, row.error_code) == (JobState.TIMEOUT, "run_timeout")
    assert row.completed_at - row.started_at < 3 + BUSY_S


def test_a_cancelled_job_stops_at_once_and_one_that_waits_is_never_run(platform):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    running = platform.submit("sleep 30")
    platform.until(lambda: platform.status(running) is JobState.RUNNING)
    waiting = platform.submit("never")

    assert platform.dispatch.cancel(waiting).status is JobState.CANCELLED
    assert platform.dispatch.cancel(running).status is JobState.CANCELLED
    began = time.monotonic()
    after = platform.ended(platform.submit("after"))

    assert after.status is JobState.COMPLETED
    assert time.monotonic() - began < 2 + BUSY_S
    assert f"{waiting.id} attempt 1: completed" not in worker.log.read_text()
    assert platform.dispatch.statistics(None).by_type[JobType.LLM] == 0


def test_a_cancel_while_the_store_is_away_frees_the_worker_when_it_is_back(platform, valkey):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    running = platform.submit("sleep 30")
    platform.until(lambda: platform.status(running) is JobState.RUNNING)
    valkey.stop()

    assert platform.dispatch.cancel(running).status is JobState.CANCELLED
    valkey.cont()

    platform.until(lambda: f"{running.id} attempt 1: cancelled" in worker.log.read_text(), 15)


def test_urgent_jobs_overtake_and_equal_ones_keep_their_order(platform):
    hold = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1", queues="asia-east.llm")
    first = platform.submit("sleep 60")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)
    link = platform.dispatch.links["asia-east"]

    rows = [platform.submit(f"low {n}") for n in range(100)]
    urgent = platform.submit("urgent", priority=9)
    assert platform.dispatch.placement.place(urgent).position == 1
    assert platform.dispatch.placement.place(rows[0]).position == 2
    assert link.mailbox.ledger.queues()["asia-east.llm"].depth == 101
    platform.dispatch.cancel(first)
    for row in [*rows, urgent]:
        platform.ended(row, 30)

    # An outcome is handed in just before its line is written.
    platform.until(lambda: hold.log.read_text().count(" attempt 1: completed") == 101)
    text = hold.log.read_text()
    order = sorted([*rows, urgent], key=lambda row: text.index(f"{row.id} attempt 1: completed"))
    assert order[0].id == urgent.id
    assert [row.id for row in order[1:]] == [row.id for row in rows]


def test_a_worker_of_several_queues_takes_the_most_urgent_of_all_of_them_first(platform):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    first = platform.submit("sleep 2")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)

    # Those that may not leave the region have a queue of their own, which the worker serves too.
    sent = [
        (platform.submit(f"number {n}", priority=n % 10, allow_cross_region=n % 3 == 0), n % 10, n % 3 == 0)
        for n in range(60)
    ]
    ended = [platform.ended(row, 30) for row, _, _ in sent]

    text = worker.log.read_text()
    ran = sorted(sent, key=lambda job: text.index(f"{job[0].id} attempt 1: completed"))
    assert {row.status for row in ended} == {JobState.COMPLETED}
    assert [priority for _, priority, _ in ran] == sorted((priority for _, priority, _ in sent), reverse=True)
    for queue in (True, False):
        for priority in range(10):
            in_order = [row.id for row, at, where in sent if (at, where) == (priority, queue)]
            assert [row.id for row, at, where in ran if (at, where) == (priority, queue)] == in_order


def test_the_row_of_a_job_that_ended_is_never_changed_again(platform):
    platform.start_worker()
    row = platform.ended(platform.submit("done"))
    rows = platform.dispatch.rows

    assert rows.cancel(row.id) is None
    assert rows.next_attempt(row.id, attempt=1) is None
    assert rows.begun(row.id, attempt=1, worker_id="x", started_at=None) is None
    assert rows.send_again(row.id) is None
    assert rows.get(row.id) == row


def _count_rows(platform) -> int:
    from sqlalchemy import func, select

    from app.tables import jobs, open_database

    engine = open_database(platform.environ["DATABASE_URL"])
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(jobs)).scalar_one()
