"""Messages and results that somebody else put there: what is not JSON is neither read nor run, and work goes on."""

import pickle
from collections.abc import Callable
from pathlib import Path

import kombu
import pytest
from celery import Celery
from kombu.exceptions import ContentDisallowed, DecodeError

import celeryconfig
from tasks.job import JobState
from tests.conftest import Valkey
from tests.rig import Platform

QUEUE = "asia-east.llm"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def put(broker: str, body: bytes, content_type: str) -> None:
    """Put a task message of that content on the queue, as anybody can who knows the broker's password."""
    with kombu.Connection(broker, transport_options=celeryconfig.transport_options_for(broker)) as connection:
        queue = celeryconfig.queue_named(QUEUE, broker)
        encoding = "binary" if "pickle" in content_type else "utf-8"
        headers = {"lang": "py", "task": "tasks.llm", "id": "evil", "argsrepr": "", "kwargsrepr": ""}
        connection.Producer().publish(
            body,
            exchange=queue.exchange,
            routing_key=queue.routing_key,
            declare=[queue],
            headers=headers,
            content_type=content_type,
            content_encoding=encoding,
        )


def test_a_pickled_message_is_not_run_and_the_worker_goes_on(make_platform: Callable[..., Platform], tmp_path: Path):
    platform = make_platform()
    broker = platform.environ["GPU_BROKER_URL"]
    trap = tmp_path / "ran"
    worker = platform.start_worker()
    put(broker, pickle.dumps(Trap(trap)), "application/x-python-serialize")
    put(
        broker,
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{trap}]]".encode(),
        "application/x-yaml",
    )
    put(broker, b"{not json", "application/json")

    ended = platform.ended(platform.submit("hello"), 20)

    refused = ("content of type pickle", "content of type yaml", "Can't decode message body")
    platform.until(lambda: all(words in worker.log.read_text() for words in refused))
    assert ended.status is JobState.COMPLETED
    assert not trap.exists()
    assert worker.process.poll() is None


def test_a_pickled_result_is_not_read(valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    app = Celery(set_as_current=False)
    app.config_from_object(celeryconfig)
    app.conf.update(result_backend=f"{valkey.url}/1", redis_backend_use_ssl=None)
    trap = tmp_path / "ran"
    valkey.client().set("celery-task-meta-evil", pickle.dumps(Trap(trap)))

    with pytest.raises((DecodeError, ContentDisallowed, ValueError)):
        _ = app.AsyncResult("evil").state

    assert app.backend.accept == {"application/json"}
    assert not trap.exists()
