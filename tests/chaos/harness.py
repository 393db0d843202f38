"""Breaks a running platform on purpose, and counts what that did to its jobs: `make chaos`.

    python -m tests.chaos.harness --jobs 400 --faults 60 --broker rabbitmq --seed 7
    python -m tests.chaos.harness --without compare-and-set

Real processes under load from clients that submit, poll, cancel and repeat themselves; faults.py breaks one part after
the other; checker.py looks at what clients were told, at every write of a status and at every run. One table; exit
code 1 if an invariant is broken. The seed decides which jobs and faults there are, not how processes interleave.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import faults
from tests.chaos.checker import INVARIANTS, Evidence, Verdict, check, recoveries
from tests.chaos.clients import Wish
from tests.chaos.faults import FAULTS
from tests.chaos.guards import GUARDS
from tests.chaos.scene import BACKENDS, Scene, opened

#: Ended jobs are looked at once more after this, to see that they stay what they are.
STAYS_S = 3.0
#: A part that was broken is slow for so long afterwards: what had piled up is done first.
TROUBLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run of the harness is to do."""

    backend: str = "embedded"
    jobs: int = 200
    faults: int = 30
    seed: int = 1
    #: Kinds to choose from; all that are possible by default.
    kinds: Sequence[str] = ()
    #: The guard to take out.
    without: str | None = None
    workers: int = 3
    #: Seconds from one fault to the next, at least.
    every_s: float = 2.0
    #: Seconds after the last fault by which every job must have ended.
    settle_s: float = 60.0


