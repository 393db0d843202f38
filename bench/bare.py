"""The other side of bench.overhead: a bare Celery application, with a task that does nothing.

It has what the platform's own Celery has: the threads pool, late acknowledgement, events for Flower.
"""

import os

from celery import Celery

app = Celery("bare")
# An object of its own: left out, Celery would find the platform's celeryconfig.py.
app.config_from_object(
    {
        "broker_url": os.environ.get("BARE_BROKER_URL"),
        "result_backend": os.environ.get("BARE_BACKEND_URL"),
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        "worker_pool": "threads",
        "worker_concurrency": 64,
        "worker_send_task_events": True,
        "result_backend_thread_safe": True,
        "broker_connection_retry_on_startup": True,
        "task_default_queue": "bare",
    }
)


@app.task(name="bare.nothing")
def nothing(params: object) -> object:
    """Give back what came."""
    return params
