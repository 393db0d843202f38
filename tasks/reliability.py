"""How far a worker can be relied on: counts that fade, one score to show and one to rank by: pure functions.

Counts belong to the worker's stable name and lie in its region's store (tasks/ledger.py), by the store's clock.
"""

import math
from dataclasses import dataclass

from tasks.job import Envelope, JobState

#: What happened so long ago counts half.
HALF_LIFE_S = 7 * 24 * 3600.0
#: A worker of which nothing is known shows 9.5 / 10, the seed's own example; this many outcomes weigh as much as that.
PRIOR_GOOD, PRIOR_ALL = 9.5, 10.0
#: A process that ended or fell silent without being told to, whatever it ran: one loss is two faults.
LOST_FAULTS = 2.0
#: Faults of one failed or timed out attempt, by error code. Whatever is missing is not the worker's: input that its
#: model cannot take, a job that is too large for the device, a cancel.
FAULTS = {"engine_error": 1.0, "engine_broken": 1.0, "no_engine": 1.0, "run_timeout": 0.5}
#: 95 % of a normal distribution lies within so many standard deviations.
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Tally:
    """What a worker did, faded to a moment."""

    good: float = 0.0
    faults: float = 0.0
    #: Unix seconds by the store's clock.
    at: float = 0.0


def decayed(tally: Tally, now: float) -> Tally:
    """The tally as it counts now; a clock that went back takes nothing away."""
    share = 0.5 ** (max(now - tally.at, 0.0) / HALF_LIFE_S)
    return Tally(tally.good * share, tally.faults * share, max(now, tally.at))


def score(tally: Tally) -> float:
    """The score that people see, in (0, 1): 0.95 for a new worker, towards the share of good outcomes with more."""
    return (tally.good + PRIOR_GOOD) / (tally.good + tally.faults + PRIOR_ALL)


def rank(tally: Tally) -> float:
    """What workers are ordered by, in [0, 1): the least share of good outcomes that their number makes likely.

    The Wilson lower bound at 95 %, so that a newcomer without a fault does not outrank a proven worker; 0 without any
    outcome.
    """
    n = tally.good + tally.faults
    if n <= 0:
        return 0.0
    share = tally.good / n
    spread = _Z * math.sqrt((share * (1 - share) + _Z**2 / (4 * n)) / n)
    return max((share + _Z**2 / (2 * n) - spread) / (1 + _Z**2 / n), 0.0)


def weigh(envelope: Envelope) -> tuple[float, float]:
    """What one outcome adds to its worker's good outcomes and to its faults."""
    if envelope.outcome is JobState.COMPLETED:
        return 1.0, 0.0
    return 0.0, FAULTS.get(envelope.error.code, 0.0) if envelope.error else 0.0