@dataclass(frozen=True, slots=True, order=True)
class Slowest:
    """A submit that waited longer for its answer than any other."""

    took_s: float = 0.0
    #: Kinds of the faults at that time.
    beside: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.took_s:.2f} s ({', '.join(self.beside) or 'beside no fault'})"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it."""

    plan: Plan
    verdict: Verdict
    #: By kind: count, p50 and max of recovery in seconds.
    recovered: dict[str, tuple[int, float | None, float | None]]
    accepted: int
    #: Seconds from the last fault until every job had ended, or until the patience was over.
    settled_s: float
    #: While every part that a submit cannot do without was well, and while one of them was broken or slow.
    slowest: Slowest
    slowest_in_need: Slowest
    surprises: dict[str, int]
    took_s: float

    def table(self) -> str:
        """For people."""
        plan, broken = self.plan, self.verdict.broken
        guard = f", without {plan.without}" if plan.without else ""
        made = sum(count for count, _, _ in self.recovered.values())
        ends = ", ".join(f"{count} {status}" for status, count in sorted(self.verdict.ends.items()))
        lines = [
            f"{plan.backend}, seed {plan.seed}{guard}: {self.accepted} jobs, {made} faults, {self.took_s:.0f} s",
            f"{'fault':<16}{'':>5}{'made':>6}{'recovery p50':>14}{'max':>8}",
            *(
                f"{kind:<16}{FAULTS[kind].number:>5}{count:>6}{_seconds(middle):>14}{_seconds(most):>8}"
                for kind, (count, middle, most) in self.recovered.items()
            ),
            f"{'invariant':<16}{'broken':>7}",
            *(f"{name:<16}{len(broken[name]):>7}   {INVARIANTS[name]}" for name in INVARIANTS),
            f"ended: {ends}; repeated runs: {self.verdict.repeated_runs}; settled {self.settled_s:.1f} s after the last"
            " fault",
            f"slowest submit: {self.slowest}; while SQL was locked or away, the API was not there or each word to the"
            f" store was late: {self.slowest_in_need}",
            *([f"server errors: {self.surprises}"] if self.surprises else []),
            *([missing] if (missing := faults.left_out(plan.backend)) and not plan.kinds else []),
            "all invariants hold" if self.verdict.holds else "BROKEN",
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For programs; what broke an invariant by its id."""
        plan = self.plan
        return {
            "backend": plan.backend,
            "seed": plan.seed,
            "without": plan.without,
            "jobs": self.accepted,
            "faults": {
                kind: {"made": made, "recovery_p50_s": middle, "recovery_max_s": most}
                for kind, (made, middle, most) in self.recovered.items()
            },
            "broken": {name: list(jobs) for name, jobs in self.verdict.broken.items()},
            "ends": dict(self.verdict.ends),
            "repeated_runs": self.verdict.repeated_runs,
            "settled_s": self.settled_s,
            "slowest_submit": asdict(self.slowest),
            "slowest_submit_in_need": asdict(self.slowest_in_need),
            "server_errors": self.surprises,
            "took_s": self.took_s,
            "holds": self.verdict.holds,
        }


def run(plan: Plan, *, keep: Path | None = None) -> Report:
    """Do it. keep: a folder for the logs of all processes, if an invariant is broken."""
    began = time.monotonic()
    chance = random.Random(plan.seed)
    kinds = _choose_kinds(plan, chance)
    with opened(plan.backend, workers=plan.workers, seed=plan.seed, without=plan.without) as scene:
        _submit_all(scene, plan, chance)
        for kind in kinds:
            at = time.monotonic()
            FAULTS[kind].make(scene, kind)
            time.sleep(max(0.0, plan.every_s * chance.uniform(0.5, 1.0) - (time.monotonic() - at)))
        last = time.monotonic()
        # Jobs may still be to come if the faults were quick.
        _until_ended(scene, max(last, began) + plan.settle_s)
        settled_s = time.monotonic() - last
        time.sleep(STAYS_S)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(scene.clients.look, [wish for wish in scene.clients.wishes if wish.ids]))
        clients, database = scene.clients, scene.database
        clients.close()
        evidence = Evidence(
            clients.wishes, database.rows(), database.audit(), scene.runs(), scene.strikes, scene.supervisor.gone
        )
        verdict = check(evidence)
        if keep is not None and not verdict.holds:
            _keep_logs(scene, evidence, keep)
        return Report(
            plan,
            verdict,
            recoveries(scene.strikes, evidence.runs),
            sum(bool(wish.ids) for wish in clients.wishes),
            settled_s,
            *_slowest_submits(scene),
            dict(clients.surprises),
            time.monotonic() - began,
        )


def _slowest_submits(scene: Scene) -> tuple[Slowest, Slowest]:
    """While every part that a submit cannot do without was well, and while one of them was broken or slow."""
    well, in_need = Slowest(), Slowest()
    for asked, took in scene.clients.submits:
        over = [strike for strike in scene.strikes if asked < strike.over + TROUBLE_S]
        beside = sorted({strike.kind for strike in over if asked + took > strike.began})
        if any(kind.startswith(("sql-", "api-", "wire-slow")) for kind in beside):
            in_need = max(in_need, Slowest(took, beside))
        else:
            well = max(well, Slowest(took, beside))
    return well, in_need


def _choose_kinds(plan: Plan, chance: random.Random) -> list[str]:
    """Every kind once, as far as there is room, then by weight; in any order."""
    possible = list(plan.kinds) or faults.possible(plan.backend)
    kinds = chance.sample(possible, min(len(possible), plan.faults))
    kinds += chance.choices(possible, [FAULTS[kind].weight for kind in possible], k=plan.faults - len(kinds))
    chance.shuffle(kinds)
    return kinds


def _submit_all(scene: Scene, plan: Plan, chance: random.Random) -> None:
    """Spread the jobs over the time of the faults."""
    now, span_s = time.monotonic(), plan.faults * plan.every_s
    for number in range(plan.jobs):
        draw = chance.random()
        text = f"word {number}"
        if draw < 0.25:
            text = f"sleep {chance.uniform(0.1, 1.2):.2f}"
        elif draw < 0.28:
            text = chance.choice(("fail", "oom"))
        scene.clients.wish(
            Wish(text, priority=chance.randrange(9), sync=chance.random() < 0.04),
            at=now + span_s * number / plan.jobs,
            cancel_after=chance.uniform(0, 4) if chance.random() < 0.12 else None,
            repeat=chance.random() < 0.1,
        )


def _until_ended(scene: Scene, end: float) -> None:
    while time.monotonic() < end and not all(wish.ended.is_set() for wish in scene.clients.wishes):
        time.sleep(0.1)


def _keep_logs(scene: Scene, evidence: Evidence, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*scene.folder.glob("*.log"), *scene.folder.glob("*.jsonl")]:
        (folder / path.name).write_bytes(path.read_bytes())
    strikes = [(strike.kind, strike.began, strike.over, strike.pid) for strike in evidence.strikes]
    told = {
        wish.id: [wish.text, wish.cancels, [(a.asked, a.got, a.status) for a in wish.answers]]
        for wish in evidence.wishes
        if wish.id
    }
    gone = [(gone.name, gone.pid, gone.at, gone.code) for gone in evidence.gone]
    known = {"strikes": strikes, "gone": gone, "told": told, "audit": evidence.audit, "rows": evidence.rows}
    (folder / "evidence.json").write_text(json.dumps(known, indent=1))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def main() -> int:
    """Entry of `python -m tests.chaos.harness`."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.harness", description=(__doc__ or "").splitlines()[0])
    usual = Plan()
    parser.add_argument("--jobs", type=int, default=usual.jobs)
    parser.add_argument("--faults", type=int, default=usual.faults)
    parser.add_argument(
        "--broker",
        choices=BACKENDS,
        default="embedded",
        help="embedded: Valkey and SQLite; postgres: Redis and PostgreSQL; rabbitmq: RabbitMQ, Redis and PostgreSQL",
    )
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of jobs and faults")
    parser.add_argument("--kinds", nargs="+", choices=[*FAULTS], default=[], metavar="KIND", help=", ".join(FAULTS))
    parser.add_argument("--without", choices=[*GUARDS], help="take this guard out of the product; the run must fail")
    parser.add_argument("--workers", type=int, default=usual.workers)
    parser.add_argument("--every", type=float, default=usual.every_s, help="seconds from one fault to the next")
    parser.add_argument("--settle", type=float, default=usual.settle_s, help="seconds for every job to end after them")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    parser.add_argument("--keep", type=Path, help="keep logs and evidence in this folder if an invariant is broken")
    given = parser.parse_args()
    if wrong := [kind for kind in given.kinds if given.broker not in FAULTS[kind].backends]:
        parser.error(f"{', '.join(wrong)} cannot be with {given.broker}")
    print(f"seed {given.seed}", flush=True)
    plan = Plan(
        given.broker,
        given.jobs,
        given.faults,
        given.seed,
        given.kinds,
        given.without,
        given.workers,
        given.every,
        given.settle,
    )
    try:
        report = run(plan, keep=given.keep)
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.table())
    if given.json is not None:
        given.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 0 if report.verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
