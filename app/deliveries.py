"""Webhooks and what they are told: every statement on their two tables.

A delivery is made in the transaction that notes the end of its job (app/ends.py), and is its own outbox: due at
next_at, taken by a claim that ends by itself, settled only by the holder of that claim.
"""

import base64
import json
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, and_, delete, func, insert, or_, select, tuple_, update

from app.job_table import JobRow
from app.schemas import JobItem, Shown
from app.tables import now, webhook_deliveries, webhooks
from app.waiting import Place
from engines.catalogue import JobType
from tasks.showing import rfc3339

#: Attempts that are kept of one delivery, the newest.
LOGGED = 20
#: A body has less than 20 kB (Standard Webhooks): of what an engine says of its failure, so many characters.
LONGEST_MESSAGE = 2000
SECRET_BYTES = 32


class Event(StrEnum):
    """What a webhook can hear of."""

    COMPLETED = "job.completed"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    TIMEOUT = "job.timeout"


#: What is sent to try a webhook out.
TEST = "webhook.test"


class DeliveryState(StrEnum):
    """What became of a delivery."""

    #: It waits for its first or next attempt.
    PENDING = "pending"
    #: Its receiver answered with 2xx.
    DELIVERED = "delivered"
    #: It is not tried again, but can be replayed.
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Webhook:
    """A row; times are unix seconds by the database's clock."""

    id: str
    owner: str
    url: str
    description: str
    events: Sequence[Event]
    #: Empty for all.
    job_types: Sequence[JobType]
    secret: str
    old_secret: str | None
    old_secret_until: float | None
    enabled: bool
    disabled_reason: str | None
    failing_since: float | None
    created_at: float

    def wants(self, row: JobRow) -> bool:
        """Whether it hears of this end."""
        return f"job.{row.status}" in self.events and (not self.job_types or row.type in self.job_types)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try; status_code is None where nothing answered."""

    at: float
    status_code: int | None
    error: str | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row; times are unix seconds by the database's clock."""

    id: str
    webhook_id: str
    job_id: str | None
    event: str
    body: str
    state: DeliveryState
    tries: int
    #: Oldest first, over all replays.
    log: Sequence[Attempt]
    created_at: float
    next_at: float | None
    claim: str | None


