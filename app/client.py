"""The Python SDK: this one file, and requests.

    client = GPUInferenceClient("http://localhost:8000", api_key="gpi_...")
    print(client.chat([{"role": "user", "content": "你好"}]).text)
    for token in client.stream_chat([{"role": "user", "content": "你好"}]).tokens():
        print(token, end="", flush=True)
    client.generate_image("a lighthouse at dawn").save("lighthouse.png")

Every job is sent with an idempotency key of its own, so that sending it again after a broken connection or a 503 makes
no second job.

    requests.ConnectionError    the server cannot be reached, after the retries
    ApiError                    it refused: status, code, detail, errors by field
    ├── Invalid                 400, 413, 415, 422: the request is not what it should be
    ├── KeyRefused              401, 403: no key, a wrong one, or one that may not do this
    ├── NotFound                404
    ├── Conflict                409: the job or key is not in a state for this
    ├── Limited                 429: too many requests, or a quota is used up; retry_after_s
    ├── Unavailable             502, 503: a part that it needs does not answer, or there is no worker
    └── JobNotCompleted         .job is the job
        ├── JobFailed
        ├── JobCancelled
        ├── JobTimedOut         it ran, or waited, for longer than it may
        └── JobUnfinished       not done in the time that the caller gave; it goes on. Also a TimeoutError

`python -m app.client` is the command line, app/cli: docs/client.md.
"""

import base64
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack
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
#: A stream that is silent for this long is broken: the server sends a ping every 15 s.
QUIET_S = 40.0

#: The request was not answered, or not to the end.
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

_POLL_FIRST_S = 0.1
_POLL_MOST_S = 2.0
_JOB_OPTIONS = ("model", "priority", "region", "allow_cross_region", "timeout_seconds", "queue_timeout_seconds")
_JOBS = "/api/v1/jobs"

#: Ends of a direct job that say nothing of the job itself.
_WORKER_GONE = ("worker_lost", "worker_stopped")

#: A picture or a sound: its path, or what is in it.
Media = str | Path | bytes


class JobOptions(TypedDict, total=False):
    """What every job may say of itself; what is left out is the server's default."""

    model: str | None
    priority: int
    region: str | None
    allow_cross_region: bool
    timeout_seconds: float
    queue_timeout_seconds: float | None


class RunOptions(JobOptions, total=False):
    """Of a job that is waited for.

    timeout: seconds, 60 unless a method says otherwise. wait_for_worker: false raises Unavailable at once if nobody
    serves such a job. on_progress: called with done, total, unit, percent; on_token: with each Token.
    """

    timeout: float
    wait_for_worker: bool
    on_progress: Callable[[Mapping[str, Any]], object] | None
    on_token: Callable[["Token"], object] | None


class ChatOptions(RunOptions, total=False):
    """Of one chat."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: str | Sequence[str] | None
    n: int
    response_format: Mapping[str, Any] | None
    logprobs: bool
    top_logprobs: int


class ImageOptions(RunOptions, total=False):
    """Of a picture; sizes in pixels."""

    negative_prompt: str
    width: int
    height: int
    steps: int
    seed: int | None
    guidance_scale: float


class VisionOptions(RunOptions, total=False):
    """Of what a picture is asked."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None


class WhisperOptions(RunOptions, total=False):
    """Of what is written down. task: "transcribe", or "translate" into English; prompt: names and words to expect."""

    language: str | None
    task: str
    prompt: str | None
    temperature: float
    word_timestamps: bool


class EmbeddingOptions(RunOptions, total=False):
    """Of vectors. input_type: "query" or "passage"; truncate: cut what is too long."""

    input_type: str
    truncate: bool


class ApiError(requests.HTTPError):
    """The server refused. Still a requests.HTTPError, as the first version of this client raised."""

    def __init__(self, response: requests.Response, body: Mapping[str, Any] | None = None) -> None:
        """body: of the response, where that was read already."""
        self.status = response.status_code
        self.body: dict[str, Any] = dict(_body(response) if body is None else body)
        self.code: str | None = self.body.get("code")
        self.detail: str = self.body.get("detail") or response.reason
        #: Messages by the dotted path of each field, with 422.
        self.errors: Mapping[str, Sequence[str]] = self.body.get("errors") or {}
        #: When it may be asked again, with 429 and 503; 0 if it does not say.
        self.retry_after_s = _retry_after_s(response)
        #: The job that this is about, if there is one.
        self.job: dict[str, Any] | None = self.body if "job_id" in self.body and "status" in self.body else None
        super().__init__(f"{self.status} {self.code or ''}: {self.detail}", response=response)


