"""Streams of text in OpenAI's shape: what a job says while it runs, chunk by chunk.

A job that lost its worker begins anew. What its client has already been sent stands: the new text is compared with it,
and the stream goes on where it goes beyond, or ends with an error where it says something else.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from flask import Response

from app.job_table import JobRow
from app.openai.answers import Chunks, choices_of
from app.openai.calls import Call, await_worker, failure
from app.openai.errors import NoResult, body
from app.request import Request
from app.streams import Event, sse, streams_here
from app.submission import dispatch_here, take_turn

DONE = "[DONE]"


class Diverged(Exception):
    """The text that came after a lost worker is not the text that the client has."""


def stream(call: Call, wanted: Request, chunks: Chunks, *, include_usage: bool) -> Response:
    """Send the job and answer with its text as it comes; it is cancelled if the client hangs up."""
    await_worker(wanted)
    give_back = take_turn()
    try:
        row = call.submit(wanted)
        dispatch = dispatch_here()
        said = Said(row, chunks, call.timeout_s, include_usage=include_usage)
        return sse(
            said.follow(streams_here().follow(row)),
            on_hang_up=lambda: dispatch.cancel(row),
            on_close=give_back,
            headers={"X-Job-Id": row.id},
        )
    except Exception:
        give_back()
        raise


class Said:
    """What one client has been sent of one job."""

    def __init__(self, row: JobRow, chunks: Chunks, timeout_s: float, *, include_usage: bool) -> None:
        self._row = row
        self._head = chunks.head(row)
        self._chunks = chunks
        self._timeout_s = timeout_s
        # Every chunk has the member where the last one is to tell it.
        self._usage: Mapping[str, Any] = {"usage": None} if include_usage else {}
        self._dispatch = dispatch_here()
        #: The attempt that speaks, and the one that spoke first.
        self._attempt = self._began = 0
        #: By choice: what the client has, and what the present attempt has said.
        self._sent: dict[int, str] = {}
        self._heard: dict[int, str] = defaultdict(str)

    def follow(self, events: Iterator[Event | None]) -> Iterator[str | None]:
        """The chunks as JSON, ending with DONE or an error; None for each moment without one."""
        try:
            for event in events:
                if event is None or event.name in ("status", "progress"):
                    # A moment to see whether the client is there.
                    yield None
                elif event.name == "token":
                    yield from self._token(event.data)
                elif event.name == "result" and event.data["result"] is not None:
                    yield from self._end(event.data["result"], event.data["attempt"])
                    yield DONE
                    return
                else:
                    yield self._error()
                    return
            # OpenAI's clients would take the end of the stream for that of the answer.
            detail = f"The server stops; the job goes on. Its result will be at /api/v1/jobs/{self._row.id}."
            yield json.dumps(body(NoResult(503, "server_stopping", detail, self._row.id)))
        except Diverged:
            self._dispatch.cancel(self._row)
            detail = "Its worker was lost, and the next one answers otherwise; send the request again."
            yield json.dumps(body(NoResult(500, "worker_lost", detail, self._row.id)))

    def _token(self, data: Mapping[str, Any]) -> Iterator[str]:
        if data["attempt"] != self._attempt:
            self._attempt = data["attempt"]
            self._began = self._began or self._attempt
            self._heard.clear()
        index = data["choice"]
        before = len(self._heard[index])
        self._heard[index] += data["delta"]
        # What is told of tokens that the client has in part cannot be taken apart.
        whole = before == len(self._sent.get(index, ""))
        yield from self._say(index, self._heard[index], data.get("logprobs", ()) if whole else ())

    def _say(self, index: int, text: str, logprobs: Any = ()) -> Iterator[str]:
        """Send what the client lacks of the choice's text. Raises Diverged."""
        if index not in self._sent:
            self._sent[index] = ""
            if opening := self._chunks.opening():
                yield self._chunk(index, opening)
        sent = self._sent[index]
        if not text.startswith(sent[: len(text)]):
            raise Diverged
        if len(text) > len(sent):
            self._sent[index] = text
            yield self._chunk(index, self._chunks.text(text[len(sent) :], logprobs, len(sent)))

    def _end(self, result: Mapping[str, Any], attempt: int) -> Iterator[str]:
        anew = self._sent and attempt != self._began
        for choice in choices_of(result):
            if anew and not choice["response"].startswith(self._sent.get(choice["index"], "")):
                raise Diverged
            # Engines that say nothing while they run say all of it here.
            yield from self._say(choice["index"], choice["response"])
            yield self._chunk(choice["index"], self._chunks.closing(), choice["finish_reason"])
        if self._usage:
            yield self._written(choices=[], usage=result["usage"])

    def _chunk(self, index: int, choice: Mapping[str, Any], finish_reason: str | None = None) -> str:
        choices = [{"index": index, **choice, "finish_reason": finish_reason}]
        return self._written(choices=choices, **self._usage)

    def _written(self, **rest: Any) -> str:
        return json.dumps({**self._head, **rest}, ensure_ascii=False, separators=(",", ":"))

    def _error(self) -> str:
        row = self._dispatch.look(self._row.id) or self._row
        problem = failure(row, self._timeout_s)
        if problem is None:
            problem = NoResult(500, "no_result", "It completed, and its result cannot be read now.", row.id)
        return json.dumps(body(problem))
