"""How much one key may ask: requests in ten seconds, counted in the default region's store, and jobs that wait.

What is counted belongs to the key's owner, so a key and the one it was rotated into share it. Programs on the server
itself that need no key are not limited; whoever else needs none is counted by address.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flask import Flask, Response, current_app, g, request
from flask_limiter import ApplicationLimit, Limiter, RateLimitExceeded
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy import Engine, func, literal, select, text

from app.auth import ANONYMOUS, LOCAL, Caller
from app.errors import TooMany, answer
from app.origin import address_here
from app.quotas import QuotaCap
from app.settings import RATE_WINDOW_S, Settings
from app.tables import jobs

#: One question to the store; with no answer by then, this process counts by itself until the store is back.
STORE_TIMEOUT_S = 0.2
#: A count of an owner's queued jobs is believed for this long: other processes add to them too.
COUNT_FRESH_S = 1.0
#: When to ask again for room in the queue.
QUEUE_RETRY_S = 5


class Kind(StrEnum):
    """What requests are counted as; each has a count of its own."""

    SUBMIT = "submit"
    SYNC = "sync"
    READ = "read"
    CANCEL = "cancel"


def kind_of(endpoint: str, method: str) -> Kind | None:
    """What a request counts as; None for what is not limited: the orders of admins."""
    if endpoint in ("jobs.run", "jobs.stream") or (endpoint.startswith("openai.") and method == "POST"):
        return Kind.SYNC
    if endpoint in ("jobs.create", "jobs.retry") or (endpoint.startswith("webhooks.") and method == "POST"):
        return Kind.SUBMIT
    if method == "DELETE":
        return Kind.CANCEL
    return Kind.READ if method in ("GET", "HEAD") else None


def limit_requests(app: Flask, settings: Settings) -> Limiter:
    """Count requests, after the Guard has seen who sends them; those beyond a limit are answered with 429."""
    most = {
        Kind.SUBMIT: settings.rate_submit,
        Kind.SYNC: settings.rate_sync,
        Kind.READ: settings.rate_read,
        Kind.CANCEL: settings.rate_cancel,
    }
    store = settings.regions[settings.default_region].store
    # What goes to redis.from_url; flask-limiter's own type for it is too narrow.
    options: dict[str, Any] = {
        "key_prefix": "rates",
        "socket_timeout": STORE_TIMEOUT_S,
        "socket_connect_timeout": STORE_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    limiter = Limiter(
        _who,
        application_limits=[
            ApplicationLimit(
                f"{number} per {RATE_WINDOW_S} second", key_function=_counter(kind), exempt_when=_is_not(kind)
            )
            for kind, number in most.items()
            if number
        ],
        # flask-limiter's own name for a socket.
        storage_uri=f"redis+{store}" if store.startswith("unix:") else store,
        storage_options=options,
        in_memory_fallback_enabled=True,
        # One question to the store for a request; the other strategies ask more.
        strategy="fixed-window",
        headers_enabled=False,
    )
    limiter.request_filter(_is_free)
    limiter.init_app(app)
    app.extensions["request_limiter"] = limiter

    def refuse(_: RateLimitExceeded) -> Response:
        kind = kind_of(request.endpoint or "", request.method)
        number = most[kind] if kind else 0
        detail = (
            f"More than {number} requests of this kind ({kind}) in {RATE_WINDOW_S} s; wait, then go on more slowly."
        )
        headers = {"X-RateLimit-Limit": str(number), "X-RateLimit-Remaining": "0"}
        return answer(TooMany("rate_limited", detail, retry_after_s=_left_s(limiter), headers=headers))

    app.register_error_handler(RateLimitExceeded, refuse)
    return limiter


@dataclass(frozen=True, slots=True)
class Room:
    """How many more requests of a kind a caller may send."""

    limit: int
    remaining: int
    #: Whole seconds until it is `limit` again.
    reset_s: int


def room_here() -> Room | None:
    """What is left of the limit that this request counted towards; None where none does. Asks the store once more."""
    limiter: Limiter = current_app.extensions["request_limiter"]
    try:
        hit = limiter.current_limit
        return Room(hit.limit.amount, max(0, hit.remaining), _left_s(limiter)) if hit else None
    except RedisError:
        return None


class QueueCap:
    """How many of an owner's jobs may be queued at a time. Threads may share it.

    Exact but for requests that arrive at the same moment, and for what other processes take within COUNT_FRESH_S.
    """

    def __init__(self, engine: Engine, most: int, quotas: QuotaCap) -> None:
        """most: 0 is no cap. quotas: what each key may use, which is asked first."""
        self._quotas = quotas
        self._engine = engine
        self._most = most
        #: How many more each owner may send before its jobs are counted again, and until when that holds.
        self._left: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def admit(self, caller: Caller) -> None:
        """Pass if the caller may queue one job more. Raises TooMany."""
        self._quotas.admit(caller)
        if not self._most or caller.key == LOCAL:
            return
        owner = caller.owner
        with self._lock:
            left, until = self._left.get(owner, (0, 0.0))
            if left > 0 and time.monotonic() < until:
                self._left[owner] = left - 1, until
                return
        left = self._most - self._count(owner)
        if left <= 0:
            detail = f"This key has {self._most} jobs queued, as many as it may; send more as they begin."
            raise TooMany("too_many_queued", detail, retry_after_s=QUEUE_RETRY_S)
        with self._lock:
            self._left[owner] = left - 1, time.monotonic() + COUNT_FRESH_S

    def _count(self, owner: str) -> int:
        # Spelled out, not as a parameter: SQLite uses an index of queued jobs alone only where it reads the word.
        queued = select(literal(1)).where(jobs.c.owner == owner, text("status = 'queued'")).limit(self._most)
        with self._engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(queued.subquery())).scalar_one()


def _is_free() -> bool:
    caller: Caller | None = g.get("caller")
    return caller is None or caller.key == LOCAL


def _who() -> str:
    caller: Caller = g.caller
    return f"address:{address_here() or request.remote_addr}" if caller.key == ANONYMOUS else caller.owner


def _counter(kind: Kind) -> Callable[[], str]:
    return lambda: f"{kind}:{_who()}"


def _is_not(kind: Kind) -> Callable[[], bool]:
    return lambda: kind_of(request.endpoint or "", request.method) is not kind


def _left_s(limiter: Limiter) -> int:
    """Whole seconds until the window of the limit that was hit ends."""
    try:
        hit = limiter.current_limit
        return max(1, min(RATE_WINDOW_S, round(hit.reset_at - time.time()))) if hit else RATE_WINDOW_S
    except RedisError:
        # The store went away just now.
        return RATE_WINDOW_S
