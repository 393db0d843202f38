"""What must hold after every fault, checked over all that clients were told, all that was written, all that was run."""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.job import MAX_ATTEMPTS, TERMINAL
from tests.chaos.clients import SYNC_S, Wish
from tests.chaos.parts import Gone, Run
from tests.chaos.scene import Strike

#: What each count means; every one must be 0.
INVARIANTS: Mapping[str, str] = {
    "lost": "accepted, and unknown later",
    "stuck": "not ended when the time to settle was over",
    "outcome_changed": "two different ends told of one job, or an answer to DELETE that its end belies",
    "double_terminal": "written as ended twice",
    "regressions": "told or written as an earlier state than before",
    "doubled": "two jobs for one Idempotency-Key",
    "without_cause": "failed, timed out or cancelled, and nothing that was done to it explains it",
    "wrong_result": "completed with another job's answer",
    "extra_runs": "begun again although its worker, its store and its connection were well",
    "refused": "a good request that was never accepted",
}
_RANK = {"queued": 0, "running": 1, **dict.fromkeys(map(str, TERMINAL), 2)}
#: A store that was emptied is found out within this.
NOTICED_S = 2.0
#: A worker that cannot go on gives its jobs back, and ends within this.
LEAVES_S = 5.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of a run of the harness."""

    wishes: Sequence[Wish]
    rows: Mapping[str, Mapping[str, Any]]
    audit: Sequence[Mapping[str, Any]]
    runs: Sequence[Run]
    strikes: Sequence[Strike]
    gone: Sequence[Gone]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence says."""

    #: Jobs that break each invariant.
    broken: Mapping[str, Sequence[str]]
    #: Runs beyond each job's first, whatever the reason.
    repeated_runs: int
    #: Ends of all jobs, by state.
    ends: Mapping[str, int]

    @property
    def holds(self) -> bool:
        """Whether nothing is broken."""
        return not any(self.broken.values())


def check(evidence: Evidence) -> Verdict:
    """The verdict; the platform may still run, but nothing may change any more."""
    broken: dict[str, list[str]] = {name: [] for name in INVARIANTS}
    runs_of: dict[str, list[Run]] = defaultdict(list)
    for run in evidence.runs:
        runs_of[run.job].append(run)
    unexplained = {job: _unexplained(runs, evidence) for job, runs in runs_of.items()}
    broken["extra_runs"] = [job for job, count in unexplained.items() for _ in range(count)]

    ends: Counter[str] = Counter()
    for wish in evidence.wishes:
        if wish.refused is not None or not wish.ids:
            broken["refused"].append(f"{wish.text}: {wish.refused or 'no answer yet'}")
            continue
        job = wish.ids[0]
        if len(set(wish.ids)) > 1:
            broken["doubled"].append(wish.key)
        row = evidence.rows.get(job)
        if row is None or wish.vanished:
            broken["lost"].append(job)
            continue
        status = row["status"]
        ends[status] += 1
        if status not in TERMINAL:
            broken["stuck"].append(job)
        outcomes = {answer.outcome for answer in wish.answers if answer.outcome is not None}
        told = {answer.status for answer in wish.answers if answer.status in TERMINAL}
        if len(outcomes) > 1 or told - {status} or _belied(wish, status):
            broken["outcome_changed"].append(job)
        if _goes_back(wish):
            broken["regressions"].append(job)
        if wish.wrong_result:
            broken["wrong_result"].append(job)
        if status in TERMINAL and not _has_cause(wish, row, len(runs_of.get(job, ())), unexplained.get(job, 0)):
            broken["without_cause"].append(job)

    ended = Counter(write["job"] for write in evidence.audit if write["new"] in TERMINAL)
    broken["double_terminal"] = [job for job, count in ended.items() if count > 1]
    back = [write["job"] for write in evidence.audit if _RANK[write["new"]] < _RANK[write["old"]]]
    broken["regressions"] += back
    repeated = sum(len(runs) - 1 for runs in runs_of.values())
    return Verdict(broken, repeated, ends)


def recovery_s(strike: Strike, runs: Sequence[Run]) -> float | None:
    """Seconds from the fault's end until what it hit went on; None if that never came, or it hit nothing.

    Of a worker: until each job that it held was begun again. Of anything else: until the jobs that were submitted as
    it broke had ended, less the time that they take by themselves.
    """
    if strike.pid is not None:
        held = [
            run
            for run in runs
            if run.pid == strike.pid and run.begin < strike.began and (run.end is None or run.end > strike.began)
        ]
        again = [
            min((later.begin for later in runs if later.job == run.job and later.begin > run.begin), default=None)
            for run in held
        ]
        return max((at - strike.over for at in again if at is not None), default=None)
    ends = [wish.ended_at - strike.over - _own_s(wish) for wish in strike.probes if wish.ended_at is not None]
    return max(0.0, *ends) if len(ends) == len(strike.probes) else None


def recoveries(strikes: Iterable[Strike], runs: Sequence[Run]) -> dict[str, tuple[int, float | None, float | None]]:
    """By kind of fault: how many there were, and p50 and max of their recovery in seconds."""
    by_kind: dict[str, list[Strike]] = defaultdict(list)
    for strike in strikes:
        by_kind[strike.kind].append(strike)
    found = {}
    for kind, made in sorted(by_kind.items()):
        taken = [max(0.0, took) for strike in made if (took := recovery_s(strike, runs)) is not None]
        found[kind] = (len(made), statistics.median(taken) if taken else None, max(taken, default=None))
    return found


def _own_s(wish: Wish) -> float:
    words = wish.text.split()
    return min(float(words[1]), wish.timeout_s) if words[0] in ("sleep", "hang") else 0.0


def _unexplained(runs: Sequence[Run], evidence: Evidence) -> int:
    """How many of a job's runs came after one that nothing had ended."""
    return sum(not _explained(before, after, evidence) for before, after in itertools.pairwise(runs))


def _explained(before: Run, after: Run, evidence: Evidence) -> bool:
    died = any(
        gone.pid == before.pid
        and gone.code != 0
        and before.begin <= gone.at <= after.begin + (LEAVES_S if gone.code > 0 else NOTICED_S)
        for gone in evidence.gone
    )
    return died or any(
        strike.began <= after.begin
        and strike.over + NOTICED_S >= before.begin
        and (strike.spoils_runs or strike.pid == before.pid)
        for strike in evidence.strikes
    )


def _belied(wish: Wish, status: str) -> bool:
    return any((status == "cancelled") != (answer == 200) for answer in wish.cancels)


def _goes_back(wish: Wish) -> bool:
    """Whether an answer says less than one that its client had before it asked."""
    return any(
        _RANK[later.status] < _RANK[earlier.status]
        for earlier, later in itertools.permutations(wish.answers, 2)
        if earlier.got <= later.asked
    )


def _has_cause(wish: Wish, row: Mapping[str, Any], runs: int, unexplained: int) -> bool:
    status, code, what = row["status"], row["error_code"], wish.text.split()[0]
    match status:
        case "completed":
            return what in ("word", "number", "sleep", "probe", "hang")
        case "cancelled":
            return wish.cancel_asked
        case "timeout":
            return (what == "hang" and code == "run_timeout") or (wish.sync and code == "queue_timeout" and SYNC_S > 0)
        case "failed" if code == "worker_lost":
            # Also one that shared its workers with what killed them, or was on those that were killed.
            return what == "die" or (runs >= MAX_ATTEMPTS and unexplained == 0)
        case "failed":
            return what in ("fail", "oom")
    return False
