"""Settings of broker, results, queues and priority: the only file that names Celery options.

Celery imports it in workers, in Flower and in every process that publishes; each option's reason stands beside it.
"""

import os
import ssl
import sys
from typing import Any
from urllib.parse import urlsplit

from dotenv import find_dotenv, load_dotenv
from kombu import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from engines.catalogue import JobType
from tasks import routing, settings

load_dotenv(find_dotenv(usecwd=True))
for _scheme in ("redis", "rediss"):
    TRANSPORT_ALIASES[_scheme] = "tasks.redis_transport:Transport"

try:
    _regions = settings.load_regions(os.environ)
except settings.SettingsError as error:
    # One line instead of Celery's traceback, whichever of its commands this is.
    sys.stderr.write(f"{error}\n")
    sys.exit(settings.EXIT_CONFIG)


def queues_for(broker: str) -> list[Queue]:
    """Every region's queues as the broker of that URL holds them; those of single models come as they are needed."""
    return [
        queue_named(routing.queue_name(region, job_type, pinned=pinned), broker)
        for region in _regions
        for job_type in JobType
        for pinned in (False, True)
    ]


def queue_named(name: str, broker: str) -> Queue:
    """A queue as the broker of that URL holds it.

    On RabbitMQ the topic exchange does the routing: the key is the queue's name. Every process declares the same
    arguments, or RabbitMQ refuses the second one (celery#8260). On Redis an exchange is kombu's own make-believe: a
    set of bindings that the publisher reads for each message, and that an emptied server loses, after which messages
    vanish in silence. There messages go straight to the queue of that name.
    """
    amqp = routing.is_amqp(broker)
    exchange = Exchange(routing.EXCHANGE, type="topic", durable=True) if amqp else Exchange("", type="direct")
    arguments = {"x-max-priority": routing.PRIORITIES[-1]} if amqp else {}
    return Queue(name, exchange, routing_key=name, queue_arguments=arguments)


def transport_options_for(broker: str) -> dict[str, Any]:
    """What kombu is told about the broker of that URL; a region's broker need not be of the home region's kind."""
    if routing.is_amqp(broker):
        return {
            "connect_timeout": 2,
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.2,
        }
    return {
        # kombu's default has four steps, in which ten priorities mix.
        "priority_steps": list(routing.PRIORITIES),
        # Only the last net under a job that was popped and never acknowledged; the lease is the real one.
        "visibility_timeout": 3600,
        # Must exceed the transport's blocking pop of 1 s.
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "max_retries": 1,
    }


def tls_for(broker: str) -> dict[str, Any] | None:
    """What kombu is told about the certificate of the broker of that URL: it must be good, and be its host's.

    None without TLS. Left to itself kombu takes any certificate for rediss://, and py-amqp one of any host for
    amqps://. Options in a rediss:// URL (ssl_cert_reqs, ssl_ca_certs) replace these.
    """
    if broker.startswith("rediss:"):
        return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    if routing.is_amqp(broker) and urlsplit(broker).scheme.endswith("s"):
        return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": urlsplit(broker).hostname}
    return None


def connections_of(region: routing.Region) -> dict[str, Any]:
    """The options that say which servers a process uses: those of one region."""
    return {
        "broker_url": region.broker,
        "broker_transport_options": transport_options_for(region.broker),
        "broker_use_ssl": tls_for(region.broker),
        "result_backend": region.store,
        # Celery's backend refuses a rediss:// URL that says nothing of certificates; what one says overrides this.
        "redis_backend_use_ssl": {"ssl_cert_reqs": "required"} if region.store.startswith("rediss:") else None,
        "task_default_queue": routing.queue_name(region.name, JobType.LLM),
        # A message without a priority counts as 0 on the broker's scale, which on Redis is the most urgent.
        "task_default_priority": routing.broker_priority(0, region.broker),
    }


# For Flower and whoever else looks in. A worker gets those of the region it serves from tasks/boot.py, which reads
# config.yaml and may have asked the platform's API: a region that only that API knows is no mistake here.
_named = os.environ.get("GPU_REGION") or os.environ.get("DEFAULT_REGION")
_home = _regions.get(_named or "", next(iter(_regions.values())))
globals().update(connections_of(_home))
task_queues = queues_for(_home.broker)

imports = ("tasks.infer", "tasks.boot")
# With prefork nothing batches, and a child that loads for longer than four seconds is killed in a loop (celery#1715).
worker_pool = "threads"
# Late, and one message per slot: what a worker has not begun stays with the broker, ordered by priority.
task_acks_late = True
worker_prefetch_multiplier = 1
# The ledger holds outcomes; a task that stored one would wake waiters with a duplicate's word.
task_ignore_result = True
task_reject_on_worker_lost = False
worker_cancel_long_running_tasks_on_connection_loss = False

# JSON both ways: unpickling a message is running its sender's code.
task_serializer = result_serializer = event_serializer = "json"
accept_content = ["json"]
result_accept_content = ["json"]

# For Flower. Arguments are an id and a number; nothing of a job's content is in any event.
worker_send_task_events = True

# Without it every thread opens a connection pool and a subscription of its own (celery#6819).
result_backend_thread_safe = True
result_expires = 3600
redis_socket_timeout = 5
redis_socket_connect_timeout = 2
redis_socket_keepalive = True

broker_connection_retry_on_startup = True
# For ever: by default a worker gives up on its broker after 100 tries.
broker_connection_max_retries = None
# RabbitMQ closes the channel of a message that is not acknowledged within its consumer_timeout, 30 minutes by default.
# Without this a job that runs for longer ends its worker as soon as it is done (celery#6760).
broker_channel_error_retry = True
# Celery would take fewer messages after that and count back up as jobs end, from their threads: each asks the broker
# and waits for its answer on the connection that the main thread reads. Now and then that takes the main thread's
# next message, and the worker never takes another. A message that is delivered twice does no harm here.
worker_enable_prefetch_count_reduction = False
broker_pool_limit = 16
# The row is the outbox: a publish that fails is sent again by the reconciler.
task_publish_retry = False
broker_heartbeat = 30
