"""Clients who submit, poll, cancel and repeat themselves, and write down every answer they get."""

import heapq
import itertools
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

from tasks.job import TERMINAL

THREADS = 12
#: A submit that nobody took for so long is given up: nothing was promised to its client.
PATIENCE_S = 90.0
POLL_S = (0.3, 1.0)
#: An ended job is looked at again after these.
AGAIN_S = (1.0, 5.0)
RETRY_S = 0.3
SYNC_S = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was told of its job, between two moments of the monotonic clock."""

    asked: float
    got: float
    status: str
    #: Of an end: status, result and error together.
    outcome: str | None


@dataclass(eq=False)
class Wish:
    """One job as its client knows it."""

    text: str
    priority: int = 0
    timeout_s: float = 120
    sync: bool = False
    #: Whoever repeats a submit uses the same one.
    key: str = field(default_factory=lambda: str(uuid.uuid4()))
    asked_at: float = 0.0
    #: Every id that it was given, in order; two that differ are a second job.
    ids: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    #: Statuses of DELETE.
    cancels: list[int] = field(default_factory=list)
    cancel_asked: bool = False
    vanished: bool = False
    refused: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    ended_at: float | None = None
    wrong_result: bool = False

    @property
    def id(self) -> str | None:
        """Its job, once it was accepted."""
        return self.ids[0] if self.ids else None


class Clients:
    """Do what is due at its time, in a few threads. Everything they were told is in `wishes`."""

    def __init__(self, url: str) -> None:
        self._jobs = f"{url}/api/v1/jobs"
        self.wishes: list[Wish] = []
        #: Answers that no client should see, by status and path, however broken the platform is.
        self.surprises: Counter[str] = Counter()
        #: When each submit that does not wait was asked, by the monotonic clock, and how long its answer took.
        self.submits: list[tuple[float, float]] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._turn = threading.Condition()
        self._stopped = False
        self._own = threading.local()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def wish(
        self, wish: Wish, *, at: float | None = None, cancel_after: float | None = None, repeat: bool = False
    ) -> Wish:
        """Submit a job and follow it to its end. cancel_after: seconds; repeat: submit it twice at once."""
        at = time.monotonic() if at is None else at
        self.wishes.append(wish)
        submit = self._run_sync if wish.sync else self._submit
        for _ in range(2 if repeat else 1):
            self.at(at, lambda: submit(wish))
        if cancel_after is not None:
            self.at(at + cancel_after, lambda: self.cancel(wish))
        return wish

    def cancel(self, wish: Wish) -> None:
        """DELETE it; again until an answer comes."""
        if wish.id is None:
            return
        wish.cancel_asked = True
        status, _ = self._ask("DELETE", f"/{wish.id}")
        if status in (200, 409):
            wish.cancels.append(status)
        elif status == 404:
            wish.vanished = True
        else:
            self._in(RETRY_S, lambda: self.cancel(wish))

    def look(self, wish: Wish) -> int:
        """GET it and write down the answer; its HTTP status, 0 for none."""
        asked = time.monotonic()
        status, body = self._ask("GET", f"/{wish.id}")
        if status == 200:
            self._note(wish, asked, body)
        elif status == 404:
            wish.vanished = True
        return status

    def close(self) -> None:
        """Stop; what is not done yet is left."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def _submit(self, wish: Wish) -> None:
        wish.asked_at = wish.asked_at or time.monotonic()
        asked = time.monotonic()
        status, body = self._ask("POST", "", json=self._body(wish), headers={"Idempotency-Key": wish.key})
        self.submits.append((asked, time.monotonic() - asked))
        if status == 202:
            self._accepted(wish, body)
        else:
            self._submit_again(wish, status, body, self._submit)

    def _run_sync(self, wish: Wish) -> None:
        wish.asked_at = wish.asked_at or time.monotonic()
        asked = time.monotonic()
        status, body = self._ask(
            "POST",
            "/sync",
            json=self._body(wish),
            params={"timeout": SYNC_S},
            headers={"Idempotency-Key": wish.key},
            timeout=(2, SYNC_S + 10),
        )
        if "job_id" in body and "status" in body:
            self._note(wish, asked, body)
            self._accepted(wish, body)
        else:
            self._submit_again(wish, status, body, self._run_sync)

    def _submit_again(self, wish: Wish, status: int, body: Any, submit: Callable[[Wish], None]) -> None:
        if status not in (0, 429, 500, 503):
            wish.refused = f"{status} {body}"
            wish.ended.set()
        elif time.monotonic() - wish.asked_at > PATIENCE_S:
            wish.refused = "patience"
            wish.ended.set()
        else:
            self._in(RETRY_S, lambda: submit(wish))

    def _accepted(self, wish: Wish, body: Any) -> None:
        first = not wish.ids
        wish.ids.append(body["job_id"])
        if first:
            self._in(POLL_S[0], lambda: self._follow(wish, POLL_S[0]))

    def _follow(self, wish: Wish, pause_s: float) -> None:
        self.look(wish)
        if wish.vanished:
            wish.ended.set()
        elif wish.ended.is_set():
            for after in AGAIN_S:
                self._in(after, lambda: self.look(wish))
        else:
            pause_s = min(pause_s * 1.3, POLL_S[1])
            self._in(pause_s, lambda: self._follow(wish, pause_s))

    def _note(self, wish: Wish, asked: float, body: Any) -> None:
        ended = body["status"] in TERMINAL
        outcome = json.dumps([body["status"], body.get("result"), body.get("error")]) if ended else None
        wish.answers.append(Answer(asked, time.monotonic(), body["status"], outcome))
        if body["status"] == "completed" and (body.get("result") or {}).get("response") != wish.text:
            wish.wrong_result = True
        if ended and not wish.ended.is_set():
            wish.ended_at = time.monotonic()
            wish.ended.set()

    def _body(self, wish: Wish) -> dict[str, Any]:
        return {
            "type": "llm",
            "params": {"messages": [{"role": "user", "content": wish.text}], "max_tokens": 100},
            "priority": wish.priority,
            "timeout_seconds": wish.timeout_s,
        }

    def _ask(self, method: str, path: str, timeout: tuple[float, float] = (2, 15), **given: Any) -> tuple[int, Any]:
        """Status and body; 0 where no answer came."""
        session = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = requests.Session()
        try:
            response = session.request(method, self._jobs + path, timeout=timeout, **given)
            body = response.json()
        except requests.RequestException:
            return 0, {}
        # A failed sync job is told with 500, and with the job.
        if response.status_code == 500 and "job_id" not in body:
            self.surprises[f"500 of {method} {'/jobs/sync' if path == '/sync' else '/jobs'}"] += 1
        return response.status_code, body

    def _in(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(time.monotonic() + seconds, do)

    def at(self, when: float, do: Callable[[], None]) -> None:
        with self._turn:
            heapq.heappush(self._due, (when, next(self._number), do))
            self._turn.notify()

    def _work(self) -> None:
        while True:
            with self._turn:
                while not self._stopped and (not self._due or self._due[0][0] > time.monotonic()):
                    self._turn.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._stopped:
                    return
                _, _, do = heapq.heappop(self._due)
            do()
