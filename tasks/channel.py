"""What is pushed to a worker the moment it is made: cancels of its running jobs, and orders."""

import logging
import threading
from collections.abc import Callable

import redis

from tasks.presence import DRAIN, RESUME

logger = logging.getLogger(__name__)

#: Before listening again after the store went away.
RETRY_S = 1.0


class Listener:
    """A thread that calls on_cancel(job_id) for every cancel sent to this worker, and on_order() for every order.

    A push can be missed while the store is away; the beat's answer names the same cancels again, and it alone says
    which order stands.
    """

    def __init__(
        self, store: redis.Redis, worker_id: str, on_cancel: Callable[[str], None], on_order: Callable[[], None]
    ) -> None:
        self._store = store
        self._name = f"ctl:{worker_id}"
        self._on_cancel = on_cancel
        self._on_order = on_order
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="cancel-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._stop.set()
        self._thread.join(timeout=RETRY_S + 1)

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._store.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
                    pubsub.subscribe(self._name)
                    while not self._stop.is_set():
                        if message := pubsub.get_message(timeout=0.5):
                            if message["data"] in (DRAIN, RESUME):
                                self._on_order()
                            else:
                                self._on_cancel(message["data"])
            except redis.RedisError as error:
                logger.warning("cancels and orders arrive by the beat only, for now: %s", error)
                self._stop.wait(RETRY_S)
