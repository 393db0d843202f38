"""The API's way to a region: its ledger, its publisher, and breakers so that nobody waits twice for a dead server."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from engines.catalogue import JobType
from tasks import fleet, routing
from tasks.fleet import Card
from tasks.ledger import WAIT_SLICE_S, Ledger, Queued, StoreError, open_store
from tasks.publisher import BrokerError, Publisher
from tasks.routing import Load, Region

logger = logging.getLogger(__name__)

#: One store call; a submit makes one of these and one publish.
STORE_TIMEOUT_S = 0.7
#: One transfer of megabytes; at the narrowest a MiB takes about a second.
BULK_TIMEOUT_S = 60.0
#: How long a server that did not answer is left alone before one caller tries again.
REST_S = 1.0
#: Cards and speeds are read at most this often; a worker's own beat is slower.
FRESH_S = 0.5

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
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._until == 0.0:
                return
            if time.monotonic() < self._until:
                raise Down(f"The {self.name} does not answer.")
            # This caller is the one that tries; the others go on resting.
            self._until = time.monotonic() + REST_S

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, self._errors):
            with self._lock:
                if self._until == 0.0:
                    logger.warning("the %s does not answer: %s", self.name, error)
                self._until = time.monotonic() + REST_S
            # The error itself names hosts and ports, which are not for clients.
            raise Down(f"The {self.name} does not answer.") from error
        if kind is None and self._until:
            with self._lock:
                self._until = 0.0
            logger.info("the %s answers again", self.name)


class Recent(Generic[T]):
    """Something read from a store, once for everybody who asks within FRESH_S."""

    def __init__(self, read: Callable[[], T], breaker: Breaker) -> None:
        self._read = read
        self._breaker = breaker
        self._lock = threading.Lock()
        self._value: T | None = None
        self._read_at = float("-inf")

    def get(self) -> T:
        """The value. Raises Down."""
        with self._lock:
            if self._value is None or time.monotonic() - self._read_at >= FRESH_S:
                with self._breaker:
                    self._value = self._read()
                self._read_at = time.monotonic()
            return self._value


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One store and the ledger in it; regions may share one."""

    ledger: Ledger
    breaker: Breaker
    cards: Recent[list[Card]]
    #: Mean seconds of a job, by queue.
    speeds: Recent[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker; regions may share one."""

    publisher: Publisher
    breaker: Breaker


@dataclass(frozen=True, slots=True)
class Link:
    """One region as the API reaches it."""

    region: Region
    mailbox: Mailbox
    broker: Broker

    def cards(self) -> list[Card]:
        """The region's live workers. Raises Down."""
        return [card for card in self.mailbox.cards.get() if card.region == self.region.name]

    def load(self, job_type: JobType, model: str | None = None) -> Load:
        """What the region can do now for a type, or for jobs of it that name a model. Raises Down."""
        queue = routing.queue_name(self.region.name, job_type)
        return fleet.load_of(self.cards(), job_type, model, service_s=self.mailbox.speeds.get().get(queue))

    def queues(self) -> dict[str, Queued]:
        """The region's queues, by name. Raises Down."""
        with self.mailbox.breaker:
            found = self.mailbox.ledger.queues()
        return {name: queued for name, queued in found.items() if routing.split_queue(name)[0] == self.region.name}

    def depths(self) -> dict[JobType, int]:
        """How many jobs wait here, by type. Raises Down."""
        depths = dict.fromkeys(JobType, 0)
        for name, queued in self.queues().items():
            depths[routing.split_queue(name)[1]] += queued.depth
        return depths


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
            brokers[region.broker] = Broker(Publisher(region.broker), Breaker(f"broker of {region.name}", BrokerError))
    return {name: Link(region, mailboxes[region.store], brokers[region.broker]) for name, region in regions.items()}


def _mailbox(ledger: Ledger, breaker: Breaker, regions: list[str]) -> Mailbox:
    queues = [routing.queue_name(region, job_type) for region in regions for job_type in JobType]
    cards = Recent(lambda: [Card.decode(text) for text in ledger.cards()], breaker)
    return Mailbox(ledger, breaker, cards, Recent(lambda: ledger.speeds(queues), breaker))
