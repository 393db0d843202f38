"""The SDK against a server on a port."""

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
import requests
from flask import Flask
from werkzeug.serving import make_server

from app.client import ApiError, GPUInferenceClient, JobNotCompleted
from tasks.job import JobError, JobState

MESSAGES = [{"role": "user", "content": "请用Python写一个快速排序算法"}]


@pytest.fixture
def url(app: Flask) -> Iterator[str]:
    """The API on a port of its own."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def sdk(url: str) -> GPUInferenceClient:
    return GPUInferenceClient(url)


def test_chat_gives_the_completed_job(sdk, worker):
    thread = worker.answer_next()
    job = sdk.chat(MESSAGES, max_tokens=16, temperature=0, seed=1, stop=["\n"], priority=5, timeout=10)
    thread.join()

    assert (job["status"], job["priority"]) == ("completed", 5)
    assert job["result"]["usage"]["total_tokens"] == 25


def test_a_job_is_sent_followed_and_listed(sdk, worker):
    job_id = sdk.submit("llm", {"messages": MESSAGES}, priority=3)["job_id"]
    assert sdk.get(job_id)["status"] == "queued"
    thread = worker.answer_next()

    job = sdk.wait(job_id, timeout=10)
    thread.join()

    assert job["result"]["finish_reason"] == "stop"
    assert [listed["job_id"] for listed in sdk.jobs(status="completed")] == [job_id]
    assert sdk.stats()["total_queued"] == 0


def test_workers_are_shown_drained_and_resumed(sdk, worker):
    worker.show()

    assert sdk.workers(region="asia-east")["by_state"] == {"ready": 1}
    assert sdk.drain(worker.id)["drained"] is True
    assert sdk.workers(type="llm")["items"][0]["drained"] is True
    assert sdk.resume(worker.id)["drained"] is False
    with pytest.raises(ApiError) as unknown:
        sdk.drain("a b/c")
    assert (unknown.value.status, unknown.value.code) == (404, "not_found")


def test_jobs_runs_over_every_page(sdk):
    made = [sdk.submit("llm", {"messages": MESSAGES})["job_id"] for _ in range(5)]

    assert [job["job_id"] for job in sdk.jobs(limit=2)] == made[::-1]
    assert [job["job_id"] for job in itertools.islice(sdk.jobs(limit=2), 3)] == made[:1:-1]


def test_a_cancelled_job_raises_with_the_job(sdk):
    job_id = sdk.submit("llm", {"messages": MESSAGES})["job_id"]
    assert sdk.cancel(job_id) == {"message": "Job cancelled", "job_id": job_id}

    with pytest.raises(JobNotCompleted) as caught:
        sdk.wait(job_id)
    assert caught.value.job["status"] == "cancelled"


def test_a_failed_chat_raises_with_job_code_and_detail(sdk, worker):
    thread = worker.answer_next(JobState.FAILED, JobError("out_of_memory", "It needs 40 GiB."))
    with pytest.raises(JobNotCompleted) as caught:
        sdk.chat(MESSAGES, timeout=10)
    thread.join()

    error = caught.value
    assert (error.status, error.code, error.detail) == (500, "out_of_memory", "It needs 40 GiB.")
    assert error.job["status"] == "failed"
    assert "out_of_memory" in str(error) or "40 GiB" in str(error)


def test_a_refusal_raises_with_its_fields_and_is_still_a_requests_error(sdk):
    with pytest.raises(requests.HTTPError) as caught:
        sdk.chat([], temperature=5)

    error = caught.value
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (422, "validation_failed")
    assert set(error.errors) == {"params.messages", "params.temperature"}


def test_wait_gives_up_in_time_and_the_job_goes_on(sdk):
    job_id = sdk.submit("llm", {"messages": MESSAGES})["job_id"]

    with pytest.raises(TimeoutError):
        sdk.wait(job_id, timeout=0.3)
    assert sdk.get(job_id)["status"] == "queued"


def test_without_a_worker_one_who_will_not_wait_hears_it_at_once(sdk):
    with pytest.raises(ApiError) as caught:
        sdk.chat(MESSAGES, wait_for_worker=False)

    assert caught.value.code == "no_worker"


def test_a_key_is_sent(url, app, make_key):
    key = make_key("infer")["X-API-Key"]

    assert list(GPUInferenceClient(url, api_key=key).jobs()) == []
    with pytest.raises(ApiError) as caught:
        list(GPUInferenceClient(url).jobs())
    assert caught.value.code == "key_required"


def test_a_job_whose_answer_was_lost_is_sent_again_and_made_once(url, worker):
    proxy = DroppingProxy(int(url.rpartition(":")[2]), drops=2)

    job = GPUInferenceClient(f"http://127.0.0.1:{proxy.port}").submit("llm", {"messages": MESSAGES})

    assert proxy.dropped == 2
    assert worker.waiting() == [job["job_id"]]
    proxy.close()


def test_a_store_that_comes_back_gets_the_chat(sdk, valkey, worker):
    valkey.kill()
    back = threading.Timer(1.0, valkey.start)
    back.start()
    thread = threading.Thread(target=lambda: (back.join(), worker.answer_next().join()))
    thread.start()

    job = sdk.chat(MESSAGES, timeout=10)
    thread.join()

    assert job["status"] == "completed"


class DroppingProxy:
    """Forwards connections to a port; of the first ones it passes the request on, and drops the answer."""

    def __init__(self, target: int, drops: int) -> None:

        self._target = target
        self._drops = drops
        self.dropped = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with near, socket.create_connection(("127.0.0.1", self._target)) as far:
                far.sendall(_whole(near))
                answer = _whole(far)
                if self.dropped < self._drops:
                    self.dropped += 1
                else:
                    near.sendall(answer)


def _whole(connection: socket.socket) -> bytes:
    """One HTTP request or answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65_536)
    return head + b"\r\n\r\n" + body


def test_a_dry_run_sends_nothing(sdk, worker):
    worker.show()

    told = sdk.dry_run("llm", {"messages": MESSAGES}, region="asia-east", priority=3)

    assert (told["region"], told["model"], told["queue_position"]) == ("asia-east", "echo", 1)
    assert list(sdk.jobs()) == []
