"""The API's way to a region: its ledger, its publisher, and breakers so that nobody waits twice for a dead server."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import TracebackType
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from engines.catalogue import JobType
from tasks import memory, routing
from tasks.fleet import Card, Roster
from tasks.ledger import WAIT_SLICE_S, Ledger
from tasks.memory import Memory, OutOfMemory
from tasks.publisher import BrokerError, Publisher
from tasks.records import Queued, Traffic
from tasks.routing import Load, Offer, Region
from tasks.store import StoreError, open_store

logger = logging.getLogger(__name__)

#: One store call; a submit makes one of these and one publish.
STORE_TIMEOUT_S = 0.7
#: One transfer of megabytes; at the narrowest a MiB takes about a second.
BULK_TIMEOUT_S = 60.0
#: How long a server that did not answer is left alone before one caller tries again.
REST_S = 1.0
#: Cards and speeds are read at most this often; a worker's own beat is slower.
FRESH_S = 0.5
#: While they are being read anew, what was read before serves until it is this old.
STALE_S = 1.5

T = TypeVar("T")


class Down(Exception):
    """A server of a region does not answer."""


class Breaker:
    """Lets calls through while the server answers; after a failure refuses them for a while, then lets one try.

    with breaker: ... raises Down at once while it rests, and turns the server's own errors into Down.
    """

    def __init__(self, name: str, errors: type[Exception] | tuple[type[Exception], ...]) -> None:
        self.name = name
        self._errors = errors
        self._until = 0.0
        self._failing_since: float | None = None
        self._lock = threading.Lock()

    @property
    def failing_s(self) -> float:
        """Seconds since the server first did not answer, if it has not answered since; else 0."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def tripped(self) -> bool:
        """Whether the server did not answer when it was last asked."""
        return self._until != 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._until == 0.0:
                return
            if time.monotonic() < self._until:
                raise Down(f"The {self.name} does not answer.")
            # This caller is the one that tries; the others go on resting.
            self._until = time.monotonic() + REST_S

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        full = kind is not None and issubclass(kind, OutOfMemory)
        if kind is not None and issubclass(kind, self._errors) and not full:
            with self._lock:
                if self._until == 0.0:
                    logger.warning("the %s does not answer: %s", self.name, error)
                    self._failing_since = time.monotonic()
                self._until = time.monotonic() + REST_S
            # The error itself names hosts and ports, which are not for clients.
            raise Down(f"The {self.name} does not answer.") from error
        if (kind is None or full) and self._until:
            with self._lock:
                self._until = 0.0
                self._failing_since = None
            logger.info("the %s answers again", self.name)
        if full:
            # It answers, and what needs no memory goes on.
            raise Down(f"The {self.name} has no memory left.") from error


class Recent(Generic[T]):
    """Something read from a store, once for everybody who asks within FRESH_S."""

    def __init__(self, read: Callable[[], T], breaker: Breaker) -> None:
        self._read = read
        self._breaker = breaker
        self._lock = threading.Lock()
        self._value: T | None = None
        self._read_at = float("-inf")

    def get(self) -> T:
        """The value, read by one caller while the others go on with the last one. Raises Down."""
        value, age_s = self._value, time.monotonic() - self._read_at
        if value is not None and age_s < FRESH_S:
            return value
        usable = value is not None and age_s < STALE_S
        if not self._lock.acquire(blocking=not usable and not self._breaker.tripped):
            if value is not None and usable:
                return value
            raise Down(f"The {self._breaker.name} does not answer.")
        try:
            if self._value is None or time.monotonic() - self._read_at >= FRESH_S:
                with self._breaker:
                    self._value = self._read()
                self._read_at = time.monotonic()
            return self._value
        finally:
            self._lock.release()

    def amend(self, change: Callable[[T], None]) -> None:
        """Change the value until it is read anew, if it was ever read. Two at once may lose one change."""
        # Without the lock: whoever reads the value anew may hold it for as long as the store takes.
        if (value := self._value) is not None:
            change(value)


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One store and the ledger in it; regions may share one."""

    ledger: Ledger
    breaker: Breaker
    workers: Recent[Roster]
    #: What waits and runs, by queue.
    traffic: Recent[dict[str, Traffic]]
    #: By priority: how many jobs wait that would run before a new one of it, by queue.
    ahead: Sequence[Recent[dict[str, int]]]
    memory: Recent[Memory]
    #: What was made of workers and traffic, by region, type and model, and what it was made of.
    loads: dict[tuple[str, JobType, str | None], tuple[Roster, Mapping[str, Traffic], Load]] = field(
        default_factory=dict
    )


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker; regions may share one."""

    publisher: Publisher
    breaker: Breaker
    #: None where that is not known, as of RabbitMQ, which holds up its publishers itself.
    memory: Recent[Memory] | None


