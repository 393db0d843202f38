"""A worker that is told to stop ends within its grace period and a few seconds, whatever is broken."""

import signal

from tasks.job import JobState
from tasks.station import END_S


def test_a_drained_worker_ends_although_its_store_is_gone_and_its_job_runs_elsewhere(platform, valkey):
    worker = platform.start_worker(GPU_DRAIN_GRACE_SECONDS="1")
    row = platform.submit("sleep 1")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)
    valkey.kill()

    worker.signal(signal.SIGTERM)

    assert worker.process.wait(1 + END_S + 5) == 0
    valkey.start()
    other = platform.start_worker()
    row = platform.ended(row, 30)
    assert (row.status, row.worker_id) == (JobState.COMPLETED, other.id)


def test_a_drained_worker_ends_although_its_store_is_frozen_and_its_engine_deaf(platform, valkey):
    worker = platform.start_worker(GPU_DRAIN_GRACE_SECONDS="0.5")
    row = platform.submit("hang 60")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)
    valkey.stop()

    worker.signal(signal.SIGTERM)

    assert worker.process.wait(0.5 + END_S + 5) == 0
