"""How much a key may use in a day and in a month; what runs is never stopped for it."""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from app.auth import Caller
from app.errors import TooMany
from app.keys import Quotas
from app.usage import Spent, Usage
from tasks.showing import rfc3339

#: What an owner has used is believed for this long; in between each process adds the jobs that it let in itself.
FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """One quota of a key, as it stands."""

    name: str
    limit: int
    used: float
    #: Unix seconds.
    resets_at: float


def standings(quotas: Quotas, spent: Spent) -> Sequence[Standing]:
    """The quotas that are set, those of a day first."""
    found = [
        Standing(name, most, spent.used[name], _reset(spent.at, monthly=name.endswith("month")))
        for name, most in asdict(quotas).items()
        if most is not None
    ]
    return sorted(found, key=lambda standing: standing.name.endswith("month"))


class QuotaCap:
    """Lets jobs in while their owner's quotas last. Threads may share it.

    Jobs are exact but for what other processes take within FRESH_S. Tokens and GPU seconds are known when a job has
    ended, so those in flight may go over.
    """

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._lock = threading.Lock()
        #: By owner: what it has used, jobs that were let in since, and until when that is believed.
        self._known: dict[str, tuple[Spent, int, float]] = {}

    def admit(self, caller: Caller) -> None:
        """Pass if the caller may send one job more. Raises TooMany."""
        limits = [most for most in asdict(caller.quotas).values() if most is not None]
        if not limits:
            return
        owner = caller.owner
        with self._lock:
            spent, since, until = self._known.get(owner, (None, 0, 0.0))
        if spent is None or time.monotonic() >= until:
            spent, since, until = self._usage.spent(owner, max(limits) + 1), 0, time.monotonic() + FRESH_S
        for standing in standings(caller.quotas, spent):
            used = standing.used + (since if standing.name.startswith("jobs") else 0)
            if used >= standing.limit:
                raise _refusal(standing, used, spent.at)
        with self._lock:
            self._known[owner] = spent, since + 1, until


def _refusal(standing: Standing, used: float, at: float) -> TooMany:
    what, _, period = standing.name.replace("_", " ").partition(" per ")
    resets_at = rfc3339(standing.resets_at)
    return TooMany(
        "insufficient_quota",
        f"This key may use {standing.limit} {what} a {period} ({standing.name}) and has used {used:g}; "
        f"it may use more from {resets_at} on. What it has sent goes on.",
        retry_after_s=max(1, int(standing.resets_at - at) + 1),
        # OpenAI's clients would send it twice more at once.
        headers={"x-should-retry": "false"},
        extra={"quota": {"name": standing.name, "limit": standing.limit, "used": used, "resets_at": resets_at}},
    )


def _reset(at: float, *, monthly: bool) -> float:
    """When the day or the month of UTC ends that this moment is in, in unix seconds."""
    day = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if not monthly:
        return (day + timedelta(days=1)).timestamp()
    return (day.replace(day=28) + timedelta(days=4)).replace(day=1).timestamp()
