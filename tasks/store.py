"""A region's store: how it is opened, and the scripts that change it whole or not at all."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.retry import Retry

StoreError = redis.RedisError

#: Of one client to a store; the threads of a process are fewer.
MOST_CONNECTIONS = 25_000

#: By script: what stands before it. A store's scripts cannot call each other.
_BEFORE: Mapping[str, Sequence[str]] = {
    "finish": ("count", "say"),
    "orphans": ("count",),
    "tell": ("say",),
    "cancel": ("say",),
    "withdraw": ("say",),
    "put": ("standing",),
    "stand": ("standing",),
}


def open_store(url: str, *, timeout_s: float, block_s: float = 0.0) -> redis.Redis:
    """A client that gives up after timeout_s, plus block_s for blocking reads, instead of waiting for a dead server."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s + block_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        # One for each thread that asks or waits at once. redis-py allows 100, and the next ones get an error that looks
        # as if the server were away.
        max_connections=MOST_CONNECTIONS,
        decode_responses=True,
        # A retry would wait for the same dead server again; callers decide what a failure means.
        retry=Retry(NoBackoff(), 0),
    )


def scripts(store: redis.Redis, names: Iterable[str]) -> dict[str, Script]:
    """These files of tasks/lua, by name, ready to be called."""
    folder = Path(__file__).parent / "lua"
    return {
        name: store.register_script(
            "".join((folder / f"{part}.lua").read_text() for part in (*_BEFORE.get(name, ()), name))
        )
        for name in names
    }
