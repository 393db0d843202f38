"""The workers of a region as its store knows them: who beats, who is lost, what each did, and what it was told.

The keys are listed in tasks/ledger.py.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from tasks import reliability
from tasks.reliability import Tally
from tasks.store import scripts

LEASE_S = 10.0
BEAT_S = 2.0
#: How long a lost worker is shown.
LOST_TTL_S = 24 * 3600
#: How long an order to drain outlives the last worker of its name.
ORDER_TTL_S = 90 * 24 * 3600
#: What an order to drain says when it is pushed to the worker; and what takes it back.
DRAIN, RESUME = "drain", "resume"


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to beat(): job ids, and whether the worker must drain."""

    cancelled: Sequence[str]
    lost: Sequence[str]
    ghosts: Sequence[str]
    drained: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker as the store knows it."""

    worker_id: str
    #: What it last showed, as fleet.Card.encode() wrote it.
    card: str
    #: Unix seconds by the store's clock.
    last_beat: float
    #: Its lease is alive.
    alive: bool


class Presence:
    """One region's workers. Raises StoreError from every method when the store does not answer in time."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self._run = scripts(store, ("beat", "retire"))

    def beat(
        self, worker_id: str, card: str, running: Sequence[str], *, name: str = "", lease_s: float = LEASE_S
    ) -> Heard:
        """Renew the lease, show the card, and hear of cancels, of jobs that were taken away, and of orders.

        name: what the worker is called, to which orders are given; its id by default.
        """
        cancelled, lost, ghosts, drained = self._run["beat"](
            keys=[f"lease:{worker_id}", "workers", f"running:{worker_id}", "cards", "lost", "names", "orders"],
            args=[worker_id, int(lease_s * 1000), card, name or worker_id, *running],
        )
        return Heard(cancelled, lost, ghosts, bool(drained))

    def retire(self, worker_id: str, *, name: str = "", told: bool = True) -> None:
        """End the lease now; what the worker still held is taken over at once.

        told: it goes because somebody said so, and is not missed. Otherwise it is lost until it is started again.
        """
        keys = [f"lease:{worker_id}", "ended", "cards", "names"]
        self._run["retire"](keys=keys, args=[worker_id, name or worker_id, int(told)])

    def cards(self) -> list[str]:
        """The cards of all workers whose lease is alive."""
        workers = cast(list[str], self._store.zrange("workers", 0, -1))
        if not workers:
            return []
        cards = cast(list[str | None], self._store.mget([f"lease:{worker}" for worker in workers]))
        return [card for card in cards if card is not None]

    def workers(self) -> list[Seen]:
        """Every worker that beats, and every one that was lost within a day."""
        pipe = self._store.pipeline(transaction=False)
        pipe.zrange("lost", 0, -1, withscores=True)
        pipe.zrange("workers", 0, -1, withscores=True)
        pipe.hgetall("cards")
        lost, beating, cards = cast(
            tuple[list[tuple[str, float]], list[tuple[str, float]], dict[str, str]], pipe.execute()
        )
        for worker_id, _ in beating:
            pipe.exists(f"lease:{worker_id}")
        alive = {
            worker_id for (worker_id, _), held in zip(beating, pipe.execute() if beating else [], strict=True) if held
        }
        return [
            Seen(worker_id, cards[worker_id], beat, worker_id in alive)
            # One that has just come back may be in both.
            for worker_id, beat in {**dict(lost), **dict(beating)}.items()
            if worker_id in cards
        ]

    def orders(self) -> set[str]:
        """Names of the workers that must drain, also of those that are not there."""
        return set(cast(list[str], self._store.hkeys("orders")))

    def order(self, name: str, worker_ids: Iterable[str], *, drain: bool) -> None:
        """Tell the workers of a name to take no new jobs, or that they may again.

        worker_ids: those that hear it at once; any other with its next beat, also after a restart.
        """
        pipe = self._store.pipeline(transaction=True)
        if drain:
            pipe.hset("orders", name, int(time.time()))
        else:
            pipe.hdel("orders", name)
        for worker_id in worker_ids:
            pipe.publish(f"ctl:{worker_id}", DRAIN if drain else RESUME)
        pipe.execute()

    def tallies(self, names: Iterable[str]) -> dict[str, Tally]:
        """What the workers of these names did, faded to now."""
        wanted = list(dict.fromkeys(names))
        pipe = self._store.pipeline(transaction=False)
        pipe.time()
        for name in wanted:
            pipe.hmget(f"reliability:{name}", "good", "faults", "at")
        (seconds, microseconds), *found = pipe.execute()
        now = seconds + microseconds / 1e6
        return {
            name: reliability.decayed(Tally(*(float(value or 0) for value in values)), now)
            for name, values in zip(wanted, found, strict=True)
        }

    def lost_workers(self) -> int:
        """How many workers left without a word within LOST_TTL_S and did not come back."""
        return self._store.zcard("lost")

    def anyone_listens(self, worker_ids: Sequence[str]) -> bool:
        """Whether at least one of the workers has its control channel open, as each that is alive does."""
        channels = [f"ctl:{worker_id}" for worker_id in worker_ids]
        counts = cast(list[tuple[str, int]], self._store.pubsub_numsub(*channels))
        return any(listeners for _, listeners in counts)

    def drop_old_orders(self, now: float) -> list[str]:
        """Names whose order to drain is dropped: no worker of that name was there for ORDER_TTL_S."""
        orders = cast(dict[str, str], self._store.hgetall("orders"))
        old = [name for name, at in orders.items() if at != DRAIN and float(at) < now - ORDER_TTL_S]
        if old:
            self._store.hdel("orders", *old)
        if unstamped := {name: str(int(now)) for name, at in orders.items() if at == DRAIN}:
            # Of an earlier version.
            self._store.hset("orders", mapping=cast(Any, unstamped))
        return old
