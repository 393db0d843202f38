"""kombu's Redis transport, faster, and less two ways in which losing the broker ends a worker for good.

When the connection breaks while messages are unacknowledged, closing the channel tries to put them back over the
connection that has just been closed; and a job that ends later acknowledges its message on the closed channel. Both
raise an AttributeError that Celery takes for unrecoverable (kombu 5.7; kombu#582 shows the same place). Neither
matters here: the ledger knows what was begun, and the reconciler sends again what was not.

In a worker it asks for jobs of those types only that the duty has room for.
"""

import functools
import itertools
import logging
from collections import Counter
from typing import Any

from kombu.transport import redis
from kombu.utils.scheduling import round_robin_cycle
from redis import RedisError, ResponseError

from engines.catalogue import JobType
from tasks import routing
from tasks.duty import Duty

logger = logging.getLogger(__name__)


class QoS(redis.QoS):
    """Remembers unacknowledged messages; may fail to put them back, and lets those of a closed channel go."""

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message, if the connection that brought it still stands."""
        if self.channel.closed:
            logger.info("a message of a closed connection is not acknowledged")
        else:
            super().ack(delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Put unacknowledged messages back into their queues, if the broker is there to take them."""
        try:
            super().restore_unacked_once(stderr)
        except (AttributeError, OSError, RedisError) as error:
            logger.warning("messages that were not acknowledged stay with the broker: %s", error)


@functools.cache
def type_of(queue: str) -> JobType | None:
    """The type of the jobs in a queue; None for one that is none of ours, from which nothing is taken."""
    try:
        return routing.split_queue(queue)[1]
    except ValueError:
        return None


class OpenQueues(round_robin_cycle):
    """The queues whose type has room; the type that was served longest ago first, and within it the queue."""

    def __init__(self, duty: Duty) -> None:
        super().__init__()
        self._duty = duty
        self._turns = itertools.count(1)
        self._served: Counter[JobType | None] = Counter()
        #: What consume() said last.
        self.asked: list[str] = []

    def consume(self, n: int) -> list[str]:
        """Those of the first n that are open; called for each pop."""
        self.asked = sorted(self.open(n), key=self._turn)
        return self.asked

    def open(self, n: int) -> list[str]:
        """Those of the first n that are open, in no order."""
        types = {queue: type_of(queue) for queue in super().consume(n)}
        known = {job_type for job_type in types.values() if job_type is not None}
        opened = {job_type for job_type in known if self._duty.open_for(job_type)}
        return [queue for queue in types if types[queue] in opened]

    def _turn(self, queue: str) -> int:
        return self._served[type_of(queue)]

    def rotate(self, last_used: str) -> str:
        """A message came from this queue."""
        self._served[type_of(last_used)] = next(self._turns)
        super().rotate(last_used)
        return last_used


class Channel(redis.Channel):
    """A channel with that memory, with one client for all its commands, and with an eye on the duty.

    kombu asks for the next message with one blocking pop of all queues, which lasts a second if none comes. The pop
    names the open queues alone. When another opens meanwhile, the pop is ended early and asked anew; while none is
    open, none is sent.
    """

    QoS = QoS
    #: Of this worker; None in processes that run no jobs.
    duty: Duty | None = None
    _shared: Any = None
    #: Whether the pop that is under way was ended before its time.
    _ended_early = False
    #: The connection of the pop, as the server numbers it, and its socket, since a new one has a new number.
    _client_id: int = 0
    _numbered: Any = None
    _may_unblock = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.duty is not None:
            self._queue_cycle = OpenQueues(self.duty)

    def widen(self) -> None:
        """End a pop that lacks a queue which is open by now."""
        if self.duty is None or not self._in_poll or not self._may_unblock or self._ended_early:
            return
        if set(self._queue_cycle.asked).issuperset(self._queue_cycle.open(len(self.active_queues))):
            return
        self._ended_early = True
        try:
            self._create_client().client_unblock(self._client_id)
        except ResponseError as error:
            self._may_unblock = False
            logger.warning("a slot that becomes free may wait for up to a second: allow CLIENT UNBLOCK: %s", error)

    def _brpop_start(self, timeout: float | None = None) -> None:
        connection = self.client.connection
        if self.duty is not None and self._may_unblock and connection._sock is not self._numbered:
            connection.send_command("CLIENT", "ID")
            self._client_id, self._numbered = connection.read_response(), connection._sock
        self._ended_early = False
        super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> Any:
        if not self._in_poll:
            # Nothing was asked, since nothing was open: the server has closed the idle connection.
            self.client.connection.disconnect()
            return None
        return super()._brpop_read(**options)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """kombu makes a client for every publish and acknowledgement, at a quarter of a millisecond each."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._shared is None or self._shared.connection_pool is not self.pool:
            self._shared = super()._create_client()
        return self._shared


class Poller(redis.MultiChannelPoller):
    """Looks at the duty on every round of the event loop."""

    def on_poll_start(self) -> None:
        """Called before the loop waits for something to happen."""
        for channel in self._channels:
            channel.widen()
        super().on_poll_start()


class Transport(redis.Transport):
    """A transport of such channels."""

    Channel = Channel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cycle = Poller()
