"""The sending end of a broker: tasks by name, and never a wait for a dead server."""

from collections.abc import Sequence

from amqp.exceptions import AMQPError
from celery import Celery
from celery.utils.nodenames import anon_nodename
from kombu.exceptions import KombuError
from redis import RedisError

from tasks import routing
from tasks.job import Job

#: What publishing and asking for depths raise when the broker does not answer in time.
BrokerError: tuple[type[Exception], ...] = (KombuError, OSError, RedisError, AMQPError)

TIMEOUT_S = 1.0

_NO_CALLBACKS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Publisher:
    """Sends jobs to one broker. Every call ends within about TIMEOUT_S, or raises a BrokerError."""

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
            broker_connection_timeout=TIMEOUT_S,
            broker_transport_options={**self._app.conf.broker_transport_options, **_bounds(broker)},
        )

        self._queues = {queue.name: queue for queue in celeryconfig.queues_for(broker)}
        self._origin = anon_nodename()

    def publish(self, job: Job, *, queue: str, priority: int) -> None:
        """Send the job's message to a queue. An error does not prove that it was not sent.

        Celery's own send_task builds the same message in four times as long.
        Source: Celery's message protocol, task messages version 2.
        """
        args = job.to_args()
        target = self._queues[queue]
        with self._app.producer_pool.acquire(block=True, timeout=TIMEOUT_S) as producer:
            producer.publish(
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
                },
                correlation_id=job.id,
                exchange=target.exchange.name,
                routing_key=target.routing_key,
                declare=[target] if routing.is_amqp(self._broker) else [],
                priority=routing.broker_priority(priority, self._broker),
                serializer="json",
                retry=False,
            )

    def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages the broker holds ready in each queue."""
        with self._app.connection_for_write() as connection:
            channel = connection.default_channel
            found = {}
            for name in queues:
                queue = self._queues[name]
                # Not passive: on Redis an empty queue does not exist, and asking for it would be an error.
                declared = channel.queue_declare(queue=name, durable=True, arguments=queue.queue_arguments)
                found[name] = declared.message_count
            return found

    def close(self) -> None:
        """Drop the connections."""
        self._app.close()


def _bounds(broker: str) -> dict[str, float]:
    if routing.is_amqp(broker):
        return {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "write_timeout": TIMEOUT_S, "max_retries": 0}
    return {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "max_retries": 0}
