"""The Python SDK: this one file, and requests.

    client = GPUInferenceClient("http://localhost:8000", api_key="gpi_...")
    print(client.chat([{"role": "user", "content": "你好"}])["result"]["response"])

Every job is sent with an idempotency key of its own, so that sending it again after a broken connection or a 503 makes
no second job.

    requests.ConnectionError    the server cannot be reached, after the retries
    ApiError                    it refused: status, code, detail, errors by field
    └── JobNotCompleted         the job ended otherwise, or goes on; .job is the job
"""

import base64
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests

#: States that never change again.
ENDED = ("completed", "failed", "cancelled", "timeout")

#: How often a request is sent at most, and how long all its pauses may take together.
TRIES = 6
MOST_PAUSE_S = 30.0
#: A connection must stand after this long; an answer may take this much longer than the job may.
CONNECT_S = 5.0
ANSWER_S = 15.0

#: The request was not answered, or not to the end.
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

_POLL_FIRST_S = 0.1
_POLL_MOST_S = 2.0
_JOB_OPTIONS = ("model", "priority", "region", "allow_cross_region", "timeout_seconds", "queue_timeout_seconds")

#: Ends of a direct job that say nothing of the job itself.
_WORKER_GONE = ("worker_lost", "worker_stopped")

Job = dict[str, Any]


class ApiError(requests.HTTPError):
    """The server refused. Still a requests.HTTPError, as the first version of this client raised."""

    def __init__(self, response: requests.Response) -> None:
        self.status = response.status_code
        try:
            body = response.json()
        except ValueError:
            body = {}
        self.body: dict[str, Any] = body if isinstance(body, dict) else {}
        self.code: str | None = self.body.get("code")
        self.detail: str = self.body.get("detail") or response.reason
        #: Messages by the dotted path of each field, with 422.
        self.errors: Mapping[str, Sequence[str]] = self.body.get("errors") or {}
        #: The job that this is about, if there is one.
        self.job: Job | None = self.body if "job_id" in self.body and "status" in self.body else None
        super().__init__(f"{self.status} {self.code or ''}: {self.detail}", response=response)


class JobNotCompleted(ApiError):
    """The job has no result: it failed, was cancelled, timed out, or was not done in time and goes on."""

    job: Job

    def __init__(self, response: requests.Response, job: Job) -> None:
        super().__init__(response)
        self.job = job
        error = job.get("error") or {}
        self.code = error.get("code") or job["status"]
        self.detail = self.body.get("detail") or error.get("message") or f"The job is {job['status']}."
        self.args = (f"job {job['job_id']} is {job['status']}: {self.detail}",)


