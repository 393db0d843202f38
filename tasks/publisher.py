"""The sending end of a broker: tasks by name, and never a wait for a dead server."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from amqp.exceptions import AMQPError, MessageNacked
from celery import Celery
from celery.utils.nodenames import anon_nodename
from kombu.exceptions import KombuError
from kombu.pools import ProducerPool
from redis import RedisError

from tasks import routing
from tasks.job import Job

#: What publishing and asking for depths raise when the broker does not answer in time.
BrokerError: tuple[type[Exception], ...] = (KombuError, OSError, RedisError, AMQPError, MessageNacked)

TIMEOUT_S = 1.0
#: How long a publish waits for its turn when many come at once.
POOL_TIMEOUT_S = 0.5

_NO_CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Publisher:
    """Sends jobs to one broker. Every call ends within about 1.5 s, or raises a BrokerError."""

    def __init__(self, broker: str) -> None:
        # Not at the top: it reads the environment, and whoever only imports this may never publish.
        import celeryconfig

        self._broker = broker
        # An application of its own: no result backend, which would subscribe before it sends and block for 19 s where
        # the store is down.
        self._app = Celery("publisher", set_as_current=False)
        self._app.config_from_object("celeryconfig")
        self._app.conf.update(
            broker_url=broker,
            result_backend=None,
            broker_use_ssl=celeryconfig.tls_for(broker),
            broker_connection_timeout=TIMEOUT_S,
            broker_transport_options={**celeryconfig.transport_options_for(broker), **_bounds(broker)},
        )
        # Pools of our own: Celery's, when they grow to broker_pool_limit, come to hold more producers than connections,
        # and a producer waits for its connection without end.
        size = self._app.conf.broker_pool_limit
        self._producers = ProducerPool(self._app.connection_for_write().Pool(limit=size), limit=size)
        self._queue_named = cache(partial(celeryconfig.queue_named, broker=broker))
        self._origin = anon_nodename()

    def publish(self, job: Job, *, queue: str, priority: int, traceparent: str = "") -> None:
        """Send the job's message to a queue. An error does not prove that it was not sent.

        traceparent: the span that sends it, by W3C Trace Context; empty while there are no traces.

        Celery's own send_task builds the same message in four times as long.
        Source: Celery's message protocol, task messages version 2.
        """
        args = job.to_args()
        target = self._queue_named(queue)
        amqp = routing.is_amqp(self._broker)
        with self._producers.acquire(block=True, timeout=POOL_TIMEOUT_S) as producer:
            send = partial(
                producer.publish,
                (args, {}, _NO_CALLBACKS),
                headers={
                    "lang": "py",
                    "task": job.task_name,
                    "id": job.id,
                    "root_id": job.id,
                    "parent_id": None,
                    "group": None,
                    "retries": 0,
                    "timelimit": [None, None],
                    "eta": None,
                    "expires": None,
                    "ignore_result": True,
                    "argsrepr": repr(args),
                    "kwargsrepr": "{}",
                    "origin": self._origin,
                    **({"traceparent": traceparent} if traceparent else {}),
                },
                correlation_id=job.id,
                exchange=target.exchange.name,
                routing_key=target.routing_key,
                declare=[target] if amqp else [],
                # A queue that somebody removed since it was declared here is an error, and no message lost in silence.
                mandatory=amqp,
                priority=routing.broker_priority(priority, self._broker),
                serializer="json",
                retry=False,
            )
            try:
                send()
            except BrokerError as error:
                _drop_connection(producer)
                if not _new_connection_may_help(error):
                    raise
                # The connection was cut while it lay in the pool, by a broker that may be back since, or the queue was
                # removed. The job need not wait for the reconciler because of that.
                try:
                    send()
                except BrokerError:
                    _drop_connection(producer)
                    raise

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages the broker holds ready in each queue."""
        with self._app.connection_for_write() as connection:
            channel = connection.default_channel
            found = {}
            for name in queues:
                queue = self._queue_named(name)
                # Not passive: on Redis an empty queue does not exist, and asking for it would be an error. On RabbitMQ
                # every word must be as kombu declares it, or the answer is 406; py-amqp's own default is auto_delete.
                declared = channel.queue_declare(
                    queue=name, durable=True, auto_delete=False, arguments=queue.queue_arguments
                )
                found[name] = declared.message_count
            return found

    def purge(self, queue: str) -> None:
        """Drop every message that waits in the queue."""
        with self._app.connection_for_write() as connection:
            connection.default_channel.queue_purge(queue)

    def close(self) -> None:
        """Drop the connections."""
        self._producers.force_close_all()
        self._producers.connections.force_close_all()
        self._app.close()


def _drop_connection(producer: Any) -> None:
    """Leave the producer with a connection that is opened anew.

    A pool that gets a broken one back closes it politely, which waits for the same dead server twice more. Nor may it
    be used again: the confirm of this message, coming late, would be taken for the next one's.
    """
    connection = producer.__connection__
    connection.collect()
    producer.revive(connection)


def _new_connection_may_help(error: Exception) -> bool:
    """Whether a new connection may help at once: not where the server did not answer in time, or none can be opened."""
    return isinstance(error, OSError | AMQPError) and not isinstance(error, TimeoutError | BlockingIOError)


def _bounds(broker: str) -> dict[str, float]:
    if routing.is_amqp(broker):
        timeouts = dict.fromkeys(("connect_timeout", "read_timeout", "write_timeout"), TIMEOUT_S)
        # Unconfirmed, a publish to a frozen broker succeeds at once, and the message may be lost. Only here: a worker
        # publishes nothing but events, from its job threads, and one that waits for its confirm without end holds the
        # lock for which the main thread then waits, so that the worker never takes another message.
        return {**timeouts, "max_retries": 0, "confirm_publish": True}
    return {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "max_retries": 0}