class Invalid(ApiError):
    """The request is not what it should be; errors says which fields."""


class KeyRefused(ApiError):
    """There is no key, it is wrong, or it may not do this."""


class NotFound(ApiError):
    """There is no such thing, or it is somebody else's."""


class Conflict(ApiError):
    """It is not in a state for this."""


class Limited(ApiError):
    """Too many requests or jobs for now, or a quota is used up."""


class Unavailable(ApiError):
    """A part that the server needs does not answer, or there is no worker."""


class JobNotCompleted(ApiError):
    """The job has no result: it failed, was cancelled, timed out, or was not done in time and goes on."""

    job: dict[str, Any]

    def __init__(self, response: requests.Response, job: dict[str, Any]) -> None:
        super().__init__(response, job)
        self.job = job
        error = job.get("error") or {}
        self.code = error.get("code") or job["status"]
        self.detail = self.body.get("detail") or error.get("message") or f"The job is {job['status']}."
        self.args = (f"job {job['job_id']} is {job['status']}: {self.detail}",)


class JobFailed(JobNotCompleted):
    """It failed; code and detail say why."""


class JobCancelled(JobNotCompleted):
    """It was cancelled."""


class JobTimedOut(JobNotCompleted):
    """It ran, or waited, for longer than it may."""


class JobUnfinished(JobNotCompleted, TimeoutError):
    """It was not done in the time that the caller gave, and goes on."""


_REFUSALS: Mapping[int, type[ApiError]] = {
    **dict.fromkeys((400, 413, 415, 422), Invalid),
    **dict.fromkeys((401, 403), KeyRefused),
    404: NotFound,
    409: Conflict,
    429: Limited,
    **dict.fromkeys((502, 503), Unavailable),
}
_NOT_COMPLETED: Mapping[str, type[JobNotCompleted]] = {
    "failed": JobFailed,
    "cancelled": JobCancelled,
    "timeout": JobTimedOut,
}


class Job(dict[str, Any]):
    """A job as the server showed it last, with the members of GET /jobs/{id}; and what can be done about it."""

    def __init__(self, client: "GPUInferenceClient", shown: Mapping[str, Any]) -> None:
        super().__init__(shown)
        self._client = client

    @property
    def id(self) -> str:
        """Its id."""
        return str(self["job_id"])

    @property
    def status(self) -> str:
        """queued, running, or one of ENDED."""
        return str(self["status"])

    @property
    def text(self) -> str:
        """What a completed chat or question was answered, or what was said in a sound."""
        result = self["result"]
        return str(result["text"] if "text" in result else result["response"])

    def result(self, timeout: float = 300) -> dict[str, Any]:
        """What it gave, waited for; raises as wait()."""
        given: dict[str, Any] = (self if self.status == "completed" and "result" in self else self.wait(timeout))[
            "result"
        ]
        return given

    def refresh(self) -> Self:
        """This, as it is now."""
        self.update(self._client.get(self.id))
        return self

    def wait(self, timeout: float = 300, on_progress: Callable[[Mapping[str, Any]], object] | None = None) -> Self:
        """This, completed. Raises JobNotCompleted; of it JobUnfinished if it is not done in so many seconds."""
        self.update(self._client.wait(self.id, timeout, on_progress))
        return self

    def cancel(self) -> None:
        """Cancel it, queued or running. Raises Conflict if it had ended otherwise."""
        self._client.cancel(self.id)

    def retry(self) -> "Job":
        """A new job with the same request, where this one failed, timed out or was cancelled."""
        return self._client.retry(self.id)

    def follow(self, timeout: float | None = None) -> "Stream":
        """What becomes of it, as it happens."""
        return self._client.follow(self.id, timeout=timeout)

    def progress(self, timeout: float | None = None) -> Iterator[Mapping[str, Any]]:
        """How far it has come, each time that it says so, until it has ended. Raises JobNotCompleted."""
        stream = self.follow(timeout)
        for event in stream:
            if event.name == "progress":
                yield event.data
        self.update(stream.finish())


class Picture(bytes):
    """A PNG, and what it was made of."""

    job: Job
    #: The result, or the member of a workflow's result, that it was in: width, height, seed and so on.
    about: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write it to a file; the file's path."""
        Path(path).write_bytes(self)
        return Path(path)