class GPUInferenceClient:
    """One platform, as one client uses it."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.session = requests.Session()
        if api_key:
            self.session.headers["X-API-Key"] = api_key
        #: To direct workers; the key is for the API alone.
        self._workers = requests.Session()

    def chat(self, messages: Sequence[Mapping[str, str]], **kwargs: Any) -> Job:
        """The completed job of one chat; its text is job["result"]["response"].

        kwargs: max_tokens, temperature, top_p, seed, stop; timeout (seconds, 60), wait_for_worker; job options.
        """
        return self.run("llm", {"messages": list(messages)}, **kwargs)

    def generate_image(self, prompt: str, **kwargs: Any) -> bytes:
        """A picture as PNG.

        kwargs: negative_prompt, width, height, steps, seed, guidance_scale; timeout (seconds, 120); as for chat.
        """
        job = self.run("image_gen", {"prompt": prompt}, **{"timeout": 120, **kwargs})
        return base64.b64decode(job["result"]["image_base64"])

    def analyze_image(self, image_path: str, question: str | None = None, task: str = "image_qa", **kwargs: Any) -> str:
        """What a picture shows: the answer to a question (image_qa), a description (image_caption), its text (ocr).

        kwargs: max_tokens; as for chat.
        """
        params = {"image_base64": _base64(image_path), "task": task, **({"question": question} if question else {})}
        response: str = self.run("vision", params, **kwargs)["result"]["response"]
        return response

    def transcribe(self, audio_path: str, **kwargs: Any) -> str:
        """What is said in a sound file.

        kwargs: language (a code such as zh; detected without), task ("translate": into English); timeout (120); as for
        chat.
        """
        job = self.run("whisper", {"audio_base64": _base64(audio_path)}, **{"timeout": 120, **kwargs})
        text: str = job["result"]["text"]
        return text

    def embed(self, texts: str | Sequence[str], **kwargs: Any) -> list[list[float]]:
        """A vector of length 1 for each text.

        kwargs: input_type ("query" or "passage"), truncate; as for chat.
        """
        job = self.run("embedding", {"input": texts if isinstance(texts, str) else list(texts)}, **kwargs)
        vectors: list[list[float]] = job["result"]["embeddings"]
        return vectors

    def run_workflow(
        self, workflow: Mapping[str, Any], images: Mapping[str, str | bytes] | None = None, **kwargs: Any
    ) -> list[bytes]:
        """The pictures that a ComfyUI workflow gives, node by node.

        workflow: as "Export (API)" writes it. images: pictures, or paths of them, by the names that its nodes have for
        them. kwargs: timeout (300); as for chat. What else a workflow gives (files, texts) is in the result of
        run("comfyui", ...).
        """
        files = {name: _base64(picture) for name, picture in (images or {}).items()}
        job = self.run("comfyui", {"workflow": dict(workflow), "images": files}, **{"timeout": 300, **kwargs})
        return [base64.b64decode(image["image_base64"]) for image in job["result"]["images"]]

    def infer(self, model_name: str, inputs: Sequence[Mapping[str, Any]], **kwargs: Any) -> dict[str, dict[str, Any]]:
        """What a model of a Triton server gives: tensors by name, each with shape, datatype and flat data.

        inputs: tensors with name, shape, datatype and data, as the v2 protocol has them. kwargs: model_version,
        outputs ([{"name": ...}]); as for chat.
        """
        job = self.run("triton", {"model_name": model_name, "inputs": list(inputs)}, **kwargs)
        return {tensor["name"]: tensor for tensor in job["result"]["outputs"]}

    def run(self, job_type: str, params: Mapping[str, Any], **kwargs: Any) -> Job:
        """The completed job, waited for. Raises JobNotCompleted.

        kwargs: timeout (seconds, 60), wait_for_worker; job options as for submit; whatever else is left joins params.
        """
        given = dict(kwargs)
        timeout = given.pop("timeout", 60)
        query = {"timeout": timeout, "wait_for_worker": "true" if given.pop("wait_for_worker", True) else "false"}
        options = {name: given.pop(name) for name in _JOB_OPTIONS if name in given}
        body = {"type": job_type, "params": {**params, **given}, **options}
        path = "/api/v1/jobs/sync"
        return _job(self._send("POST", path, json=body, params=query, headers=_key(), answer_s=timeout + ANSWER_S))

    def direct(self, job_type: str, params: Mapping[str, Any], **kwargs: Any) -> Job:
        """The completed job, brought to the nearest worker itself; as run() does it where no worker takes it so.

        kwargs: as for run; what a job may wait is also how long it may run. Raises JobNotCompleted.
        """
        given = dict(kwargs)
        timeout = given.pop("timeout", 60)
        given.pop("wait_for_worker", None)
        options = {name: given.pop(name) for name in _JOB_OPTIONS if name in given}
        options["timeout_seconds"] = min(options.get("timeout_seconds", timeout), timeout)
        body = {"type": job_type, "params": {**params, **given}, **options}
        where = {name: options[name] for name in ("model", "region") if options.get(name) is not None}
        where["allow_cross_region"] = "true" if options.get("allow_cross_region", True) else "false"
        job = self._bring({"job_type": job_type, **where}, body, answer_s=timeout + ANSWER_S)
        return self.run(job_type, params, **kwargs) if job is None else job

    def _bring(self, where: Mapping[str, str], body: Mapping[str, Any], *, answer_s: float) -> Job | None:
        """The completed job of a direct worker; None if there is none, or it does not take the job."""
        address = None
        for _ in range(2):
            asked = {**where, **({"client_address": address} if address else {})}
            found = self._send("GET", "/api/v1/jobs/direct/nearest", params=asked)
            if found.status_code == 404:
                return None
            offer = _job(found)
            try:
                response = self._workers.post(
                    f"{offer['direct_url']}/api/v1/jobs/sync",
                    json=body,
                    headers={"Authorization": f"Bearer {offer['token']}"},
                    timeout=(CONNECT_S, answer_s),
                )
            except requests.ReadTimeout:
                # It may be at work; hanging up has cancelled it.
                raise
            except BROKEN:
                return None
            if response.ok:
                return _job(response)
            error = ApiError(response)
            if error.job is not None and (error.job.get("error") or {}).get("code") not in _WORKER_GONE:
                raise JobNotCompleted(response, error.job)
            if response.status_code in (400, 413, 415, 422):
                # The queue would refuse it too.
                raise error
            # On its way to the worker the client has another address than on its way here.
            address = error.body.get("client_address")
            if address is None:
                return None
        return None

    def submit(self, job_type: str, params: Mapping[str, Any], **options: Any) -> Job:
        """Send a job and return at once; follow it by job["job_id"].

        options: model, priority, region, allow_cross_region, timeout_seconds, queue_timeout_seconds.
        """
        body = {"type": job_type, "params": dict(params), **options}
        return _job(self._send("POST", "/api/v1/jobs", json=body, headers=_key()))

    def dry_run(self, job_type: str, params: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Where such a job would go now, why, and how long it would wait; nothing is sent. options: as for submit."""
        body = {"type": job_type, "params": dict(params), **options}
        return _job(self._send("POST", "/api/v1/jobs", json=body, params={"dry_run": "true"}))

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return _job(self._send("GET", f"/api/v1/jobs/{job_id}"))

    def wait(self, job_id: str, timeout: float = 300) -> Job:
        """The job once it has completed. Raises JobNotCompleted if it ended otherwise, TimeoutError if not in time."""
        end = time.monotonic() + timeout
        pause_s = _POLL_FIRST_S
        while True:
            response = self._send("GET", f"/api/v1/jobs/{job_id}")
            job = _job(response)
            if job["status"] == "completed":
                return job
            if job["status"] in ENDED:
                raise JobNotCompleted(response, job)
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"Job {job_id} is {job['status']} after {timeout:g} s; it goes on.")
            time.sleep(min(pause_s, left))
            pause_s = min(pause_s * 1.5, _POLL_MOST_S)

    def cancel(self, job_id: str) -> Job:
        """Cancel the job, queued or running. Raises ApiError with code job_ended if it had ended otherwise."""
        return _job(self._send("DELETE", f"/api/v1/jobs/{job_id}"))

    def jobs(self, **filters: Any) -> Iterator[Job]:
        """One's own jobs, newest first, without their results.

        filters: status, type, region, created_after; limit is the size of a page.
        """
        while True:
            page = _job(self._send("GET", "/api/v1/jobs", params=filters))
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            filters = {**filters, "cursor": page["next_cursor"]}

    def models(self, **filters: Any) -> list[dict[str, Any]]:
        """What can be asked for, and where it is live. filters: type, live."""
        items: list[dict[str, Any]] = _job(self._send("GET", "/api/v1/models", params=filters))["items"]
        return items

    def stats(self, region: str | None = None) -> dict[str, Any]:
        """What waits and who works, in one region or in all."""
        return _job(self._send("GET", "/api/v1/jobs/stats/queue", params={"region": region} if region else None))

    def workers(self, **filters: Any) -> dict[str, Any]:
        """Workers in numbers; with an admin key each of them, in `items`. filters: region, type, state."""
        return _job(self._send("GET", "/api/v1/workers", params=filters))

    def drain(self, worker: str) -> dict[str, Any]:
        """Order a worker, by worker_id or name, to take no new jobs until it may resume; also after a restart."""
        return _job(self._send("POST", f"/api/v1/workers/{quote(worker, safe='')}/drain"))

    def resume(self, worker: str) -> dict[str, Any]:
        """Let a drained worker take jobs again."""
        return _job(self._send("POST", f"/api/v1/workers/{quote(worker, safe='')}/resume"))

    def _send(self, method: str, path: str, *, answer_s: float = ANSWER_S, **request: Any) -> requests.Response:
        """The answer, sent again while the server is away or asks to come back later."""
        pauses_left_s = MOST_PAUSE_S
        for attempt in range(1, TRIES + 1):
            pause_s = random.uniform(0.5, 1.0) * 0.2 * 2**attempt  # noqa: S311 - spreads clients, hides nothing
            try:
                response = self.session.request(method, self.base_url + path, timeout=(CONNECT_S, answer_s), **request)
            except BROKEN:
                if attempt == TRIES or pause_s > pauses_left_s:
                    raise
            else:
                pause_s = max(pause_s, _retry_after_s(response))
                if not _may_retry(response) or attempt == TRIES or pause_s > pauses_left_s:
                    return response
            pauses_left_s -= pause_s
            time.sleep(pause_s)
        raise AssertionError("unreachable")


def _base64(file: str | bytes) -> str:
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    return base64.b64encode(data).decode()


def _key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def _may_retry(response: requests.Response) -> bool:
    if response.status_code not in (429, 502, 503) or response.headers.get("x-should-retry") == "false":
        return False
    # Whoever asks not to wait for a worker wants to know at once.
    return b'"no_worker"' not in response.content


def _retry_after_s(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def _job(response: requests.Response) -> dict[str, Any]:
    """The answer's body. Raises ApiError or JobNotCompleted."""
    if not response.ok:
        error = ApiError(response)
        if error.job is not None:
            raise JobNotCompleted(response, error.job)
        raise error
    body: dict[str, Any] = response.json()
    return body
