"""The one task, under one name per job type: hand the attempt that a message names to this worker's station."""

from typing import Any

from celery import Task

from engines.catalogue import JobType
from tasks import boot, celery
from tasks.job import Job, JobFailed, JobState


def infer(task: Any, job_id: str, attempt: int) -> str:
    """Run one attempt of a job. Returns a word for Flower; the outcome itself is in the ledger.

    Raises JobFailed after the failure has been recorded.
    """
    job_type = JobType(task.name.removeprefix("tasks."))
    # What the publisher added to the message's headers, where traces are on.
    traceparent = getattr(task.request, "traceparent", None) or ""
    word = boot.station().execute(Job(job_id, job_type, attempt), traceparent)
    if word in (JobState.FAILED, JobState.TIMEOUT):
        raise JobFailed(word)
    return word


for _job_type in JobType:
    celery.task(
        bind=True, name=f"tasks.{_job_type}", throws=(JobFailed,), base=Task, Request="tasks.consuming:Request"
    )(infer)
