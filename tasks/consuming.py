"""How Celery's consumer follows the duty: which queues it takes from, and what becomes of a message too many.

Each message takes a slot of its type when it is delivered, in the main thread, and gives it back when its job has
ended. One that finds none, because direct mode was faster or the worker has just been drained, goes back to its queue
for whoever has room. Everything that touches the broker happens in the main thread; other threads only wake it.
"""

import functools
import itertools
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import kombu
from celery.worker import request

from engines.catalogue import JobType
from tasks import redis_transport, routing
from tasks.duty import Duty

logger = logging.getLogger(__name__)

#: Messages may still arrive for this long after their consumer was cancelled.
_LATE_S = 30.0


def attach(worker: Any, duty: Duty) -> None:
    """Make a Celery worker that has not connected yet take its messages by the duty."""
    if routing.is_amqp(worker.app.conf.broker_url):
        worker.app.amqp.Consumer = functools.partial(AmqpConsumer, duty=duty, worker=worker)
    else:
        worker.app.amqp.Consumer = functools.partial(Consumer, duty=duty)
        redis_transport.Channel.duty = duty

    def wake(after_s: float) -> None:
        hub = getattr(worker, "hub", None)
        if hub is None:
            return
        if after_s > 0:
            hub.call_soon(hub.call_later, after_s, _look_again)
        else:
            hub.call_soon(_look_again)

    duty.listen(wake)


def _look_again() -> None:
    """The event loop looks at the duty on each of its rounds; this starts one."""


class Slot:
    """One slot that a message holds; given back once, at the latest when nobody knows the message any more."""

    def __init__(self, duty: Duty, job_type: JobType) -> None:
        self._duty = duty
        self._job_type = job_type
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._held = True

    def free(self) -> None:
        """Give it back, unless that was done."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._duty.done(self._job_type, time.monotonic() - self._began)

    __del__ = free


class Request(request.Request):
    """Celery's request, which gives its message's slot back as soon as the job has ended."""

    def acknowledge(self) -> None:
        """Called by the thread that ran the job; the broker hears of it from the main thread, in a moment.

        The slot comes second, so that the broker knows that this message is done when it is asked for the next.
        """
        try:
            super().acknowledge()
        finally:
            _free(self._message)

    def reject(self, requeue: bool = False) -> None:
        """The same for a message that is not done with."""
        try:
            super().reject(requeue)
        finally:
            _free(self._message)


def _free(message: kombu.Message) -> None:
    slot: Slot | None = getattr(message, "slot", None)
    if slot is not None:
        slot.free()


class Consumer(kombu.Consumer):
    """Takes a slot for each message before Celery sees it, or sends it back."""

    def __init__(self, *args: Any, duty: Duty, **options: Any) -> None:
        self._duty = duty
        self._handler: Callable[[kombu.Message], object] | None = None
        super().__init__(*args, **options)

    @property
    def on_message(self) -> Callable[[kombu.Message], object] | None:
        """What kombu calls with a message; Celery sets what it calls in turn."""
        return None if self._handler is None else self._receive

    @on_message.setter
    def on_message(self, handler: Callable[[kombu.Message], object] | None) -> None:
        self._handler = handler

    def _receive(self, message: kombu.Message) -> None:
        assert self._handler is not None
        queue = message.delivery_info["routing_key"]
        job_type = redis_transport.type_of(queue)
        if job_type is None or not self._duty.try_take(job_type):
            self._refuse(message, queue)
            return
        message.slot = Slot(self._duty, job_type)
        self._accepted(message, queue, job_type)
        try:
            self._handler(message)
        finally:
            # Unreadable, unknown or revoked: no thread will run it.
            if message.acknowledged:
                message.slot.free()

    def _accepted(self, message: kombu.Message, queue: str, job_type: JobType) -> None:
        """Told of each message that got a slot."""

    def _refuse(self, message: kombu.Message, queue: str) -> None:
        logger.info("a message of %s goes back: no slot is free", queue)
        message.requeue()


class AmqpConsumer(Consumer):
    """A consumer for each queue while its type has room, with no more credit than that.

    RabbitMQ sends each consumer as many messages as its prefetch count allows, which is fixed when it starts, less
    those that are not acknowledged. So a consumer is ended when its type is full and started anew, with the room of
    that moment, when it is not. The queue that was served longest ago goes first.
    """

    def __init__(self, *args: Any, worker: Any, **options: Any) -> None:
        self._worker = worker
        self._consuming = False
        self._tag_numbers = itertools.count(1)
        #: Of each consumer that stands: the prefetch count, and the messages that it brought.
        self._credits: dict[str, tuple[int, weakref.WeakSet[kombu.Message]]] = {}
        self._prefetch: int | None = None
        self._turns = itertools.count(1)
        self._served: Counter[str | JobType | None] = Counter()
        self._ended: deque[tuple[float, str]] = deque()
        super().__init__(*args, **options)

    def consume(self, no_ack: bool | None = None) -> None:
        """Take messages from now on, whenever there is room."""
        self._consuming = True
        self._worker.hub.on_tick.add(self.adjust)
        self.adjust()

    def cancel(self) -> None:
        """Take none any more."""
        self._consuming = False
        self._worker.hub.on_tick.discard(self.adjust)
        super().cancel()

    close = cancel

    def adjust(self) -> None:
        """Start and end consumers as the duty has it now; called on every round of the event loop."""
        if not self._consuming:
            return
        self._forget_ended()
        types = {name: redis_transport.type_of(name) for name in self._queues}
        room = {name: 0 if job_type is None else self._duty.room(job_type) for name, job_type in types.items()}
        for name in [name for name in self._active_tags if not room.get(name)]:
            self._end(name)
        lacking = [name for name in self._queues if room[name] and self._credit(name) * 2 <= room[name]]
        for name in sorted(lacking, key=lambda name: (self._served[types[name]], self._served[name])):
            self._end(name)
            self._start(name, room[name])

    def _credit(self, name: str) -> int:
        """How many messages the broker may send from a queue before one is acknowledged."""
        tag = self._active_tags.get(name)
        if tag is None:
            return 0
        prefetch, brought = self._credits[tag]
        return prefetch - sum(not message.acknowledged for message in brought)

    def _start(self, name: str, room: int) -> None:
        if self._prefetch != room:
            # For the consumers that start from now on. The answer is waited for, and messages may come before it.
            self.channel.basic_qos(0, room, False)
            self._prefetch = room
        tag = f"{name}:{next(self._tag_numbers)}"
        self._credits[tag] = room, weakref.WeakSet()
        self._basic_consume(self._queues[name], consumer_tag=tag, no_ack=False, nowait=True)

    def _end(self, name: str) -> None:
        tag = self._active_tags.pop(name, None)
        self._active_queue_no_ack.pop(name, None)
        if tag is not None:
            self.channel.basic_cancel(tag, nowait=True)
            self._credits.pop(tag, None)
            self._ended.append((time.monotonic() + _LATE_S, tag))

    def _forget_ended(self) -> None:
        while self._ended and self._ended[0][0] < time.monotonic():
            _, tag = self._ended.popleft()
            self.channel.callbacks.pop(tag, None)

    def _accepted(self, message: kombu.Message, queue: str, job_type: JobType) -> None:
        self._served[job_type] = self._served[queue] = next(self._turns)
        credit = self._credits.get(message.delivery_info["consumer_tag"])
        if credit is not None:
            credit[1].add(message)

    def _refuse(self, message: kombu.Message, queue: str) -> None:
        # First, or it comes straight back.
        self._end(queue)
        super()._refuse(message, queue)