@dataclass(frozen=True, slots=True)
class Link:
    """One region as the API reaches it."""

    region: Region
    mailbox: Mailbox
    broker: Broker

    def cards(self) -> list[Card]:
        """The region's live workers. Raises Down."""
        return self.mailbox.workers.get().of(self.region.name)

    def load(self, job_type: JobType, model: str | None = None) -> Load:
        """What the region can do now for a type, or for jobs of it that name a model. Raises Down."""
        roster, traffic = self.mailbox.workers.get(), self.mailbox.traffic.get()
        key = (self.region.name, job_type, model)
        known = self.mailbox.loads.get(key)
        if known is not None and known[0] is roster and known[1] is traffic:
            return known[2]
        own = traffic.get(routing.queue_name(*key), _NO_TRAFFIC)
        beside = [passed for name in roster.beside(*key) for passed in traffic.get(name, _NO_TRAFFIC).elapsed_s]
        load = roster.load(*key, service_s=own.mean_s).with_running(own.elapsed_s, beside)
        self.mailbox.loads[key] = (roster, traffic, load)
        return load

    def beside(self, job_type: JobType, model: str | None) -> list[str]:
        """Queues whose jobs wait for the same workers. Raises Down."""
        return self.mailbox.workers.get().beside(self.region.name, job_type, model)

    def offer(self, job_type: JobType, model: str | None, priority: int) -> Offer:
        """What the region can do now for a new job. Raises Down if its store or its broker takes none."""
        broker = self.broker
        if broker.breaker.tripped:
            # A job that may go elsewhere need not wait for this broker; one caller a second tries whether it is back.
            with broker.breaker:
                broker.publisher.depths([routing.queue_name(self.region.name, job_type)])
        self.check_room()
        ahead = self.mailbox.ahead[priority].get()
        own = ahead.get(routing.queue_name(self.region.name, job_type, model), 0)
        beside = sum(ahead.get(name, 0) for name in self.beside(job_type, model))
        return Offer(self.load(job_type, model), own, beside)

    def check_room(self, size: int = 0) -> None:
        """Count so many bytes that are about to be entered. Raises Down if there is no room for new jobs."""
        for gauge, name in (
            (self.mailbox.memory, self.mailbox.breaker.name),
            (self.broker.memory, self.broker.breaker.name),
        ):
            if gauge is not None and (known := gauge.get()).most:
                if known.full:
                    raise Down(f"The memory of the {name} is full.")
                gauge.amend(lambda known: known.grow(size))

    def away(self) -> str | None:
        """Why the region takes no jobs now, in a sentence; None if it does, as far as is known."""
        for breaker in (self.mailbox.breaker, self.broker.breaker):
            if breaker.tripped:
                return f"The {breaker.name} does not answer."
        try:
            self.check_room()
        except Down as down:
            return str(down)
        return None

    def expect(self, job_type: JobType, model: str | None, priority: int) -> None:
        """Count a job that is about to be sent, so that many at once do not all take the same free slot."""
        queue = routing.queue_name(self.region.name, job_type, model)
        for recent in self.mailbox.ahead[: priority + 1]:
            recent.amend(lambda depths: depths.update({queue: depths.get(queue, 0) + 1}))

    def queues(self) -> dict[str, Queued]:
        """The region's queues, by name. Raises Down."""
        with self.mailbox.breaker:
            found = self.mailbox.ledger.queues()
        return {name: queued for name, queued in found.items() if routing.split_queue(name)[0] == self.region.name}


def mailboxes(links: Mapping[str, Link]) -> list[Mailbox]:
    """The stores of the regions, each once."""
    return list({id(link.mailbox): link.mailbox for link in links.values()}.values())


def nearest(links: Mapping[str, Link], region: str, able: Callable[[Link], bool]) -> str | None:
    """The nearest other region that can be reached and is able; None if none is.

    able: may raise Down. region: may be one that is no longer among the links; every other one is as near then.
    """
    found: list[Region] = []
    for name, link in links.items():
        with suppress(Down):
            if name != region and not link.broker.breaker.tripped and able(link):
                found.append(link.region)
    here = links.get(region)
    near = min(found, key=lambda other: routing.distance_km(here.region, other) if here else 0.0, default=None)
    return None if near is None else near.name


def open_links(regions: Mapping[str, Region]) -> dict[str, Link]:
    """A link to every region; those with the same URL share connections and breakers."""
    mailboxes: dict[str, Mailbox] = {}
    brokers: dict[str, Broker] = {}
    for region in regions.values():
        if region.store not in mailboxes:
            ledger = Ledger(
                open_store(region.store, timeout_s=STORE_TIMEOUT_S),
                waiting=open_store(region.store, timeout_s=STORE_TIMEOUT_S, block_s=WAIT_SLICE_S),
                bulk=open_store(region.store, timeout_s=BULK_TIMEOUT_S),
            )
            mailboxes[region.store] = _mailbox(ledger, Breaker(f"store of {region.name}", StoreError), list(regions))
        if region.broker not in brokers:
            brokers[region.broker] = _broker(region)
    return {name: Link(region, mailboxes[region.store], brokers[region.broker]) for name, region in regions.items()}


def _mailbox(ledger: Ledger, breaker: Breaker, regions: list[str]) -> Mailbox:
    queues = [routing.queue_name(region, job_type) for region in regions for job_type in JobType]
    workers = Recent(lambda: Roster(map(_card, ledger.presence.cards())), breaker)
    ahead = [Recent(partial(ledger.ahead, priority), breaker) for priority in routing.PRIORITIES]
    traffic = Recent(lambda: ledger.traffic(queues), breaker)
    return Mailbox(ledger, breaker, workers, traffic, ahead, Recent(lambda: memory.read(ledger.store), breaker))


def _broker(region: Region) -> Broker:
    breaker = Breaker(f"broker of {region.name}", BrokerError)
    gauge = None
    # Databases of one server share its memory.
    if memory.is_server(region.broker) and _server(region.broker) != _server(region.store):
        server = open_store(region.broker, timeout_s=STORE_TIMEOUT_S)
        gauge = Recent(lambda: memory.read(server), breaker)
    return Broker(Publisher(region.broker), breaker, gauge)


def _server(url: str) -> str:
    parts = urlsplit(url)
    return parts.netloc or parts.path


_NO_TRAFFIC = Traffic(0, (), None)
#: Most workers say the same as the time before, and reading 10,000 cards anew takes a good part of a second.
_card = lru_cache(maxsize=20_000)(Card.decode)