def new_secret() -> str:
    """What deliveries are signed with, as Standard Webhooks writes it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


class TooManyWebhooks(Exception):
    """The owner has as many as one may."""


class Deliveries:
    """Both tables. Threads and processes may share them. Raises sqlalchemy.exc.OperationalError."""

    def __init__(self, engine: Engine, *, public_url: str = "") -> None:
        """public_url: what the paths of jobs are put behind."""
        self._engine = engine
        self._public_url = public_url

    # An owner's webhooks

    def create(
        self,
        owner: str,
        *,
        url: str,
        description: str,
        events: Sequence[Event],
        job_types: Sequence[JobType],
        enabled: bool,
        most: int,
    ) -> Webhook:
        """A new webhook. Raises TooManyWebhooks if the owner has `most` already."""
        held = select(func.count()).select_from(webhooks).where(webhooks.c.owner == owner)
        with self._engine.connect() as connection:
            if connection.execute(held).scalar_one() >= most:
                raise TooManyWebhooks
            values = {
                "id": str(uuid.uuid4()),
                "owner": owner,
                "url": url,
                "description": description,
                "events": ",".join(events),
                "job_types": ",".join(job_types),
                "secret": new_secret(),
                "enabled": enabled,
                "created_at": now(),
            }
            return _webhook(connection.execute(insert(webhooks).values(**values).returning(*webhooks.c)).one())

    def all(self, owner: str) -> list[Webhook]:
        """The owner's webhooks, oldest first."""
        query = select(*webhooks.c).where(webhooks.c.owner == owner).order_by(webhooks.c.created_at, webhooks.c.id)
        with self._engine.connect() as connection:
            return [_webhook(found) for found in connection.execute(query)]

    def get(self, webhook_id: str, owner: str) -> Webhook | None:
        """The webhook, if it exists and is the owner's."""
        query = select(*webhooks.c).where(webhooks.c.id == webhook_id, webhooks.c.owner == owner)
        with self._engine.connect() as connection:
            found = connection.execute(query).first()
        return _webhook(found) if found else None

    def change(self, webhook_id: str, values: Mapping[str, Any]) -> Webhook | None:
        """Change url, description, events, job_types or enabled; None if it is gone.

        Enabled again, it begins without a reason and without failures. Disabled, it is told nothing that was pending.
        """
        changed = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
        if values.get("enabled"):
            changed |= {"disabled_reason": None, "failing_since": None}
        row = self._update_webhook(webhook_id, changed)
        if values.get("enabled") is False:
            self._drop_pending(webhook_id)
        return row

    def rotate_secret(self, webhook_id: str, *, overlap_s: float) -> Webhook | None:
        """A new secret; the present one signs beside it for overlap_s. None if the webhook is gone."""
        values = {
            "secret": new_secret(),
            "old_secret": webhooks.c.secret if overlap_s else None,
            "old_secret_until": now() + overlap_s if overlap_s else None,
        }
        return self._update_webhook(webhook_id, values)

    def delete(self, webhook_id: str) -> None:
        """Delete a webhook, with all that it was or was to be told."""
        with self._engine.connect() as connection:
            connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))
            connection.execute(delete(webhook_deliveries).where(webhook_deliveries.c.webhook_id == webhook_id))

    def _update_webhook(self, webhook_id: str, values: Mapping[str, Any]) -> Webhook | None:
        query = select(*webhooks.c).where(webhooks.c.id == webhook_id)
        statement = update(webhooks).where(webhooks.c.id == webhook_id).values(**values).returning(*webhooks.c)
        with self._engine.connect() as connection:
            found = connection.execute(statement if values else query).first()
        return _webhook(found) if found else None

    # What they are told

    def enter(self, connection: Connection, ended: Sequence[JobRow]) -> None:
        """Make the deliveries of jobs that have just ended, on this connection (app/ends.py)."""
        owners = {row.owner for row in ended}
        query = select(*webhooks.c).where(webhooks.c.owner.in_(owners), webhooks.c.enabled.is_(True))
        hooks = [_webhook(found) for found in connection.execute(query)]
        made = [
            {
                # The same however often it is made: receivers know by it what they have seen, after a power cut too.
                "id": str(uuid.uuid5(uuid.UUID(hook.id), row.id)),
                "webhook_id": hook.id,
                "job_id": row.id,
                "event": f"job.{row.status}",
                "body": self._body(row),
                "state": str(DeliveryState.PENDING),
                "tries": 0,
                "log": "[]",
            }
            for row in ended
            for hook in hooks
            if hook.owner == row.owner and hook.wants(row)
        ]
        if made:
            connection.execute(insert(webhook_deliveries).values(created_at=now(), next_at=now()), made)

    def enter_test(self, hook: Webhook, at: float) -> Delivery:
        """Make a delivery that says nothing but that the webhook works; at: unix seconds."""
        body = {"type": TEST, "timestamp": rfc3339(at), "data": {"webhook_id": hook.id}}
        statement = insert(webhook_deliveries).values(
            id=str(uuid.uuid4()),
            webhook_id=hook.id,
            event=TEST,
            body=json.dumps(body, separators=(",", ":")),
            state=str(DeliveryState.PENDING),
            tries=0,
            log="[]",
            created_at=now(),
            next_at=now(),
        )
        with self._engine.connect() as connection:
            return _delivery(connection.execute(statement.returning(*webhook_deliveries.c)).one())

    def page(
        self, webhook_id: str, *, state: DeliveryState | None, limit: int, before: tuple[float, str] | None
    ) -> list[Delivery]:
        """A webhook's deliveries, newest first; before: the (created_at, id) of the last one already seen."""
        columns = webhook_deliveries.c
        query = select(*columns).where(columns.webhook_id == webhook_id)
        if state is not None:
            query = query.where(columns.state == str(state))
        if before is not None:
            query = query.where(tuple_(columns.created_at, columns.id) < tuple_(*before))
        query = query.order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [_delivery(found) for found in connection.execute(query)]

    def find(self, webhook_id: str, delivery_id: str) -> Delivery | None:
        """One of the webhook's deliveries."""
        columns = webhook_deliveries.c
        query = select(*columns).where(columns.id == delivery_id, columns.webhook_id == webhook_id)
        with self._engine.connect() as connection:
            found = connection.execute(query).first()
        return _delivery(found) if found else None

    def replay(self, delivery_id: str) -> Delivery | None:
        """Begin a delivery's attempts anew, at once; None while one of them is under way, or if it is gone."""
        columns = webhook_deliveries.c
        idle = or_(columns.claim.is_(None), columns.next_at.is_(None), columns.next_at <= now())
        values = {"state": str(DeliveryState.PENDING), "tries": 0, "next_at": now(), "claim": None}
        statement = update(webhook_deliveries).where(columns.id == delivery_id, idle).values(**values)
        with self._engine.connect() as connection:
            found = connection.execute(statement.returning(*columns)).first()
        return _delivery(found) if found else None

    # Sending

    def due(self, limit: int) -> list[Webhook]:
        """Webhooks to which something is to be sent now; those that wait longest first."""
        columns = webhook_deliveries.c
        waiting = (
            select(columns.webhook_id, func.min(columns.next_at).label("since"))
            .where(columns.next_at <= now())
            .group_by(columns.webhook_id)
            .subquery()
        )
        query = (
            select(*webhooks.c)
            .join(waiting, waiting.c.webhook_id == webhooks.c.id)
            .where(webhooks.c.enabled.is_(True))
            .order_by(waiting.c.since)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [_webhook(found) for found in connection.execute(query)]

    def take(self, webhook_id: str, limit: int, *, lease_s: float) -> list[Delivery]:
        """Claim what is due for a webhook; whoever has not settled it after lease_s has lost it to another one."""
        columns = webhook_deliveries.c
        due = (columns.webhook_id == webhook_id, columns.next_at <= now())
        some = select(columns.id).where(*due).order_by(columns.next_at).limit(limit).scalar_subquery()
        statement = (
            update(webhook_deliveries)
            .where(columns.id.in_(some), *due)
            .values(next_at=now() + lease_s, claim=secrets.token_hex(16))
        )
        with self._engine.connect() as connection:
            return [_delivery(found) for found in connection.execute(statement.returning(*columns))]

    def settle(self, delivery: Delivery, attempt: Attempt, *, delivered: bool, wait_s: float | None) -> bool:
        """Write what an attempt came to; wait_s: until the next one, None for none. False if the claim was lost."""
        state = DeliveryState.DELIVERED if delivered else DeliveryState.FAILED if wait_s is None else None
        log = [*delivery.log, attempt][-LOGGED:]
        columns = webhook_deliveries.c
        values: dict[str, Any] = {
            "tries": delivery.tries + 1,
            "log": json.dumps([asdict(one) for one in log], separators=(",", ":")),
            "claim": None,
            "next_at": None if state else now() + wait_s,
        }
        mine = and_(columns.id == delivery.id, columns.claim == delivery.claim)
        with self._engine.connect() as connection:
            if state is None:
                # Still to be sent only if its webhook was not disabled meanwhile.
                retried = update(webhook_deliveries).where(mine, columns.state == str(DeliveryState.PENDING))
                if connection.execute(retried.values(**values)).rowcount:
                    return True
                state = DeliveryState.FAILED
                values["next_at"] = None
            return (
                connection.execute(update(webhook_deliveries).where(mine).values(state=str(state), **values)).rowcount
                > 0
            )

    def arrived(self, webhook_id: str) -> None:
        """The webhook works."""
        failing = (webhooks.c.id == webhook_id, webhooks.c.failing_since.is_not(None))
        with self._engine.connect() as connection:
            connection.execute(update(webhooks).where(*failing).values(failing_since=None))

    def failed(self, webhook_id: str, *, most_s: float, reason: str) -> bool:
        """The webhook did not take a delivery; True if it is disabled now, having failed for most_s."""
        first = (webhooks.c.id == webhook_id, webhooks.c.failing_since.is_(None))
        with self._engine.connect() as connection:
            connection.execute(update(webhooks).where(*first).values(failing_since=now()))
            long = (webhooks.c.id == webhook_id, webhooks.c.failing_since <= now() - most_s)
            found = connection.execute(select(webhooks.c.failing_since).where(*long)).first()
        if found is None:
            return False
        return self.disable(webhook_id, f"No delivery has arrived since {rfc3339(found.failing_since)}. {reason}")

    def disable(self, webhook_id: str, reason: str) -> bool:
        """Send it nothing more, neither what was pending nor what comes; False if it was disabled already."""
        enabled = (webhooks.c.id == webhook_id, webhooks.c.enabled.is_(True))
        with self._engine.connect() as connection:
            statement = update(webhooks).where(*enabled).values(enabled=False, disabled_reason=reason)
            disabled = connection.execute(statement).rowcount > 0
        self._drop_pending(webhook_id)
        return disabled

    def prune(self, older_than_s: float, limit: int) -> int:
        """Delete deliveries that were made so long ago, whatever became of them; how many there were."""
        columns = webhook_deliveries.c
        old = select(columns.id).where(columns.created_at <= now() - older_than_s).order_by(columns.created_at)
        statement = delete(webhook_deliveries).where(columns.id.in_(old.limit(limit).scalar_subquery()))
        with self._engine.connect() as connection:
            return connection.execute(statement).rowcount

    def _drop_pending(self, webhook_id: str) -> None:
        columns = webhook_deliveries.c
        # The claim stays: an attempt that is under way may still arrive.
        pending = (columns.webhook_id == webhook_id, columns.state == str(DeliveryState.PENDING))
        with self._engine.connect() as connection:
            connection.execute(
                update(webhook_deliveries).where(*pending).values(state=str(DeliveryState.FAILED), next_at=None)
            )

    def _body(self, row: JobRow) -> str:
        data = _VIEW.dump(Shown(row, Place()))
        if data["error"] and len(data["error"]["message"]) > LONGEST_MESSAGE:
            data["error"]["message"] = data["error"]["message"][: LONGEST_MESSAGE - 1] + "…"
        data["url"] = f"{self._public_url}/api/v1/jobs/{row.id}"
        body = {"type": f"job.{row.status}", "timestamp": data["completed_at"], "data": data}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


# What it says of the queue is of no use any more.
_VIEW = JobItem(exclude=("queue_position", "estimated_wait_seconds", "queued_reason"))


def _webhook(found: Any) -> Webhook:
    values = dict(found._mapping)
    values["events"] = tuple(map(Event, filter(None, values["events"].split(","))))
    values["job_types"] = tuple(map(JobType, filter(None, values["job_types"].split(","))))
    return Webhook(**values)


def _delivery(found: Any) -> Delivery:
    values = dict(found._mapping)
    values["state"] = DeliveryState(values["state"])
    values["log"] = tuple(Attempt(**one) for one in json.loads(values["log"]))
    return Delivery(**{field.name: values[field.name] for field in fields(Delivery)})
