"""kombu's Redis transport, faster, and less two ways in which losing the broker ends a worker for good.

When the connection breaks while messages are unacknowledged, closing the channel tries to put them back over the
connection that has just been closed; and a job that ends later acknowledges its message on the closed channel. Both
raise an AttributeError that Celery takes for unrecoverable (kombu 5.7; kombu#582 shows the same place). Neither
matters here: the ledger knows what was begun, and the reconciler sends again what was not.
"""

import logging
from typing import Any

from kombu.transport import redis
from redis import RedisError

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


class Channel(redis.Channel):
    """A channel with that memory, and with one client for all its commands."""

    QoS = QoS
    _shared: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """kombu makes a client for every publish and acknowledgement, at a quarter of a millisecond each."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._shared is None or self._shared.connection_pool is not self.pool:
            self._shared = super()._create_client()
        return self._shared


class Transport(redis.Transport):
    """A transport of such channels."""

    Channel = Channel