class Answer(str):
    """What a picture was found to show."""

    job: Job


class Transcript(Answer):
    """What was said in a sound; times in seconds."""

    @property
    def language(self) -> str:
        """Its code, such as zh."""
        return str(self.job["result"]["language"])

    @property
    def duration(self) -> float:
        """Of the sound, in seconds."""
        return float(self.job["result"]["duration"])

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Its stretches, each with start, end and text."""
        return list(self.job["result"]["segments"])


class Token(str):
    """A piece of an answer."""

    #: Which of the answers, where several are asked for.
    choice: int
    attempt: int
    #: The answer begins once more, as its worker was lost: what came before counts no more.
    anew: bool
    logprobs: Sequence[Mapping[str, Any]]


AnyAnswer = TypeVar("AnyAnswer", bound=Answer)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job: docs/streams.md."""

    id: str
    #: status, progress, token; last result or error.
    name: str
    data: dict[str, Any]


class Stream:
    """One job, followed. To be iterated over once: as events, as tokens(), or by finish().

    A connection that breaks is taken up again where it was left, without loss or repeat. To stop listening does not
    stop the job.
    """

    def __init__(
        self,
        client: "GPUInferenceClient",
        job_id: str,
        response: requests.Response | None = None,
        *,
        after: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """response: one that brings events. after: the id of the last event that is known. timeout: in seconds."""
        self._client = client
        self._response = response
        self._said = self._restarted = False
        self._end = None if timeout is None else time.monotonic() + timeout
        #: As it was told last.
        self.job = Job(client, {"job_id": job_id, "status": "queued"})
        #: What of the first answer has come.
        self.text = ""
        #: Of the last event.
        self.last_id = after

    def __iter__(self) -> Iterator[Event]:
        """Its events, to the last. Raises JobUnfinished, ApiError, and requests.ConnectionError after the retries."""
        failures = 0
        try:
            while self.job.status not in ENDED or "type" not in self.job:
                try:
                    if self._response is None:
                        self._response = self._open()
                    for event in _events(self._response):
                        failures = 0
                        if event is not None:
                            self._note(event)
                            yield event
                            if event.name in ("result", "error"):
                                return
                        self._check_time()
                    problem: Exception = requests.ConnectionError("The stream was closed before its last event.")
                except BROKEN as error:
                    problem = error
                self._check_time()
                self.close()
                failures += 1
                if failures == self._client.tries:
                    raise problem
                time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**failures)  # noqa: S311 - spreads clients, hides nothing
        finally:
            self.close()

    def tokens(self) -> Iterator[Token]:
        """The pieces of its answer. Raises JobNotCompleted at the end, and as iterating does."""
        for event in self:
            if event.name == "token":
                yield self.token(event)
        self.finish()

    def finish(
        self,
        on_progress: Callable[[Mapping[str, Any]], object] | None = None,
        on_token: Callable[[Token], object] | None = None,
    ) -> Job:
        """The completed job; its events go to the callbacks. Raises JobNotCompleted, and as iterating does."""
        for event in () if self.job.status in ENDED else self:
            if event.name == "progress" and on_progress is not None:
                on_progress(event.data)
            elif event.name == "token" and on_token is not None:
                on_token(self.token(event))
        # A result that could not be read at the end, and a job that had been followed to its end before.
        return self.job if self.job.get("result") is not None else self.job.wait(ANSWER_S)

    def close(self) -> None:
        """Stop listening."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> requests.Response:
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        path = f"{_JOBS}/{self.job.id}/events"
        response = self._client._send("GET", path, headers=headers, stream=True, answer_s=self._quiet_s())
        if not response.ok:
            raise _refusal(response)
        if response.status_code == 204:
            self.job.refresh()
        return response

    def _quiet_s(self) -> float:
        return QUIET_S if self._end is None else min(QUIET_S, max(self._end - time.monotonic(), CONNECT_S))

    def token(self, event: Event) -> Token:
        """The piece of the answer that a token event brought, for whoever iterates over events."""
        token = Token(event.data["delta"])
        token.choice, token.attempt = event.data["choice"], event.data["attempt"]
        token.logprobs = event.data.get("logprobs") or ()
        token.anew, self._said, self._restarted = self._restarted, True, False
        return token

    def _check_time(self) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            self.job.wait(0)

    def _note(self, event: Event) -> None:
        self.last_id = event.id
        match event.name:
            case "token" if event.data["choice"] == 0:
                self.text += event.data["delta"]
            case "progress":
                self.job["progress"] = event.data
            case "status" | "result" | "error":
                if event.data["status"] == "running":
                    self.text, self._restarted = "", self._said
                self.job.update(event.data)


class GPUInferenceClient:
    """One platform, as one client uses it."""

    def __init__(self, base_url: str, api_key: str | None = None, *, tries: int = TRIES) -> None:
        """tries: how often a request is sent at most while the server is away or asks to come back later."""
        self.base_url = base_url.rstrip("/")
        self.tries = tries
        self.session = requests.Session()
        if api_key:
            self.session.headers["X-API-Key"] = api_key
        #: To direct workers; the key is for the API alone.
        self._workers = requests.Session()

    def chat(self, messages: Sequence[Mapping[str, str]], **kwargs: Unpack[ChatOptions]) -> Job:
        """The completed job of one chat; its text is job.text, or job["result"]["response"]."""
        return self.run("llm", {"messages": list(messages)}, **kwargs)

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **kwargs: Unpack[ChatOptions]) -> Stream:
        """A chat as it is written: iterate over tokens() of what is given."""
        return self.stream("llm", {"messages": list(messages)}, **kwargs)

    def generate_image(self, prompt: str, **kwargs: Unpack[ImageOptions]) -> Picture:
        """A picture as PNG. It may take 120 s unless timeout says otherwise."""
        kwargs.setdefault("timeout", 120)
        job = self.run("image_gen", {"prompt": prompt}, **kwargs)
        return _picture(job, job["result"])

    def analyze_image(
        self, image_path: Media, question: str | None = None, task: str | None = None, **kwargs: Unpack[VisionOptions]
    ) -> Answer:
        """What a picture shows: the answer to a question (image_qa), a description (image_caption), its text (ocr).

        task: left out, image_qa with a question and image_caption without.
        """
        task = task or ("image_qa" if question else "image_caption")
        params = {"image_base64": _base64(image_path), "task": task, **({"question": question} if question else {})}
        return _answer(Answer, self.run("vision", params, **kwargs))

    def transcribe(self, audio_path: Media, **kwargs: Unpack[WhisperOptions]) -> Transcript:
        """What is said in a sound. It may take 120 s unless timeout says otherwise."""
        kwargs.setdefault("timeout", 120)
        return _answer(Transcript, self.run("whisper", {"audio_base64": _base64(audio_path)}, **kwargs))

    def embed(self, texts: str | Sequence[str], **kwargs: Unpack[EmbeddingOptions]) -> list[list[float]]:
        """A vector of length 1 for each text."""
        job = self.run("embedding", {"input": texts if isinstance(texts, str) else list(texts)}, **kwargs)
        vectors: list[list[float]] = job["result"]["embeddings"]
        return vectors

    def run_workflow(
        self, workflow: Mapping[str, Any], images: Mapping[str, Media] | None = None, **kwargs: Unpack[RunOptions]
    ) -> list[Picture]:
        """The pictures that a ComfyUI workflow gives, node by node; it may take 300 s unless timeout says otherwise.

        workflow: as "Export (API)" writes it. images: pictures by the names that its nodes have for them. What else a
        workflow gives (files, texts) is in the result of run("comfyui", ...).
        """
        kwargs.setdefault("timeout", 300)
        files = {name: _base64(picture) for name, picture in (images or {}).items()}
        job = self.run("comfyui", {"workflow": dict(workflow), "images": files}, **kwargs)
        return [_picture(job, image) for image in job["result"]["images"]]

    def infer(self, model_name: str, inputs: Sequence[Mapping[str, Any]], **kwargs: Any) -> dict[str, dict[str, Any]]:
        """What a model of a Triton server gives: tensors by name, each with shape, datatype and flat data.

        inputs: tensors with name, shape, datatype and data, as the v2 protocol has them. kwargs: model_version,
        outputs ([{"name": ...}]); as RunOptions.
        """
        job = self.run("triton", {"model_name": model_name, "inputs": list(inputs)}, **kwargs)
        return {tensor["name"]: tensor for tensor in job["result"]["outputs"]}

    def run(self, job_type: str, params: Mapping[str, Any], **kwargs: Any) -> Job:
        """The completed job, waited for. Raises JobNotCompleted.

        kwargs: as RunOptions; whatever else is left joins params.
        """
        callbacks = kwargs.pop("on_progress", None), kwargs.pop("on_token", None)
        if callbacks != (None, None):
            return self.stream(job_type, params, **{"timeout": 60, **kwargs}).finish(*callbacks)
        body, rest = _split(job_type, params, kwargs)
        timeout = rest.get("timeout", 60)
        query = {"timeout": timeout, "wait_for_worker": "true" if rest.get("wait_for_worker", True) else "false"}
        path = f"{_JOBS}/sync"
        return Job(self, self._ask("POST", path, json=body, params=query, headers=_key(), answer_s=timeout + ANSWER_S))

    def stream(
        self, job_type: str, params: Mapping[str, Any], *, idempotency_key: str | None = None, **kwargs: Any
    ) -> Stream:
        """A job that is sent and followed. kwargs: as RunOptions, of which timeout is none; what is left joins params.

        Once the timeout has passed, a job that has begun goes on, and one that has not is dropped. Callbacks belong to
        finish() here, and wait_for_worker to run() without callbacks: TypeError.
        """
        body, rest = _split(job_type, params, kwargs)
        timeout = rest.pop("timeout", None)
        if rest:
            raise TypeError(f"A stream does not take {', '.join(rest)}.")
        if timeout is not None:
            body["queue_timeout_seconds"] = min(body.get("queue_timeout_seconds") or timeout, timeout)
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else _key()
        quiet_s = QUIET_S if timeout is None else min(QUIET_S, max(timeout, CONNECT_S))
        response = self._send("POST", f"{_JOBS}/stream", json=body, headers=headers, stream=True, answer_s=quiet_s)
        if not response.ok:
            raise _refusal(response)
        return Stream(self, response.headers["X-Job-Id"], response, timeout=timeout)

    def follow(self, job_id: str, after: str | None = None, timeout: float | None = None) -> Stream:
        """What becomes of a job. after: the id of the last event that is known. timeout: in seconds."""
        return Stream(self, job_id, after=after, timeout=timeout)

    def direct(self, job_type: str, params: Mapping[str, Any], **kwargs: Any) -> Job:
        """The completed job, brought to the nearest worker itself; as run() does it where no worker takes it so.

        kwargs: as for run, without callbacks; what a job may wait is also how long it may run. Raises JobNotCompleted.
        """
        body, rest = _split(job_type, params, kwargs)
        timeout = rest.get("timeout", 60)
        body["timeout_seconds"] = min(body.get("timeout_seconds", timeout), timeout)
        where = {name: body[name] for name in ("model", "region") if body.get(name) is not None}
        where["allow_cross_region"] = "true" if body.get("allow_cross_region", True) else "false"
        job = self._bring({"job_type": job_type, **where}, body, answer_s=timeout + ANSWER_S)
        return self.run(job_type, params, **kwargs) if job is None else job

    def _bring(self, where: Mapping[str, str], body: Mapping[str, Any], *, answer_s: float) -> Job | None:
        """The completed job of a direct worker; None if there is none, or it does not take the job."""
        address = None
        for _ in range(2):
            asked = {**where, **({"client_address": address} if address else {})}
            found = self._send("GET", f"{_JOBS}/direct/nearest", params=asked)
            if found.status_code == 404:
                return None
            offer = _shown(found)
            try:
                response = self._workers.post(
                    f"{offer['direct_url']}{_JOBS}/sync",
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
                return Job(self, _shown(response))
            error = _refusal(response)
            if error.job is not None and (error.job.get("error") or {}).get("code") not in _WORKER_GONE:
                raise _not_completed(response, error.job)
            if response.status_code in (400, 413, 415, 422):
                # The queue would refuse it too.
                raise error
            # On its way to the worker the client has another address than on its way here.
            address = error.body.get("client_address")
            if address is None:
                return None
        return None

    def submit(
        self, job_type: str, params: Mapping[str, Any], *, idempotency_key: str | None = None, **options: Any
    ) -> Job:
        """Send a job and return at once; the job can be waited for, followed and cancelled. options: as JobOptions."""
        body = {"type": job_type, "params": dict(params), **options}
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else _key()
        return Job(self, self._ask("POST", _JOBS, json=body, headers=headers))

    def dry_run(self, job_type: str, params: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Where such a job would go now, why, and how long it would wait; nothing is sent. options: as for submit."""
        body = {"type": job_type, "params": dict(params), **options}
        return self._ask("POST", _JOBS, json=body, params={"dry_run": "true"})

    def get(self, job_id: str) -> Job:
        """The job as it is now."""
        return Job(self, self._ask("GET", f"{_JOBS}/{_part(job_id)}"))

    def wait(
        self, job_id: str, timeout: float = 300, on_progress: Callable[[Mapping[str, Any]], object] | None = None
    ) -> Job:
        """The job once it has completed. Raises JobNotCompleted; of it JobUnfinished if it is not done in time.

        on_progress: called with done, total, unit, percent whenever they have changed.
        """
        end = time.monotonic() + timeout
        pause_s = _POLL_FIRST_S
        progress = None
        while True:
            response = self._send("GET", f"{_JOBS}/{_part(job_id)}")
            job = Job(self, _shown(response))
            if job.status == "completed":
                return job
            if job.status in ENDED:
                raise _not_completed(response, job)
            left = end - time.monotonic()
            if left <= 0:
                detail = "It is not done in the time that was given, and goes on."
                raise JobUnfinished(response, {**job, "detail": detail})
            if on_progress is not None and job["progress"] not in (None, progress):
                progress = job["progress"]
                on_progress(progress)
            time.sleep(min(pause_s, left))
            pause_s = min(pause_s * 1.5, _POLL_MOST_S)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel the job, queued or running. Raises Conflict with code job_ended if it had ended otherwise."""
        return self._ask("DELETE", f"{_JOBS}/{_part(job_id)}")

    def retry(self, job_id: str) -> Job:
        """A new job with the same request as one that failed, timed out or was cancelled."""
        return Job(self, self._ask("POST", f"{_JOBS}/{_part(job_id)}/retry", headers=_key()))

    def jobs(self, **filters: Any) -> Iterator[Job]:
        """One's own jobs, newest first, without their results.

        filters: status, type, region, created_after; limit is the size of a page.
        """
        while True:
            page = self._ask("GET", _JOBS, params=filters)
            for shown in page["items"]:
                yield Job(self, shown)
            if page["next_cursor"] is None:
                return
            filters = {**filters, "cursor": page["next_cursor"]}

    def models(self, **filters: Any) -> list[dict[str, Any]]:
        """What can be asked for, and where it is live. filters: type, live."""
        items: list[dict[str, Any]] = self._ask("GET", "/api/v1/models", params=filters)["items"]
        return items

    def stats(self, region: str | None = None) -> dict[str, Any]:
        """What waits and who works, in one region or in all."""
        return self._ask("GET", f"{_JOBS}/stats/queue", params={"region": region} if region else None)

    def usage(self, **query: Any) -> dict[str, Any]:
        """What one's jobs used, and how one's quotas stand.

        query: first, last (days of UTC, by default the last 30), group_by ("day,model"; also type and key), key (an
        id, for admins).
        """
        renamed = {{"first": "from", "last": "to"}.get(name, name): value for name, value in query.items()}
        return self._ask("GET", "/api/v1/usage", params=renamed)

    def workers(self, **filters: Any) -> dict[str, Any]:
        """Workers in numbers; with an admin key each of them, in `items`. filters: region, type, state."""
        return self._ask("GET", "/api/v1/workers", params=filters)

    def drain(self, worker: str) -> dict[str, Any]:
        """Order a worker, by worker_id or name, to take no new jobs until it may resume; also after a restart."""
        return self._ask("POST", f"/api/v1/workers/{_part(worker)}/drain")

    def resume(self, worker: str) -> dict[str, Any]:
        """Let a drained worker take jobs again."""
        return self._ask("POST", f"/api/v1/workers/{_part(worker)}/resume")

    def keys(self) -> list[dict[str, Any]]:
        """Every key, without its secret. This and what follows is for admins."""
        items: list[dict[str, Any]] = self._ask("GET", "/api/v1/keys")["items"]
        return items

    def create_key(self, name: str, scopes: Sequence[str], **options: Any) -> dict[str, Any]:
        """A new key; its text, `key`, is shown this once. options: weight, quotas, expires_days."""
        body = {"name": name, "scopes": list(scopes), **options}
        # Sent once: a second key would lie about unknown if the answer to the first were lost.
        return self._ask("POST", "/api/v1/keys", json=body, once=True)

    def change_key(self, key_id: str, **changes: Any) -> dict[str, Any]:
        """The key, changed. changes: name, weight, quotas ({"jobs_per_day": 1000, "tokens_per_day": None})."""
        return self._ask("PATCH", f"/api/v1/keys/{_part(key_id)}", json=changes)

    def rotate_key(self, key_id: str, **options: Any) -> dict[str, Any]:
        """A second key like this one; options: overlap_hours (how long this one still works), expires_days."""
        return self._ask("POST", f"/api/v1/keys/{_part(key_id)}/rotate", json=options, once=True)

    def revoke_key(self, key_id: str, *, force: bool = False) -> dict[str, Any]:
        """The key, closed for good. Raises Conflict if it is the last of an admin, unless forced."""
        query = {"force": "true"} if force else None
        return self._ask("DELETE", f"/api/v1/keys/{_part(key_id)}", params=query)

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        return _shown(self._send(method, path, **request))

    def _send(
        self, method: str, path: str, *, answer_s: float = ANSWER_S, once: bool = False, **request: Any
    ) -> requests.Response:
        """The answer, sent again while the server is away or asks to come back later.

        once: not sent again where the server may have done it.
        """
        pauses_left_s = MOST_PAUSE_S
        for attempt in range(1, self.tries + 1):
            pause_s = random.uniform(0.5, 1.0) * 0.2 * 2**attempt  # noqa: S311 - spreads clients, hides nothing
            try:
                response = self.session.request(method, self.base_url + path, timeout=(CONNECT_S, answer_s), **request)
            except BROKEN as error:
                known_unsent = isinstance(error, requests.ConnectTimeout)
                if attempt == self.tries or pause_s > pauses_left_s or (once and not known_unsent):
                    raise
            else:
                pause_s = max(pause_s, _retry_after_s(response))
                if not _may_retry(response) or attempt == self.tries or pause_s > pauses_left_s:
                    return response
            pauses_left_s -= pause_s
            time.sleep(pause_s)
        raise AssertionError("unreachable")


def _split(
    job_type: str, params: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The request's body, and of kwargs what says how to wait."""
    rest = {name: kwargs[name] for name in ("timeout", "wait_for_worker", "on_progress", "on_token") if name in kwargs}
    options = {name: kwargs[name] for name in _JOB_OPTIONS if name in kwargs}
    given = {name: value for name, value in kwargs.items() if name not in rest and name not in options}
    return {"type": job_type, "params": {**params, **given}, **options}, rest


