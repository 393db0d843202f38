"""Sends what webhooks are to be told, by Standard Webhooks 1.0; the leading control process does it.

An attempt belongs to whoever claimed it: of two processes that believe that they lead, one sends it. A process that
dies while it sends leaves a claim that ends by itself, and the attempt is made again; receivers know both by their
webhook-id. The order of deliveries is not kept.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from enum import StrEnum

from sqlalchemy.exc import SQLAlchemyError

from app.chores import while_leading
from app.deliveries import Attempt, Deliveries, Delivery, Webhook
from app.destinations import Answer, Destinations, Refused, Unreachable
from app.settings import WEBHOOK_DISABLE_DAYS
from engines.failure import frames

logger = logging.getLogger(__name__)

#: Seconds before each attempt; after the last one a delivery has failed: three days, so a weekend is slept through.
SCHEDULE_S = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
#: Each is longer by up to this share, so that what failed together does not come back together.
JITTER = 0.2
LONGEST_RETRY_AFTER_S = 86_400.0
#: Threads, and how many of them one webhook may hold: one that hangs is let one alone, until it takes something.
THREADS = 16
PER_WEBHOOK = 4
EVERY_S = 0.25
#: Longer than any attempt takes, with its name's resolution.
LEASE_S = 60.0
PRUNE_EVERY_S = 3600.0
PRUNE_BATCH = 500

_GONE = 410


class Outcome(StrEnum):
    """What an attempt came to."""

    DELIVERED = "delivered"
    #: It is tried again.
    RETRIED = "retried"
    #: It was the last one.
    FAILED = "failed"


class Courier:
    """Sends deliveries as they become due."""

    def __init__(
        self,
        deliveries: Deliveries,
        destinations: Destinations,
        *,
        disable_days: float = WEBHOOK_DISABLE_DAYS,
        log_days: float,
        schedule_s: Sequence[float] = SCHEDULE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """disable_days: a webhook that nothing reached for so long is disabled. log_days: deliveries are kept."""
        self._deliveries = deliveries
        self._destinations = destinations
        self._disable_s = disable_days * 86_400.0
        self._log_s = log_days * 86_400.0
        self._schedule_s = schedule_s
        self._clock = clock
        self._lock = threading.Lock()
        #: Attempts under way, by webhook.
        self._busy: Counter[str] = Counter()
        #: Attempts of this process, by what they came to.
        self.outcomes: Counter[str] = Counter()

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Send for as long as this process leads, until stopped is set."""
        pruned_at = float("-inf")
        # Not waited for at the end: what is under way is settled, or made again by the next one.
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook")

        def turn() -> float:
            nonlocal pruned_at
            self.send_due(pool)
            if time.monotonic() - pruned_at >= PRUNE_EVERY_S:
                pruned_at = time.monotonic()
                while self._deliveries.prune(self._log_s, PRUNE_BATCH) == PRUNE_BATCH and not stopped.wait(EVERY_S):
                    continue
            return EVERY_S

        while_leading(
            turn,
            leads,
            stopped,
            pause_s=EVERY_S,
            away="webhooks wait while the database is away",
            failed="webhooks are sent later",
        )
        pool.shutdown(wait=False, cancel_futures=True)

    def send_due(self, pool: ThreadPoolExecutor) -> int:
        """Begin what is due and has room in the pool; how many that were."""
        begun = 0
        free = THREADS - self._busy.total()
        if free <= 0:
            return 0
        for hook in self._deliveries.due(4 * THREADS):
            with self._lock:
                room = (1 if hook.failing_since else PER_WEBHOOK) - self._busy[hook.id]
            room = min(room, free - begun)
            if room <= 0:
                continue
            for delivery in self._deliveries.take(hook.id, room, lease_s=LEASE_S):
                with self._lock:
                    self._busy[hook.id] += 1
                pool.submit(self._work, hook, delivery)
                begun += 1
        return begun

    def _work(self, hook: Webhook, delivery: Delivery) -> None:
        try:
            self.attempt(hook, delivery)
        except SQLAlchemyError as error:
            logger.warning(
                "delivery %s: what its attempt came to is not written: %s", delivery.id, type(error).__name__
            )
        except Exception as error:  # noqa: BLE001 - logged without its own words
            # Those may quote the URL, which can be a secret of its receiver.
            logger.error("delivery %s failed and is tried again: %s", delivery.id, frames(error))
        finally:
            with self._lock:
                self._busy[hook.id] -= 1
                if not self._busy[hook.id]:
                    del self._busy[hook.id]

    def attempt(self, hook: Webhook, delivery: Delivery) -> Outcome:
        """Send a claimed delivery once, and write what came of it."""
        at, began = self._clock(), time.monotonic()
        answer, error = self._post(hook, delivery, at)
        status = answer.status if answer else None
        delivered = status is not None and 200 <= status < 300
        if not delivered and answer:
            error = _why(answer.status)
        wait_s = None if delivered else self._wait_s(delivery.tries + 1, answer, at)
        outcome = Outcome.DELIVERED if delivered else Outcome.FAILED if wait_s is None else Outcome.RETRIED
        attempt = Attempt(at, status, error, round(time.monotonic() - began, 3))
        settled = self._deliveries.settle(delivery, attempt, delivered=delivered, wait_s=wait_s)
        if not settled:
            # It took so long that somebody else has it now.
            return outcome
        with self._lock:
            self.outcomes[outcome] += 1
        if delivered:
            if hook.failing_since is not None:
                self._deliveries.arrived(hook.id)
        elif status == _GONE:
            if self._deliveries.disable(hook.id, "It answered 410 Gone."):
                logger.warning("webhook %s is disabled: it answered 410", hook.id)
        elif self._deliveries.failed(hook.id, most_s=self._disable_s, reason=f"The last attempt: {error}"):
            logger.warning("webhook %s is disabled: nothing has arrived for too long", hook.id)
        return outcome

    def _post(self, hook: Webhook, delivery: Delivery, at: float) -> tuple[Answer | None, str | None]:
        body = delivery.body.encode()
        secrets = [hook.secret]
        if hook.old_secret and hook.old_secret_until is not None and at < hook.old_secret_until:
            secrets.append(hook.old_secret)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "gpu-inference-webhooks/1",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at)),
            "webhook-signature": " ".join(sign(secret, delivery.id, int(at), body) for secret in secrets),
        }
        try:
            return self._destinations.post(hook.url, body, headers), None
        except (Refused, Unreachable) as error:
            return None, str(error)

    def _wait_s(self, tries: int, answer: Answer | None, at: float) -> float | None:
        """Seconds until the next attempt after so many; None if that was the last."""
        if tries >= len(self._schedule_s) or (answer and answer.status == _GONE):
            return None
        wait_s = self._schedule_s[tries] * random.uniform(1, 1 + JITTER)  # noqa: S311 - no secret
        asked_s = retry_after_s(answer.retry_after, at) if answer and answer.retry_after else 0.0
        return max(wait_s, min(asked_s, LONGEST_RETRY_AFTER_S))


def sign(secret: str, message_id: str, at: int, body: bytes) -> str:
    """The v1 signature of Standard Webhooks; secret: as whsec_ and base64, at: unix seconds."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise ValueError("A webhook's secret is no base64.") from error
    signed = hmac.new(key, f"{message_id}.{at}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed.digest()).decode()}"


def retry_after_s(text: str, at: float) -> float:
    """Seconds that a Retry-After header asks for at a unix time; 0 for one that says nothing that can be read."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        return max(parsedate_to_datetime(text).timestamp() - at, 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _why(status: int) -> str:
    if 300 <= status < 400:
        return f"It answered {status}; redirects are not followed."
    return f"It answered {status}."