def _base64(media: Media) -> str:
    data = media if isinstance(media, bytes) else Path(media).read_bytes()
    return base64.b64encode(data).decode()


def _picture(job: Job, about: Mapping[str, Any]) -> Picture:
    picture = Picture(base64.b64decode(about["image_base64"]))
    picture.job, picture.about = job, about
    return picture


def _answer(kind: type[AnyAnswer], job: Job) -> AnyAnswer:
    answer = kind(job.text)
    answer.job = job
    return answer


def _events(response: requests.Response) -> Iterator[Event | None]:
    """What a stream of events says, as it arrives; None for a ping. Raises BROKEN."""
    # A body without chunks would be read to its end before the first byte is given.
    size = None if getattr(response.raw, "chunked", False) else 1
    begun: list[bytes] = []
    fields: dict[str, str] = {}
    for chunk in response.iter_content(size):
        if b"\n" not in chunk:
            begun.append(chunk)
            continue
        *lines, rest = b"".join([*begun, chunk]).split(b"\n")
        begun = [rest]
        for line in lines:
            name, _, value = line.decode().rstrip("\r").partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
            elif "data" in fields and not line.strip():
                yield Event(fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"]))
                fields = {}
            else:
                fields = {}
                yield None


def _part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


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


def _body(response: requests.Response) -> dict[str, Any]:
    """The answer's JSON; {} where it is none."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _refusal(response: requests.Response) -> ApiError:
    return _REFUSALS.get(response.status_code, ApiError)(response)


def _not_completed(response: requests.Response, job: dict[str, Any]) -> JobNotCompleted:
    return _NOT_COMPLETED.get(job["status"], JobUnfinished)(response, job)


def _shown(response: requests.Response) -> dict[str, Any]:
    """The answer's body. Raises ApiError or JobNotCompleted."""
    if not response.ok:
        error = _refusal(response)
        if error.job is not None:
            raise _not_completed(response, error.job)
        raise error
    body: dict[str, Any] = response.json()
    return body


if __name__ == "__main__":
    # Whoever copies this file has no command line with it.
    import_module("app.cli.commands").main()
